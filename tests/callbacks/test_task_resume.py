"""A resumed run neither repeats nor skips a boundary, wherever its checkpoint was made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from task_runs import (
    BATCHES,
    FILTERS,
    ByHand,
    CutAt,
    CutError,
    Event,
    Net,
    PrivateIdNet,
    loader,
    make_trainer,
    pairs,
    recorded,
)

from lightning_plasticity.callbacks.schedules import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    TaskSchedule,
    plain_label,
)
from lightning_plasticity.callbacks.task_tracker import TaskTracker

pytestmark = FILTERS

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


class Resumes(L.Callback):
    """Writes down when a task goes on, and on which batch."""

    def __init__(self, tracker: TaskTracker) -> None:
        self.tracker = tracker
        self.seen: list[tuple[int, int, float]] = []

    def on_task_resume(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        self.seen.append((task, self.tracker.step, float(self.tracker.first_batch[0][0, 0])))


def test_a_fit_that_goes_on_inside_a_task_says_so_once(tmp_path: Path) -> None:
    cut = TaskTracker(EveryNSteps(4))
    with pytest.raises(CutError):
        make_trainer(cut, SaveAndCut("batch_end", 2, tmp_path / "cut.ckpt"), max_epochs=2).fit(Net(), loader())
    tracker = TaskTracker(EveryNSteps(4))
    resumes = Resumes(tracker)
    make_trainer(tracker, resumes, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "cut.ckpt")
    assert resumes.seen == [(0, 2, 0.0)]  # Lightning starts such a loader anew


def test_a_task_longer_than_a_fit_goes_on_in_the_next_and_a_new_task_does_not() -> None:
    tracker = TaskTracker(EveryNSteps(4))
    resumes = Resumes(tracker)
    for _ in range(2):
        make_trainer(tracker, resumes, max_epochs=1).fit(Net(), loader())
    assert resumes.seen == [(0, 3, 0.0)]
    assert tracker.task == 1
    assert tracker.first_batch is None
