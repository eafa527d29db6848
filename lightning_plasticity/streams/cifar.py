"""Incremental CIFAR-100: five more classes with each task, on the files that torchvision knows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_plasticity._optional import require
from lightning_plasticity.streams.base import ORDER_STRIDE, TASK_STRIDE, Samples, TaskStream, at_least_one

Protocol = Literal["lop-jax", "dohare"]
NUM_CLASSES, VALIDATION_PER_CLASS = 100, 50
MEAN, DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# batch size, share of the training images kept for validation, augmentation
PROTOCOLS: dict[str, tuple[int, bool, bool]] = {"lop-jax": (100, False, False), "dohare": (90, True, True)}


class IncrementalCIFAR100(TaskStream):
    """CIFAR-100 whose classes arrive a few at a time; every task holds all classes seen so far.

    Two protocols of the field, both 20 tasks of 5 classes and 200 epochs:

    - ``"lop-jax"`` (arXiv 2509.22335): batch 100, no augmentation, all 500 training images of a class.
    - ``"dohare"`` (Dohare et al. 2024, Nature 632): batch 90, random flips, crops and rotations up to 15 degrees; 50
      images of each class are held out for early stopping (``val_dataloader``).

    Labels are the classes' own, 0 to 99: give the network 100 outputs. ``classes(task)`` names those seen so far, to
    which Dohare et al. restrict the outputs.

    Args:
        root: folder that holds ``cifar-100-python`` (or where to put it).
        protocol: ``"lop-jax"`` or ``"dohare"``.
        num_tasks: length of the stream.
        classes_per_task: new classes in each task.
        epochs_per_task: epochs that each task is served.
        batch_size: minibatch; None for the protocol's.
        seed: of the order of classes and of minibatches.
        download: let torchvision fetch the files when they are missing.

    Raises:
        FileNotFoundError: when the files are missing and ``download`` is off.
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        root: str = "data",
        protocol: Protocol = "lop-jax",
        num_tasks: int = 20,
        classes_per_task: int = 5,
        epochs_per_task: int = 200,
        batch_size: int | None = None,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r}, expected one of {tuple(PROTOCOLS)}.")
        size, self._validates, self._augments = PROTOCOLS[protocol]
        super().__init__(num_tasks, epochs_per_task, size if batch_size is None else batch_size, seed)
        at_least_one("classes_per_task", classes_per_task)
        if num_tasks * classes_per_task > NUM_CLASSES:
            raise ValueError(
                f"num_tasks={num_tasks} of classes_per_task={classes_per_task} need more than 100 classes."
            )
        self.root, self.protocol, self.classes_per_task = root, protocol, classes_per_task
        self.order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
        self._train, self._test = (load_cifar100(root, part, download) for part in (True, False))

    def classes(self, task: int) -> Tensor:
        """The classes seen up to and including a task, in the order of arrival."""
        return self.order[: (task + 1) * self.classes_per_task]

    def task_data(self, task: int) -> Samples:
        """Training images (N, 3, 32, 32), standardised, and labels, of all classes seen."""
        return self._of(self._train, task, held_out=False)

    def validation_data(self, task: int) -> Samples | None:
        """The images held out of the training set; None where the protocol keeps none."""
        return self._of(self._train, task, held_out=True) if self._validates else None

    def test_data(self, task: int) -> Samples:
        """Test images of all classes seen."""
        return self._of(self._test, task, held_out=None)

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's training data, augmented where the protocol asks for it."""
        loader = super().train_dataloader()
        if not self._augments:
            return loader
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        order = torch.Generator().manual_seed(self.seed * TASK_STRIDE + ORDER_STRIDE + epoch)
        dataset = _Augmented(*self.task_data(self.current_task))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out training images where the protocol keeps some, else the test images."""
        held_out = self.validation_data(self.current_task)
        held_out = self.test_data(self.current_task) if held_out is None else held_out
        return DataLoader(TensorDataset(*held_out), batch_size=self.batch_size)

    def _of(self, samples: Samples, task: int, held_out: bool | None) -> Samples:
        inputs, targets = samples
        chosen = torch.isin(targets, self.classes(task))
        if held_out is not None and self._validates:
            chosen &= _last_of_each_class(targets, VALIDATION_PER_CLASS) == held_out
        return inputs[chosen], targets[chosen]


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Random flips, crops and rotations of each image, anew at each visit."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        transforms: Any = require("torchvision.transforms", "Augmentation")
        self.inputs, self.targets = inputs, targets
        self._transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomRotation((0, 15)),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self.inputs[index]), self.targets[index]


def load_cifar100(root: str, train: bool, download: bool) -> Samples:
    """Images (N, 3, 32, 32) float32, standardised by channel, and labels.

    Raises:
        FileNotFoundError: with the place where the files are expected.
    """
    datasets: Any = require("torchvision.datasets", "The CIFAR-100 stream")
    try:
        dataset = datasets.CIFAR100(root, train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No CIFAR-100 files in {root}/cifar-100-python; put the extracted archive there, or pass download=True. "
            f"({error})"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).float() / 255.0
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation, torch.as_tensor(dataset.targets, dtype=torch.int64)


def _last_of_each_class(targets: Tensor, count: int) -> Tensor:
    """Whether a sample is among the last ``count`` of its class, (N,)."""
    last = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(int(targets.max()) + 1):
        last[(targets == label).nonzero().flatten()[-count:]] = True
    return last
