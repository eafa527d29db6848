"""Boundaries between tasks: where they fall, in which order they are told, what the hooks see."""

from __future__ import annotations

import pickle
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from task_runs import (
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
from torch.utils.data import DataLoader

from lightning_plasticity.callbacks.schedules import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    TaskAttribute,
    TaskSchedule,
)
from lightning_plasticity.callbacks.task_tracker import TaskTracker

pytestmark = FILTERS

# --- where the boundaries fall ---


def test_new_trainer_per_task() -> None:
    tracker, recorder = recorded()
    net = Net()
    for _ in range(3):
        make_trainer(tracker, recorder).fit(net, loader())
    assert recorder.events == pairs(0, 3, 6, 9)
    assert recorder.lengths == [(3, 1)] * 3
    assert (tracker.task, tracker.step, tracker.in_task) == (2, 9, False)


def test_trackers_made_anew_for_each_task_are_told() -> None:
    net = Net()
    make_trainer(TaskTracker()).fit(net, loader())
    with pytest.warns(UserWarning, match=r"followed through 1 task\(s\) by other callbacks.*make the callbacks once"):
        make_trainer(TaskTracker()).fit(net, loader())
    make_trainer(TaskTracker()).fit(Net(), loader())  # another module: warnings are errors here


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


@pytest.mark.parametrize("schedule", [lambda: None, TaskAttribute], ids=["default", "attribute"])
@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
@pytest.mark.parametrize("on", ["module", "datamodule"])
def test_a_property_that_raises_is_told_once_and_marks_no_tasks(schedule: Any, error: type, on: str) -> None:
    def task_id(self: Any) -> int:
        raise error("not yet")

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    broken = {"task_id": property(task_id)}
    net = type("Broken", (Net,), broken if on == "module" else {})()
    datamodule = type("BrokenData", (Data,), broken if on == "datamodule" else {})()
    tracker, recorder = recorded(schedule())
    with pytest.warns(UserWarning, match=rf"Broken.*\.task_id raised {error.__name__}") as found:
        make_trainer(tracker, recorder, max_epochs=2).fit(net, datamodule=datamodule)
    assert len([warning for warning in found if "task_id raised" in str(warning.message)]) == 1
    make_trainer(tracker, recorder, max_epochs=2).fit(net, datamodule=datamodule)  # another warning would be an error
    assert recorder.events == pairs(0, 6, 12)


def test_a_private_attribute_serves_where_the_property_raises() -> None:
    class Broken(PrivateIdNet):
        @property
        def task_id(self) -> int:
            raise RuntimeError

    tracker, recorder = recorded(TaskAttribute())
    with pytest.warns(UserWarning, match=r"Broken\.task_id raised RuntimeError"):
        make_trainer(tracker, recorder, max_epochs=2).fit(Broken(), loader())
    assert recorder.events == pairs(0, 2, 4, 6)


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


def test_callbacks_that_update_weights_act_before_the_tracker_and_hear_of_tasks_last() -> None:
    calls: list[str] = []

    class Heard(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            calls.append(f"{type(self).__name__} batch")

        def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
            calls.append(f"{type(self).__name__} task")

    class Watching(Heard):
        pass

    class Updating(Heard):
        updates_weights = True

    make_trainer(Watching(), TaskTracker(EveryNSteps(1)), Updating(), limit_train_batches=1).fit(Net(), loader())
    assert calls == ["Updating batch", "Watching task", "Updating task", "Watching batch"]


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


# --- methods that only share a hook's name ---


def test_a_method_of_another_signature_is_left_alone_and_named_once() -> None:
    called = []

    class Own(Net):
        def on_task_start(self) -> None:
            called.append("start")

        def on_task_end(self, task_id: int) -> None:
            called.append("end")

    class Foreign(L.Callback):
        def on_task_end(self, trainer: Any, pl_module: Any, task: int, *, needed: int) -> None:
            called.append("foreign")

    tracker, recorder = recorded(EveryNEpochs(1))
    with pytest.warns(UserWarning, match="left alone") as caught:
        make_trainer(Foreign(), tracker, recorder, max_epochs=2).fit(Own(), loader())
    assert called == []
    assert recorder.events == pairs(0, 3, 6)
    said = [str(entry.message) for entry in caught if "left alone" in str(entry.message)]
    assert len(said) == 3
    assert "Own has a method on_task_start()" in said[0]
    assert "Foreign has a method on_task_end(trainer: 'Any', pl_module: 'Any', task: 'int', *, needed" in said[1]
    assert "Own has a method on_task_end(task_id: 'int') -> 'None', which cannot be called with (trainer" in said[2]
    assert "define on_task_end(self, trainer, pl_module, task)" in said[2]
