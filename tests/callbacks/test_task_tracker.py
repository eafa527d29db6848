"""Boundaries between tasks: where they fall, in which order they are told, and that a resumed run keeps them."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_plasticity.callbacks.schedules import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    TaskAttribute,
    TaskSchedule,
    plain_label,
)
from lightning_plasticity.callbacks.task_tracker import TaskTracker

pytestmark = [
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


# --- where the boundaries fall ---


def test_new_trainer_per_task() -> None:
    tracker, recorder = recorded()
    net = Net()
    for _ in range(3):
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == pairs(0, 3, 6, 9)
    assert recorder.lengths == [(3, 1)] * 3
    assert (tracker.task, tracker.step, tracker.in_task) == (2, 9, False)


def test_one_trainer_refitted() -> None:
    tracker, recorder = recorded(EveryFit())
    net, trainer = Net(), make_trainer(tracker, recorder)
    for _ in range(3):
        trainer.fit(net, loader())
        trainer.fit_loop.max_epochs += 2
    assert recorder.events == pairs(0, 3, 9, 15)
    assert recorder.lengths == [(3, 1), (6, 2), (6, 2)]


def test_refitted_trainer_and_new_trainer_mixed() -> None:
    tracker, recorder = recorded()
    net = Net()
    for _ in range(2):
        trainer = make_trainer(tracker, recorder)
        trainer.fit(net, loader())
        trainer.fit_loop.max_epochs += 1
        trainer.fit(net, loader())
    assert recorder.events == pairs(0, 3, 6, 9, 12)


def test_tracker_joins_a_trainer_that_has_already_trained() -> None:
    net, trainer = Net(), make_trainer()
    trainer.fit(net, loader())
    tracker, recorder = recorded()
    trainer.callbacks.extend([tracker, recorder])
    trainer.fit_loop.max_epochs += 1
    trainer.fit(net, loader())
    assert recorder.events == [("start", 0, 3), ("end", 0, 6)]  # the same x axis as trainer.global_step
    assert recorder.lengths == [(3, 1)]


def test_every_n_epochs_in_one_fit() -> None:
    _, recorder = recorded(EveryNEpochs(2))
    make_trainer(recorder.tracker, recorder, max_epochs=6).fit(Net(), loader(), loader())
    assert recorder.events == pairs(0, 6, 12, 18)
    assert recorder.lengths == [(6, 2)] * 3


@pytest.mark.parametrize(("accumulate", "steps_per_epoch"), [(1, 3), (2, 2)])
def test_every_n_steps_counts_optimizer_steps(accumulate: int, steps_per_epoch: int) -> None:
    tracker, recorder = recorded(EveryNSteps(4))
    make_trainer(tracker, recorder, max_epochs=4, accumulate_grad_batches=accumulate).fit(Net(), loader())
    assert tracker.step == 4 * steps_per_epoch
    assert recorder.events == pairs(*range(0, tracker.step + 1, 4))


def test_end_comes_at_once_not_with_the_next_batch() -> None:
    hooks: list[str | None] = []

    class Where(L.Callback):
        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            hooks.append(pl_module._current_fx_name)
            pl_module.log("seen", 1.0) if pl_module._current_fx_name != "on_train_end" else None
            assert trainer.strategy.model is not None

    for schedule in (EveryNSteps(2), EveryNEpochs(1), EveryFit(), TaskAttribute()):
        net = Net()
        net.task_id = 0
        make_trainer(TaskTracker(schedule), Where(), limit_train_batches=2).fit(net, loader())
    assert hooks == ["on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_train_end"]


class EpochData(L.LightningDataModule):
    """A new task every other epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Event] = []

    @property
    def task_id(self) -> int:
        return 10 + self.trainer.current_epoch // 2

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.seen.append(("start", task, trainer.global_step))


def test_attribute_of_the_datamodule_by_default() -> None:
    tracker, recorder = recorded()
    data = EpochData()
    make_trainer(tracker, recorder, max_epochs=5).fit(Net(), datamodule=data)
    assert recorder.events == pairs(0, 6, 12, 15)
    assert recorder.lengths == [(6, 2), (6, 2), (3, 1)]
    assert data.seen == [("start", 0, 0), ("start", 1, 6), ("start", 2, 12)]


