"""Fits that train nothing or are cut, trackers that are shared, arguments of schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from task_runs import (
    FILTERS,
    CutAt,
    CutError,
    Net,
    loader,
    make_trainer,
    pairs,
    recorded,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_plasticity.callbacks.schedules import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    TaskAttribute,
    TaskSchedule,
)
from lightning_plasticity.callbacks.task_tracker import TaskTracker

pytestmark = FILTERS

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
