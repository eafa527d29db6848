"""Continual ImageNet: pairs of classes, one after the other, from files of 32 x 32 images by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_plasticity.streams.base import Samples, TaskStream, at_least_one

Protocol = Literal["lop-jax", "dohare"]
EPOCHS: dict[str, int] = {"lop-jax": 20, "dohare": 250}
TRAIN_PER_CLASS = 600


class ContinualImageNet(TaskStream):
    """Each task tells a few classes of 32 x 32 ImageNet apart (Dohare et al. 2024, Nature 632).

    Reads the class files that Dohare et al. publish: ``<class>.npy`` with an array (700, 3, 32, 32), of which the
    first 600 images are for training. Classes are used up in a random order and then again.

    Two protocols of the field, both pairs of classes at batch 100: ``"lop-jax"`` (arXiv 2509.22335), 20 epochs, the
    head kept; ``"dohare"``, 250 epochs, the head set to zero before each task (add ``LayerReset(layers="head")``).

    Args:
        root: folder of the class files.
        protocol: ``"lop-jax"`` or ``"dohare"``.
        num_tasks: length of the stream.
        classes_per_task: how many classes; labels are 0 ... classes_per_task - 1 in every task.
        epochs_per_task: epochs that each task is served; None for the protocol's.
        batch_size: minibatch.
        seed: of the order of classes and of minibatches.

    Raises:
        FileNotFoundError: when there are no class files.
        ValueError: for settings out of range, and for files of another shape.
    """

    def __init__(
        self,
        root: str = "data/classes",
        protocol: Protocol = "lop-jax",
        num_tasks: int = 2000,
        classes_per_task: int = 2,
        epochs_per_task: int | None = None,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        if protocol not in EPOCHS:
            raise ValueError(f"protocol={protocol!r}, expected one of {tuple(EPOCHS)}.")
        super().__init__(num_tasks, EPOCHS[protocol] if epochs_per_task is None else epochs_per_task, batch_size, seed)
        at_least_one("classes_per_task", classes_per_task)
        self.root, self.protocol, self.classes_per_task = root, protocol, classes_per_task
        self._files = sorted(Path(root).glob("*.npy"), key=lambda file: (len(file.stem), file.stem))
        if len(self._files) < classes_per_task:
            raise FileNotFoundError(
                f"{len(self._files)} class files (<class>.npy) in {root}, expected at least {classes_per_task}; "
                "see the data set of Dohare et al. 2024 for the download."
            )

    def classes(self, task: int) -> list[str]:
        """Names of the task's classes: the order of classes is drawn anew whenever all have been used."""
        total, size = len(self._files), self.classes_per_task
        rounds, place = divmod(task, total // size)
        order = torch.randperm(total, generator=self.generator(rounds))
        return [self._files[index].stem for index in order[place * size : (place + 1) * size].tolist()]

    def task_data(self, task: int) -> Samples:
        """Training images (600 per class, 3, 32, 32) float32 and labels."""
        return self._read(task, slice(None, TRAIN_PER_CLASS))

    def test_data(self, task: int) -> Samples:
        """The other images of the same classes."""
        return self._read(task, slice(TRAIN_PER_CLASS, None))

    def val_dataloader(self) -> Any:
        """The other images: the field's metric is accuracy on them after a task's last epoch."""
        return self.test_dataloader()

    def _read(self, task: int, part: slice) -> Samples:
        images = [self._images(name)[part] for name in self.classes(task)]
        labels = [torch.full((len(own),), label, dtype=torch.int64) for label, own in enumerate(images)]
        return torch.cat(images), torch.cat(labels)

    def _images(self, name: str) -> Tensor:
        file = Path(self.root, f"{name}.npy")
        array: Any = np.load(file, allow_pickle=False)
        if array.ndim != 4 or array.shape[1:] != (3, 32, 32) or len(array) <= TRAIN_PER_CLASS:
            raise ValueError(f"{file} holds an array {array.shape}, expected (more than 600, 3, 32, 32).")
        images = torch.from_numpy(array).float()
        return images / 255.0 if array.dtype == np.uint8 else images