class PrivateIdNet(Net):
    """Changes its task inside the epoch, as a stream does."""

    def __init__(self) -> None:
        super().__init__()
        self._task_id = torch.tensor(0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._task_id = torch.tensor(self.trainer.global_step // 2)
        return batch


@pytest.mark.parametrize("schedule", [None, TaskAttribute(), TaskAttribute("_task_id")])
def test_attribute_of_the_module(schedule: TaskSchedule | None) -> None:
    tracker, recorder = recorded(schedule)
    make_trainer(tracker, recorder, max_epochs=2).fit(PrivateIdNet(), loader())
    assert recorder.events == pairs(0, 2, 4, 6)
    assert tracker.state_dict()["label"] == 2


def test_attribute_that_changes_between_fits() -> None:
    tracker, recorder = recorded()
    net = Net()
    for value in ("cats", "dogs"):
        net.task_id = value
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == pairs(0, 3, 6)


def test_same_attribute_in_a_second_fit_is_the_same_task() -> None:
    tracker, recorder = recorded()
    net = Net()
    for value in (0, 0, 1):
        net.task_id = value
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == [("start", 0, 0), ("end", 0, 3), ("start", 1, 6), ("end", 1, 9)]


def test_same_attribute_with_several_fits_to_a_task() -> None:
    tracker, recorder = recorded(TaskAttribute(ends_with_fit=False))
    net = Net()
    for value in (0, 0, 1):
        net.task_id = value
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == [("start", 0, 0), ("end", 0, 6), ("start", 1, 6)]
    assert tracker.in_task


def test_attribute_none_leaves_the_tasks_to_the_fits() -> None:
    for schedule in (None, TaskAttribute()):
        tracker, recorder = recorded(schedule)
        net = Net()
        net.task_id = None
        for _ in range(2):
            make_trainer(tracker, recorder).fit(net, loader())
        assert recorder.events == pairs(0, 3, 6)


def test_module_comes_before_datamodule_and_methods_do_not_count() -> None:
    class Method(Net):
        def task_id(self) -> int:
            raise AssertionError

    for module_type, expected in ((Method, pairs(0, 6, 9)), (Net, pairs(0, 9))):
        tracker, recorder = recorded()
        net = module_type()
        if module_type is Net:
            net.task_id = 0
        make_trainer(tracker, recorder, max_epochs=3).fit(net, datamodule=EpochData())
        assert recorder.events == expected


def test_missing_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match=r"name='phase'.*module \(Net\) or datamodule \(EpochData\); set it"):
        make_trainer(TaskTracker(TaskAttribute("phase"))).fit(Net(), datamodule=EpochData())
    with pytest.raises(AttributeError, match=r"module \(Net\); there is no datamodule"):
        make_trainer(TaskTracker(TaskAttribute("phase"))).fit(Net(), loader())


class ByHand(L.Callback):
    """Asks for a new task after the given optimizer steps."""

    def __init__(self, tracker: TaskTracker, *steps: int) -> None:
        self.tracker, self.steps = tracker, steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.tracker.step in self.steps:
            self.tracker.new_task()


def test_by_hand_during_a_fit() -> None:
    tracker, recorder = recorded()
    make_trainer(tracker, recorder, ByHand(tracker, 2, 5), max_epochs=3).fit(Net(), loader())
    assert recorder.events == pairs(0, 2, 5, 9)


def test_by_hand_before_a_fit_is_one_boundary() -> None:
    tracker, recorder = recorded(TaskSchedule())  # only by hand
    net = Net()
    for fit in range(4):
        if fit in (0, 2):
            tracker.new_task()
            tracker.new_task()
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == [("start", 0, 0), ("end", 0, 6), ("start", 1, 6)]


def test_by_hand_restarts_the_count() -> None:
    tracker, recorder = recorded(EveryNSteps(4))
    make_trainer(tracker, recorder, ByHand(tracker, 1, 5), max_epochs=3).fit(Net(), loader())
    assert recorder.events == pairs(0, 1, 5, 9)  # at 5 both agree: one boundary


def test_by_hand_from_inside_a_hook_is_not_lost() -> None:
    tracker, recorder = recorded()

    class Again(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            if task == 0:
                tracker.new_task()

    make_trainer(tracker, recorder, Again()).fit(Net(), loader())
    assert recorder.events == pairs(0, 1, 3)


def test_schedule_of_the_users_own() -> None:
    class Odd(TaskSchedule):
        ends_with_fit = True

        def label(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
            return np.int64(trainer.current_epoch % 2)

    tracker, recorder = recorded(Odd())
    make_trainer(tracker, recorder, max_epochs=3).fit(Net(), loader())
    assert recorder.events == pairs(0, 3, 6, 9)
    assert type(tracker.state_dict()["label"]) is int


# --- the end of a fit ---


@pytest.mark.parametrize(
    ("schedule", "expected"), [(EveryNEpochs(2), pairs(0, 6, 12)), (EveryNSteps(4), pairs(0, 4, 8, 12))]
)
def test_counted_tasks_go_on_over_fits(schedule: TaskSchedule, expected: list[Event]) -> None:
    tracker, recorder = recorded(schedule)
    net = Net()
    for _ in range(4):
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == expected


def test_counted_task_left_unfinished() -> None:
    for ends_with_fit in (False, True):
        for schedule in (EveryNEpochs(2, ends_with_fit=ends_with_fit), EveryNSteps(6, ends_with_fit=ends_with_fit)):
            tracker, recorder = recorded(schedule)
            make_trainer(tracker, recorder, max_epochs=3).fit(Net(), loader())
            assert recorder.events == (pairs(0, 6, 9) if ends_with_fit else pairs(0, 6, 9)[:-1])
            assert tracker.in_task is not ends_with_fit


@pytest.mark.parametrize("schedule", [EveryNEpochs(1), EveryNSteps(3), EveryFit(), EveryNSteps(3, ends_with_fit=True)])
def test_task_that_fills_the_fit_ends_once(schedule: TaskSchedule) -> None:
    _, recorder = recorded(schedule)
    make_trainer(recorder.tracker, recorder).fit(Net(), loader())
    assert recorder.events == pairs(0, 3)


@pytest.mark.parametrize("schedule", [None, EveryNEpochs(5), EveryNSteps(50)])
def test_fast_dev_run_shows_both_hooks(schedule: TaskSchedule | None) -> None:
    _, recorder = recorded(schedule)
    make_trainer(recorder.tracker, recorder, fast_dev_run=True).fit(Net(), loader(), loader())
    assert recorder.events == pairs(0, 1)


def test_limited_batches_and_sanity_check() -> None:
    tracker, recorder = recorded(EveryNEpochs(1))

    class SanityCheck(L.Callback):
        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert tracker.task == -1
            assert recorder.events == []

    trainer = make_trainer(
        tracker, recorder, SanityCheck(), max_epochs=2, limit_train_batches=2, num_sanity_val_steps=2
    )
    trainer.fit(Net(), loader(), loader())
    assert recorder.events == pairs(0, 2, 4)


# --- what the hooks see ---


def test_order_callbacks_module_datamodule() -> None:
    calls: list[tuple[str, str, int]] = []

    def noting(name: str, base: type) -> Any:
        def start(self: Any, trainer: Any, pl_module: Any, task: int) -> None:
            assert trainer.lightning_module is pl_module
            calls.append((name, "start", task))

        def end(self: Any, trainer: Any, pl_module: Any, task: int) -> None:
            calls.append((name, "end", task))

        return type(name, (base,), {"on_task_start": start, "on_task_end": end})()

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    # The tracker moves to the front; the others keep their order, a callback without the hooks is passed over.
    callbacks = [noting("first", L.Callback), L.Callback(), TaskTracker(), noting("second", L.Callback)]
    make_trainer(*callbacks).fit(noting("module", Net), datamodule=noting("data", Data))
    names = ["first", "second", "module", "data"]
    assert calls == [(name, "start", 0) for name in names] + [(name, "end", 0) for name in names]


def test_first_batch_is_there_and_no_weight_has_changed() -> None:
    tracker = TaskTracker(EveryNSteps(2))
    seen: dict[str, list[Any]] = {"batch": [], "start": [], "end": []}

    class Look(L.Callback):
        """Before the tracker in the list on purpose: it is moved to the front."""

        def on_task_start(self, trainer: L.Trainer, pl_module: Net, task: int) -> None:
            assert tracker.first_batch is not None
            seen["batch"].append(tracker.first_batch[0].clone())
            seen["start"].append(pl_module.net.weight.detach().clone())

        def on_task_end(self, trainer: L.Trainer, pl_module: Net, task: int) -> None:
            seen["end"].append(pl_module.net.weight.detach().clone())

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert tracker.in_task
            assert tracker.first_batch is None

    net = Net()
    initial = net.net.weight.detach().clone()
    make_trainer(Look(), tracker, limit_train_batches=2, max_epochs=2).fit(net, loader())
    (data,) = loader().dataset.tensors
    assert all(torch.equal(batch, data[:2]) for batch in seen["batch"])
    assert len(seen["batch"]) == 2
    assert torch.equal(seen["start"][0], initial)
    assert torch.equal(seen["end"][0], seen["start"][1])
    assert torch.equal(seen["end"][1], net.net.weight)
    assert not torch.equal(seen["start"][0], seen["end"][0])


def test_first_batch_is_let_go_when_a_hook_raises() -> None:
    class Raises(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            raise CutError

    tracker = TaskTracker()
    with pytest.raises(CutError):
        make_trainer(tracker, Raises()).fit(Net(), loader())
    assert tracker.first_batch is None


def test_training_is_untouched_by_the_tracker() -> None:
    weights = []
    for callbacks in ([], [TaskTracker(EveryNSteps(2))]):
        torch.manual_seed(0)
        net = Net()
        make_trainer(*callbacks, max_epochs=2).fit(net, loader())
        weights.append(net.net.weight.detach())
    assert torch.equal(*weights)


def test_nothing_of_the_trainer_is_kept() -> None:
    tracker = TaskTracker()
    make_trainer(tracker).fit(Net(), loader())
    assert not any(isinstance(value, (L.Trainer, L.LightningModule)) for value in vars(tracker).values())
    assert pickle.loads(pickle.dumps(tracker)).step == 3
    with pytest.raises(CutError):
        make_trainer(tracker, CutAt(1)).fit(Net(), loader())
    assert not any(isinstance(value, L.Trainer) for value in vars(tracker).values())
    assert tracker.step == 4


# --- resuming ---


class SaveAndCut(Checkpoint):
    """Saves a checkpoint in the given hook after the given step, and ends the run there."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.hook, self.at, self.path = hook, step, path

    def _act(self, hook: str, trainer: L.Trainer) -> None:
        if (hook, trainer.global_step) == (self.hook, self.at) and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise CutError

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("batch_start", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("batch_end", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("validation_end", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("epoch_end", trainer)

    def on_task_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("task_start", trainer)

    def on_task_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._act("task_end", trainer)


class Run:
    """Two tasks before and one after the interruption: fits and schedule that make the same boundaries every time."""

    def __init__(self, schedule: Callable[[], TaskSchedule | None], net: type[Net] = Net, **settings: Any) -> None:
        self.schedule, self.net, self.settings = schedule, net, {"max_epochs": 4, **settings}

    def new(self, tracker: TaskTracker, *callbacks: L.Callback, ckpt_path: Path | None = None) -> None:
        by_hand = ByHand(tracker, 5, 8)
        hands = [by_hand] if type(tracker.schedule) is TaskSchedule else []
        trainer = make_trainer(tracker, *hands, *callbacks, **self.settings)
        trainer.fit(self.net(), loader(), loader(), ckpt_path=ckpt_path)


RUNS = {
    "fit": Run(EveryFit),
    "epochs": Run(lambda: EveryNEpochs(2)),
    "one epoch": Run(lambda: EveryNEpochs(1)),
    "steps": Run(lambda: EveryNSteps(4)),
    "accumulated": Run(lambda: EveryNSteps(3), accumulate_grad_batches=2, max_epochs=6),
    "attribute": Run(lambda: None, net=PrivateIdNet),
    "hand": Run(TaskSchedule),
    "max_steps": Run(lambda: EveryNEpochs(2), max_steps=12, max_epochs=-1),
}
PLACES = [
    ("batch_end", 2),
    ("batch_end", 4),  # the end of a counted task
    ("batch_end", 5),  # a boundary asked for by hand is pending
    ("batch_end", 6),  # the last batch of an epoch: the resumed run never ends that epoch
    ("batch_end", 7),
    ("batch_start", 6),
    ("batch_start", 7),
    ("validation_end", 6),
    ("epoch_end", 3),
    ("epoch_end", 6),
    ("epoch_end", 9),
]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[Event]]:
    events = {}
    for name, run in RUNS.items():
        tracker, recorder = recorded(run.schedule())
        run.new(tracker, recorder)
        events[name] = recorder.events
    return events


def test_uninterrupted_runs(uninterrupted: dict[str, list[Event]]) -> None:
    assert uninterrupted == {
        "fit": pairs(0, 12),
        "epochs": pairs(0, 6, 12),
        "one epoch": pairs(0, 3, 6, 9, 12),
        "steps": pairs(0, 4, 8, 12),
        "accumulated": pairs(0, 3, 6, 9, 12),
        "attribute": pairs(0, 2, 4, 6, 8, 10, 12),
        "hand": pairs(0, 5, 8, 12)[:-1],
        "max_steps": pairs(0, 6, 12),
    }


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_neither_repeats_nor_skips_a_boundary(
    name: str, place: tuple[str, int], uninterrupted: dict[str, list[Event]], tmp_path: Path
) -> None:
    hook, step = place
    run, path = RUNS[name], tmp_path / "cut.ckpt"
    tracker, recorder = recorded(run.schedule())
    try:
        run.new(tracker, recorder, SaveAndCut(hook, step, path))
    except CutError:
        pass
    else:
        assert (name, hook) == ("accumulated", "epoch_end") or pytest.fail("the place was not reached")
        return  # odd steps are no epoch's end there
    resumed_tracker, resumed = recorded(run.schedule())
    run.new(resumed_tracker, resumed, ckpt_path=path)
    assert recorder.events + resumed.events == uninterrupted[name]
    assert resumed_tracker.step == 12


@pytest.mark.parametrize(("name", "step"), [("epochs", 6), ("steps", 8), ("attribute", 4), ("hand", 5)])
@pytest.mark.parametrize("hook", ["task_start", "task_end"])
def test_checkpoint_made_in_our_hooks(
    name: str, step: int, hook: str, uninterrupted: dict[str, list[Event]], tmp_path: Path
) -> None:
    run, path = RUNS[name], tmp_path / "cut.ckpt"
    tracker, recorder = recorded(run.schedule())
    with pytest.raises(CutError):
        run.new(tracker, recorder, SaveAndCut(hook, step, path))
    resumed_tracker, resumed = recorded(run.schedule())
    run.new(resumed_tracker, resumed, ckpt_path=path)
    assert recorder.events + resumed.events == uninterrupted[name]


def test_repeated_epoch_end_does_not_count_twice(tmp_path: Path) -> None:
    # Lightning, given max_steps, no validation and a checkpoint from an epoch's end, trains one more batch and ends
    # the same epoch again. The tasks after it must still be one whole epoch long.
    path = tmp_path / "cut.ckpt"
    settings = {"max_steps": 10, "max_epochs": -1}
    tracker, recorder = recorded(EveryNEpochs(1))
    with pytest.raises(CutError):
        make_trainer(tracker, recorder, SaveAndCut("epoch_end", 3, path), **settings).fit(Net(), loader())
    tracker, resumed = recorded(EveryNEpochs(1))
    make_trainer(tracker, resumed, **settings).fit(Net(), loader(), ckpt_path=path)
    assert recorder.events == pairs(0, 3)
    assert [event for event, *_ in resumed.events] == ["start", "end"] * 2
    assert [task for _, task, _ in resumed.events] == [1, 1, 2, 2]
    assert min(steps for steps, _ in resumed.lengths) >= BATCHES


@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_resume_in_the_second_fit(when: dict[str, int], tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **when)

    net = Net()
    tracker, recorder = recorded()
    make_trainer(tracker, recorder).fit(net, loader())
    with pytest.raises(CutError):
        make_trainer(tracker, recorder, saver(), CutAt(4), max_epochs=3).fit(net, loader())
    (path,) = tmp_path.glob("step=4.ckpt") if "every_n_train_steps" in when else tmp_path.glob("step=3.ckpt")
    resumed_tracker, resumed = recorded()
    make_trainer(resumed_tracker, resumed, saver(), max_epochs=3).fit(Net(), loader(), ckpt_path=path)
    make_trainer(resumed_tracker, resumed).fit(Net(), loader())
    assert recorder.events + resumed.events == pairs(0, 3, 12, 15)
    assert resumed.lengths == [(9, 3), (3, 1)]


@pytest.mark.parametrize("at", ["batch", "epoch"])
def test_checkpoint_holds_the_right_step_whatever_the_order(at: str, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if at == "batch":
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if at == "epoch":
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    tracker = TaskTracker(EveryNSteps(4))
    trainer = make_trainer(Save(), max_epochs=2)
    trainer.callbacks.append(tracker)
    tracker.setup = lambda *_, **__: None  # type: ignore[method-assign]  # stay behind the callback that saves
    trainer.fit(Net(), loader())
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == (6 if at == "batch" else 2)
    for path in paths:
        state = torch.load(path, weights_only=True)["callbacks"]["TaskTracker"]
        assert state["step"] == int(path.stem)


def test_a_boundary_that_the_checkpoint_just_missed_is_made_up_for(tmp_path: Path) -> None:
    class SaveFirst(SaveAndCut):
        """Saves before the tracker's own hook has run."""

    tracker, recorder = recorded(EveryNSteps(4))
    trainer = make_trainer(recorder, max_epochs=3)
    saver = SaveFirst("batch_end", 4, tmp_path / "cut.ckpt")
    trainer.callbacks[:] = [saver, tracker, recorder]
    tracker.setup = lambda *_, **__: None  # type: ignore[method-assign]
    with pytest.raises(CutError):
        trainer.fit(Net(), loader())
    resumed_tracker, resumed = recorded(EveryNSteps(4))
    make_trainer(resumed_tracker, resumed, max_epochs=3).fit(Net(), loader(), ckpt_path=saver.path)
    assert recorder.events + resumed.events == pairs(0, 4, 8, 9)[:-1]


def test_resumed_in_the_same_objects(tmp_path: Path) -> None:
    tracker, recorder = recorded(EveryNSteps(4))
    with pytest.raises(CutError):
        make_trainer(tracker, recorder, SaveAndCut("epoch_end", 6, tmp_path / "a.ckpt"), max_epochs=4).fit(
            Net(), loader()
        )
    make_trainer(tracker, recorder, max_epochs=4).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert recorder.events == pairs(0, 4, 8, 12)


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_resume_from_a_checkpoint_made_on_an_exception(tmp_path: Path) -> None:
    tracker, recorder = recorded()
    with pytest.raises(CutError):
        make_trainer(tracker, recorder, CutAt(4), OnExceptionCheckpoint(tmp_path), max_epochs=3).fit(Net(), loader())
    resumed_tracker, resumed = recorded()
    make_trainer(resumed_tracker, resumed, max_epochs=3).fit(Net(), loader(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert recorder.events + resumed.events == pairs(0, 9)


def test_checkpoint_between_tasks_resumes_with_the_next_start(tmp_path: Path) -> None:
    tracker, recorder = recorded()
    trainer = make_trainer(tracker, recorder)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed_tracker, resumed = recorded()
    make_trainer(resumed_tracker, resumed, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.events == [("start", 1, 3), ("end", 1, 6)]


def test_resumed_fit_with_nothing_left_to_train_does_not_make_the_next_one_a_resume(tmp_path: Path) -> None:
    with pytest.raises(CutError):
        make_trainer(TaskTracker(), SaveAndCut("epoch_end", 3, tmp_path / "a.ckpt")).fit(Net(), loader())
    tracker, recorder = recorded()
    with pytest.warns(UserWarning, match="already reached max_epochs=1"):
        make_trainer(tracker, recorder).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    make_trainer(tracker, recorder).fit(Net(), loader())
    assert recorder.events == [("start", 1, 3), ("end", 1, 6)]


def test_checkpoint_without_a_tracker_counts_on_from_its_step(tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for fits_before, expected in ((0, [("start", 0, 6), ("end", 0, 9)]), (1, pairs(0, 3, 6))):
        tracker, recorder = recorded()
        for _ in range(fits_before):
            make_trainer(tracker, recorder).fit(Net(), loader())
        make_trainer(tracker, recorder, max_epochs=3).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
        assert recorder.events == expected


def test_evaluating_a_checkpoint_does_not_turn_the_counters_back(tmp_path: Path) -> None:
    tracker, recorder = recorded()
    seen: list[int] = []

    class See(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(tracker.task)

    net = Net()
    for task in range(3):
        trainer = make_trainer(tracker, recorder, See())
        trainer.fit(net, loader())
        trainer.save_checkpoint(tmp_path / f"{task}.ckpt")
    make_trainer(tracker, recorder, See()).validate(net, loader(), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    assert seen == [0]
    assert (tracker.task, tracker.step) == (2, 9)
    make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == pairs(0, 3, 6, 9, 12)


def test_learning_rate_finder_in_a_later_fit() -> None:
    # It saves and restores a checkpoint before the fit proper: that is not a resume.
    net = Net()
    net.lr = 0.1
    tracker, recorder = recorded()
    make_trainer(tracker, recorder).fit(net, loader())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finder = LearningRateFinder(num_training_steps=4)
        make_trainer(tracker, recorder, finder, max_epochs=2).fit(net, loader())
    assert recorder.events == pairs(0, 3, 9)


def test_state_is_plain_and_survives_the_default_load(tmp_path: Path) -> None:
    net = Net()
    net.task_id = np.float64(1.5)
    tracker = TaskTracker()
    trainer = make_trainer(tracker)
    trainer.fit(net, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["TaskTracker"]
    assert state == tracker.state_dict()
    assert {type(value) for value in state.values()} == {int, bool, float}


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, None),
        (True, True),
        ("a", "a"),
        (np.int64(3), 3),
        (np.str_("b"), "b"),
        (torch.tensor(2), 2),
        (torch.tensor([2, 3]), "tensor([2, 3])"),
        ((1, 2), "(1, 2)"),
    ],
)
def test_plain_label(value: Any, label: Any) -> None:
    assert plain_label(value) == label
    assert type(plain_label(value)) is type(label)


# --- fits that train nothing, fits that are cut ---


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_second_fit_that_trains_nothing_warns_once() -> None:
    tracker, recorder = recorded()
    net, trainer = Net(), make_trainer(tracker, recorder, max_epochs=3)
    trainer.fit(net, loader())
    with pytest.warns(
        UserWarning, match=r"already reached max_epochs=3\. .*raise trainer\.fit_loop\.max_epochs"
    ) as record:
        trainer.fit(net, loader())
    assert sum("without a training step" in str(warning.message) for warning in record) == 1
    trainer.fit(net, loader())  # once is enough
    trainer.fit_loop.max_epochs += 1
    trainer.fit(net, loader())
    assert recorder.events == pairs(0, 9, 12)


def test_reached_max_steps_is_told_apart() -> None:
    net, trainer = Net(), make_trainer(TaskTracker(), max_steps=2, max_epochs=-1)
    trainer.fit(net, loader())
    with pytest.warns(UserWarning, match=r"reached max_steps=2\. .*raise trainer\.fit_loop\.epoch_loop\.max_steps"):
        trainer.fit(net, loader())


def test_no_batches_are_told_apart() -> None:
    with pytest.warns(UserWarning, match="limit_train_batches=0 leaves no training batch"):
        make_trainer(TaskTracker(), limit_train_batches=0).fit(Net(), loader())
    with pytest.warns(UserWarning, match="the training dataloader yielded no batch"):
        make_trainer(TaskTracker()).fit(Net(), DataLoader(Nothing()))
    too_small = DataLoader(TensorDataset(torch.ones(2, 2)), batch_size=4, drop_last=True)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make_trainer(TaskTracker()).fit(Net(), too_small)
    assert any(
        "fit ended without a training step: the training dataloader has no batches" in str(w.message) for w in record
    )


def test_epochs_without_a_batch_do_not_disturb_the_count() -> None:
    tracker, recorder = recorded(EveryNEpochs(2))
    with pytest.warns(UserWarning, match="yielded no batch"):
        make_trainer(tracker, recorder, max_epochs=3).fit(Net(), DataLoader(Nothing()))
    make_trainer(tracker, recorder, max_epochs=4).fit(Net(), loader())
    assert recorder.events == pairs(0, 6, 12)


def test_stop_before_the_first_batch_is_told_apart() -> None:
    class Stop(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"told to stop before the first batch \(trainer.should_stop\)"):
        make_trainer(TaskTracker(), Stop(), min_epochs=None).fit(Net(), loader())


def test_no_warning_otherwise() -> None:
    # Warnings are errors in these tests.
    tracker = TaskTracker()
    net, trainer = Net(), make_trainer(tracker, Timer(duration={"hours": 1}))
    trainer.validate(net, loader(), verbose=False)
    trainer.test(net, loader(), verbose=False)
    trainer.predict(net, loader(), return_predictions=False)
    trainer.fit(net, loader(), loader())
    trainer.validate(net, loader(), verbose=False)
    with pytest.raises(CutError):
        make_trainer(tracker, CutAt(0)).fit(net, loader())

    class CutInSanityCheck(L.Callback):
        def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise CutError

    with pytest.raises(CutError):
        make_trainer(tracker, CutInSanityCheck()).fit(net, loader(), loader())


def test_fit_after_a_cut_one() -> None:
    expected = {
        "fit": [("start", 0, 0), ("start", 1, 2), ("end", 1, 5)],  # no end for the task that was cut
        "steps": [("start", 0, 0), ("end", 0, 4), ("start", 1, 4)],
        "attribute": [("start", 0, 0), ("end", 0, 5)],
    }
    for name, schedule in (("fit", EveryFit()), ("steps", EveryNSteps(4)), ("attribute", TaskAttribute())):
        tracker, recorder = recorded(schedule)
        net = Net()
        net.task_id = 0
        with pytest.raises(CutError):
            make_trainer(tracker, recorder, CutAt(2)).fit(net, loader())
        assert tracker.in_task
        make_trainer(tracker, recorder).fit(net, loader())
        assert recorder.events == expected[name]


def test_keyboard_interrupt() -> None:
    class Interrupt(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    tracker, recorder = recorded()
    with pytest.raises(SystemExit):
        make_trainer(tracker, recorder, Interrupt()).fit(Net(), loader())
    make_trainer(tracker, recorder).fit(Net(), loader())
    assert recorder.events == [("start", 0, 0), ("start", 1, 1), ("end", 1, 4)]


# --- attaching ---


class NeedsTasks(L.Callback):
    """What our monitors do."""

    def __init__(self) -> None:
        self.tracker: TaskTracker | None = None
        self.tasks: list[int] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.tracker = TaskTracker.attach(trainer, self.tracker)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.tasks.append(task)


class OtherNeedsTasks(NeedsTasks):
    pass


def test_monitors_share_one_tracker_over_trainers() -> None:
    monitors = [NeedsTasks(), OtherNeedsTasks()]
    net = Net()
    for _ in range(2):
        trainer = make_trainer(*monitors)
        trainer.fit(net, loader())
        assert [type(callback) for callback in trainer.callbacks] == [TaskTracker, NeedsTasks, OtherNeedsTasks]
    assert monitors[0].tracker is monitors[1].tracker is trainer.callbacks[0]
    assert monitors[0].tasks == monitors[1].tasks == [0, 1]
    assert monitors[0].tracker.step == 6


def test_monitors_take_the_users_tracker(tmp_path: Path) -> None:
    tracker = TaskTracker(EveryNSteps(2))
    monitor = NeedsTasks()
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(monitor, checkpoint, tracker)
    trainer.fit(Net(), loader())
    assert monitor.tracker is tracker
    assert trainer.callbacks == [tracker, monitor, checkpoint]
    assert monitor.tasks == [0, 1]


def test_attached_tracker_is_saved_and_resumed(tmp_path: Path) -> None:
    trainer = make_trainer(NeedsTasks())
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    monitor = NeedsTasks()
    make_trainer(monitor, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert monitor.tasks == [1]


def test_attach_does_not_change_the_list_in_place() -> None:
    trainer = make_trainer(L.Callback())
    before = trainer.callbacks
    tracker = TaskTracker.attach(trainer)
    assert len(before) == 1
    assert trainer.callbacks == [tracker, *before]
    assert TaskTracker.attach(trainer, TaskTracker()) is tracker
    assert len(trainer.callbacks) == 2


def test_two_trackers_are_refused() -> None:
    class Mine(TaskTracker):
        pass

    trainer = make_trainer(TaskTracker(), Mine())
    with pytest.raises(ValueError, match="has 2 TaskTrackers, expected at most one; keep one"):
        trainer.fit(Net(), loader())


# --- arguments ---


@pytest.mark.parametrize("schedule", [EveryNEpochs, EveryNSteps])
def test_bad_lengths(schedule: Callable[[Any], TaskSchedule]) -> None:
    for n in (0, -3):
        with pytest.raises(ValueError, match=rf"got n={n}; .*pass n >= 1"):
            schedule(n)
    for other in (1.0, "2", True, None):
        with pytest.raises(TypeError, match=r"got n=.*pass a whole number"):
            schedule(other)


def test_bad_names_and_schedules() -> None:
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="pass the name of an attribute"):
            TaskAttribute(name)  # type: ignore[arg-type]
    for schedule in (EveryFit, 3, "EveryFit"):
        with pytest.raises(TypeError, match="pass an instance of a TaskSchedule"):
            TaskTracker(schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arguments"), [("EveryNEpochs", {"n": 3}), ("EveryNSteps", {"n": 7}), ("TaskAttribute", {"name": "x"})]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has a new name in new versions
def test_arguments_come_from_a_config_file(name: str, arguments: dict[str, Any]) -> None:
    schedule = {"class_path": f"{EveryNEpochs.__module__}.{name}", "init_args": arguments}
    config = {"class_path": f"{TaskTracker.__module__}.TaskTracker", "init_args": {"schedule": schedule}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)  # as LightningCLI does for the Trainer's callbacks
    tracker = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert type(tracker.schedule).__name__ == name
    assert {key: getattr(tracker.schedule, key) for key in arguments} == arguments
