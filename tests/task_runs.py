"""Short fits that write down when the task hooks were called."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity.callbacks.schedules import (
    TaskSchedule,
)
from lightning_plasticity.callbacks.task_tracker import TaskTracker

FILTERS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
]

BATCHES = 3  # per epoch, everywhere
Event = tuple[str, int, int]  # (hook, task, cumulative step)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorder(L.Callback):
    """Writes down the hooks with the tracker's counters as they are at that moment."""

    def __init__(self, tracker: TaskTracker) -> None:
        self.tracker = tracker
        self.events: list[Event] = []
        self.lengths: list[tuple[int, int]] = []  # steps and epochs of each task, when it ends

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        assert self.tracker.task == task
        assert self.tracker.in_task
        assert (self.tracker.steps_in_task, self.tracker.epochs_in_task) == (0, 0)
        self.events.append(("start", task, self.tracker.step))

    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        assert self.tracker.task == task
        assert not self.tracker.in_task
        assert self.tracker.first_batch is None
        self.events.append(("end", task, self.tracker.step))
        self.lengths.append((self.tracker.steps_in_task, self.tracker.epochs_in_task))


def loader(batches: int = BATCHES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(4.0 * batches).reshape(-1, 2)), batch_size=2)


def make_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, "max_epochs": 1, **settings})


def recorded(schedule: TaskSchedule | None = None) -> tuple[TaskTracker, Recorder]:
    tracker = TaskTracker(schedule)
    return tracker, Recorder(tracker)


def pairs(*boundaries: int) -> list[Event]:
    """Events of tasks that follow one another without a gap, from their common boundaries."""
    tasks = enumerate(itertools.pairwise(boundaries))
    return [event for task, (start, end) in tasks for event in (("start", task, start), ("end", task, end))]


class CutError(Exception):
    """Stands for whatever ends a run early."""


class CutAt(L.Callback):
    """Raises at the start of the batch that follows the given optimizer step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.at:
            raise CutError


class PrivateIdNet(Net):
    """Changes its task inside the epoch, as a stream does."""

    def __init__(self) -> None:
        super().__init__()
        self._task_id = torch.tensor(0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._task_id = torch.tensor(self.trainer.global_step // 2)
        return batch


class ByHand(L.Callback):
    """Asks for a new task after the given optimizer steps."""

    def __init__(self, tracker: TaskTracker, *steps: int) -> None:
        self.tracker, self.steps = tracker, steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.tracker.step in self.steps:
            self.tracker.new_task()
