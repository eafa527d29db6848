"""Continual streams on the handwritten digits that scikit-learn ships: real data, no download."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity._optional import require

NUM_CLASSES = 10
NUM_FEATURES = 64


class RandomLabelDigits(LightningDataModule):
    """Each task gives new random labels to newly drawn digits: nothing to transfer, so only the ability to learn shows.

    Task t serves ``samples_per_task`` of the 1797 digits (Alpaydin and Kaynak 1998, 8 x 8 pixels), drawn without
    replacement, with uniform labels; both depend on ``seed`` and t only. Which task is served:

    - in one fit it follows from the Trainer's epoch. Use ``max_epochs=num_tasks * epochs_per_task``,
      ``reload_dataloaders_every_n_epochs=epochs_per_task`` and a ``TaskTracker(EveryNEpochs(epochs_per_task))``;
    - with a fit for each task, set ``stream.task_id = t`` before fit t, each with ``max_epochs=epochs_per_task``.

    Args:
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served.
        samples_per_task: images in each task, at most 1797.
        batch_size: minibatch.
        seed: of images, labels and shuffling.

    Attributes:
        task_id: the task to serve; None (the default) to follow the Trainer's epoch.

    Raises:
        ValueError: for sizes out of range.
        ModuleNotFoundError: without scikit-learn.

    Example:
        >>> from lightning_plasticity.streams import RandomLabelDigits
        >>> inputs, labels = RandomLabelDigits(seed=0).task_data(0)
        >>> inputs.shape, labels.shape
        (torch.Size([400, 64]), torch.Size([400]))
    """

    def __init__(
        self,
        num_tasks: int = 16,
        epochs_per_task: int = 30,
        samples_per_task: int = 400,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("epochs_per_task", epochs_per_task), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}, expected at least 1.")
        self._images = load_digits()
        if not 1 <= samples_per_task <= len(self._images):
            raise ValueError(f"samples_per_task={samples_per_task}, expected 1 to {len(self._images)}.")
        self.num_tasks = num_tasks
        self.epochs_per_task = epochs_per_task
        self.samples_per_task = samples_per_task
        self.batch_size = batch_size
        self.seed = seed
        self.task_id: int | None = None

    def task_data(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs (samples_per_task, 64) float32 and labels (samples_per_task,) of a task."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + task)
        chosen = torch.randperm(len(self._images), generator=generator)[: self.samples_per_task]
        return self._images[chosen], torch.randint(NUM_CLASSES, (self.samples_per_task,), generator=generator)

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's data: that of ``task_id``, else of the Trainer's epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        if self.task_id is None:
            task = min(epoch // self.epochs_per_task, self.num_tasks - 1)
        else:
            task = self.task_id
            epoch += task * self.epochs_per_task  # over the whole stream: each task has its own order
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_000 + epoch)
        return DataLoader(
            TensorDataset(*self.task_data(task)), batch_size=self.batch_size, shuffle=True, generator=generator
        )


def load_digits() -> Tensor:
    """(1797, 64) float32 digits, scaled to [0, 1] and standardised by one mean and one deviation."""
    images = require("sklearn.datasets", "The digits stream").load_digits().images
    inputs = torch.as_tensor(images, dtype=torch.float32).reshape(len(images), NUM_FEATURES) / 16.0
    return (inputs - inputs.mean()) / inputs.std()
