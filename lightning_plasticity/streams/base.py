"""``TaskStream``: what all streams share: which task is served, in which minibatches, in which order."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Samples = tuple[Tensor, Tensor]
TASK_STRIDE, ORDER_STRIDE, CHANGE_STRIDE = 1_000_003, 500_000, 700_001


class TaskStream(LightningDataModule):
    """A stream of supervised tasks; a subclass gives the samples of each in ``task_data``.

    Two ways to train on it:

    - one fit: ``max_epochs=num_tasks * epochs_per_task``, ``reload_dataloaders_every_n_epochs=epochs_per_task`` and a
      ``TaskTracker(EveryNEpochs(epochs_per_task))``; optimizer state is kept over tasks;
    - a fit per task: set ``stream.task_id`` to the task's index before each fit.

    Samples depend on ``seed`` and the task, the order of minibatches on ``seed`` and the epoch; neither consumes the
    global random state.

    Args:
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served in one fit.
        batch_size: minibatch.
        seed: of tasks and order.

    Raises:
        ValueError: for sizes out of range.
    """

    def __init__(self, num_tasks: int, epochs_per_task: int, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("epochs_per_task", epochs_per_task), ("batch_size", batch_size)):
            at_least_one(name, value)
        self.num_tasks = num_tasks
        self.epochs_per_task = epochs_per_task
        self.batch_size = batch_size
        self.seed = seed
        self.task_id: int | None = None  # None: the task follows from the Trainer's epoch

    def task_data(self, task: int) -> Samples:
        """Training inputs (N, ...) and targets (N,) of a task."""
        raise NotImplementedError

    def test_data(self, task: int) -> Samples | None:
        """Held-out inputs and targets of a task; None where the stream has none."""
        return None

    @property
    def current_task(self) -> int:
        """Index of the task that is served now."""
        if self.task_id is not None:
            return self.task_id
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """The current task's training data."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        order = epoch if self.task_id is None else self.task_id * self.epochs_per_task + epoch % self.epochs_per_task
        generator = torch.Generator().manual_seed(self.seed * TASK_STRIDE + ORDER_STRIDE + order)
        dataset: Dataset[Any] = TensorDataset(*self.task_data(self.current_task))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, generator=generator)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The current task's held-out data; an empty list where there is none."""
        held_out = self.test_data(self.current_task)
        return [] if held_out is None else DataLoader(TensorDataset(*held_out), batch_size=max(self.batch_size, 256))

    def generator(self, task: int, stride: int = 0) -> torch.Generator:
        """A random generator that depends on the stream's seed and the task only."""
        return torch.Generator().manual_seed(self.seed * TASK_STRIDE + stride + task)


def at_least_one(name: str, value: int) -> None:
    """Refuse sizes below one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}, expected a whole number >= 1.")
