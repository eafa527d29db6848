"""``TaskTracker``: the hooks at a task's start and end that Lightning lacks. The boundaries are in ``schedules.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.base import Callback
from lightning_plasticity.callbacks.live import FewHooks
from lightning_plasticity.callbacks.processes import exchange, several
from lightning_plasticity.callbacks.schedules import EveryFit, TaskAttribute, TaskSchedule, find_attribute, plain_label
from lightning_plasticity.callbacks.warn_once import WarnOnce

__all__ = ["TaskTracker"]

HOOK_ARGUMENTS = "(trainer, pl_module, task)"
# Of each module the last tracker, and how many tasks it has counted.
_followers: WeakKeyDictionary[LightningModule, tuple[ref[TaskTracker], int]] = WeakKeyDictionary()


@dataclass
class _State:
    """All that a checkpoint has to hold; plain Python only, so that the default load accepts it."""

    task: int = -1
    in_task: bool = False
    new_task: bool = False  # asked for by hand, not yet begun
    label: Any = None  # what the schedule called the task
    step: int = 0  # cumulative, as of the last time it was looked at
    epochs: int = 0  # cumulative, finished ones
    start_step: int = 0  # of the task
    start_epochs: int = 0
    step_offset: int = 0  # step - trainer.global_step
    epoch_offset: int = 0  # epochs - trainer.current_epoch


class TaskTracker(FewHooks):
    """Finds the boundaries between tasks and calls ``on_task_start`` and ``on_task_end``.

    Both hooks have the signature ``(trainer, pl_module, task)`` with the task's index from 0, and are called on every
    object that defines them: the callbacks in the order of ``trainer.callbacks``, those that update weights last, then
    the module, then the datamodule. Only resets at a task's start (``ShrinkAndPerturb``, ``LayerReset``) come first,
    so that monitors see the weights the task begins with. A method of such a name that cannot take these arguments is
    left alone, with a warning.

    - ``on_task_start``: the new task's first batch has arrived (it is ``tracker.first_batch`` during the hook) and no
      update has been made yet. Called from ``on_train_batch_start``.
    - ``on_task_end``: after the task's last update, while loggers and strategy live. Under ``EveryNSteps`` from
      ``on_train_batch_end``, under ``EveryNEpochs`` from ``on_train_epoch_end``. A boundary that only shows when the
      next task's batch is there (``TaskAttribute``, ``new_task()``) ends the old task right before the new one starts;
      the datamodule may then already serve the new data. In ``on_train_end`` Lightning refuses ``self.log``: write to
      ``trainer.loggers`` there.

    - ``on_task_resume``: a fit goes on inside a task, from a checkpoint or after an earlier fit; its first batch is
      ``tracker.first_batch`` during the hook.

    Starts and ends alternate; no task has two of either. When a fit ends, the open task ends with it (from
    ``on_train_end``), except under schedules that count, ``EveryNEpochs`` and ``EveryNSteps``: there the task goes on
    in the next fit until it is full. Their ``ends_with_fit`` changes this; ``fast_dev_run`` always ends the task.

    A fit cut by an exception leaves its task open. Under ``EveryFit`` the next fit starts a new task and the cut one
    gets no ``on_task_end``; under other schedules the task goes on. A run resumed by ``fit(ckpt_path=...)`` continues
    where the checkpoint was made, also inside a task and in a new process: no boundary is repeated or skipped.
    ``validate``, ``test`` and ``predict`` with a ``ckpt_path`` show the checkpoint's task while they run, no longer.

    A fit that ends without a training step gives a warning with the cause and what to do.

    Args:
        schedule: where the boundaries are. Default, chosen when a fit starts: ``TaskAttribute()`` if the module or the
            datamodule has a ``task_id`` or ``_task_id`` other than None, else ``EveryFit()``.

    Attributes:
        first_batch: the batch that has just arrived during ``on_task_start`` and ``on_task_resume``, else None.

    Example:
        >>> from lightning_plasticity.callbacks.schedules import EveryNEpochs
        >>> tracker = TaskTracker(EveryNEpochs(10))
        >>> tracker.task, tracker.in_task
        (-1, False)
    """

    def __init__(self, schedule: TaskSchedule | None = None) -> None:
        super().__init__()
        if schedule is not None and not isinstance(schedule, TaskSchedule):
            raise TypeError(
                f"TaskTracker got schedule={schedule!r}; pass an instance of a TaskSchedule, such as EveryNEpochs(10), "
                "or None for the default."
            )
        self.schedule = schedule
        self.first_batch: Any = None
        self._chosen = EveryFit() if schedule is None else schedule
        self._state = _State()
        self._set_aside: _State | None = None  # while an evaluation shows a checkpoint's state
        self._trainer: Trainer | None = None  # only while a fit trains, to read its counters
        self._resuming = False
        self._loop_entered = False
        self._saw_batch = False
        self._warn_once = WarnOnce("TaskTracker")

    @property
    def task(self) -> int:
        """Index of the current or last task; -1 before the first."""
        return self._state.task

    @property
    def in_task(self) -> bool:
        """Whether a task has started and not ended; already False during ``on_task_end``."""
        return self._state.in_task

    @property
    def step(self) -> int:
        """Optimizer steps over all fits and Trainers; of a single Trainer the same as its ``global_step``."""
        return self._state.step if self._trainer is None else self._trainer.global_step + self._state.step_offset

    @property
    def steps_in_task(self) -> int:
        """Optimizer steps since the current or last task began."""
        return self.step - self._state.start_step

    @property
    def epochs_in_task(self) -> int:
        """Epochs finished since the current or last task began; the one it began in counts."""
        return self._state.epochs - self._state.start_epochs

    def new_task(self) -> None:
        """Mark a boundary by hand: the next training batch begins a new task, whatever the schedule says.

        Of several processes, all have to call it between the same batches.
        """
        self._state.new_task = True

    @staticmethod
    def attach(trainer: Trainer, own: TaskTracker | None = None) -> TaskTracker:
        """Return the Trainer's tracker; if it has none, give it ``own`` or a new default one.

        The tracker comes before the other callbacks, so that they find its counters up to date and its hooks fire
        before theirs; only callbacks with an attribute ``updates_weights = True`` stay before it, so that a task ends
        after their last update. Meant for the ``setup`` hook of callbacks that need tasks.

        Raises:
            ValueError: if the Trainer has several trackers.
        """
        callbacks = _callbacks(trainer)
        found = [callback for callback in callbacks if isinstance(callback, TaskTracker)]
        if len(found) > 1:
            raise ValueError(f"The Trainer has {len(found)} TaskTrackers, expected at most one; keep one of them.")
        if not found:
            found = [TaskTracker() if own is None else own]
        (tracker,) = found
        others = [callback for callback in callbacks if callback is not tracker]
        updating = [callback for callback in others if _updates_weights(callback)]
        watching = [callback for callback in others if not _updates_weights(callback)]
        # A new list, for Lightning may be iterating over the present one.
        _set_callbacks(trainer, [*updating, tracker, *watching])
        return tracker

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the front; not called when another callback's ``setup`` attached this tracker."""
        TaskTracker.attach(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the schedule, and drop a task that an interrupted fit left open if fits make the tasks."""
        self._loop_entered = self._saw_batch = False
        chosen = self.schedule
        self._chosen = _default_schedule(trainer, pl_module, self._warn_once) if chosen is None else chosen
        self._count_from(trainer)
        if self._chosen.starts_with_fit and not self._resuming:
            self._state.in_task = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the Trainer's counters; a resumed run has restored them only now."""
        self._count_from(trainer)
        self._trainer = trainer
        self._loop_entered = True
        self._count_epochs(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cross the boundary if this batch belongs to a new task."""
        first, self._saw_batch = not self._saw_batch, True
        label = plain_label(self._chosen.label(trainer, pl_module))
        if type(self._chosen).label is not TaskSchedule.label and several(trainer):
            # Labels may come from batches, and ranks have different ones: boundaries are where rank zero sees them.
            found = exchange(lambda: (label, self._state.new_task))
            label, self._state.new_task = found[0][0], any(asked for _, asked in found)
        if self._begins_task(label):
            if self._state.in_task:
                self._end(trainer, pl_module)
            self._start(trainer, pl_module, batch, label)
        elif first and self._state.in_task:
            self._call_with_batch("on_task_resume", trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the task if this was its last step."""
        self._end_if_over(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task if this was its last epoch."""
        self._count_epochs(trainer.current_epoch + 1)
        self._end_if_over(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task if it ends with the fit."""
        if self._state.in_task and (self._chosen.ends_with_fit or getattr(trainer, "fast_dev_run", False)):
            self._end(trainer, pl_module)
        self._let_go()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the fit trained nothing; not called when it was interrupted."""
        if self._saw_batch:
            return
        self._warn_once(f"fit ended without a training step: {_why_no_step(trainer, self._loop_entered)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the Trainer; the task stays open, for a checkpoint made now must be able to continue it."""
        self._clean_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the Trainer, and of a checkpoint's state that was loaded for an evaluation only."""
        self._clean_up()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note why a checkpoint is loaded: a fit resumes from it, an evaluation only borrows its state."""
        if trainer.state.fn == "fit":
            self._resuming = self.state_key in checkpoint["callbacks"]
        elif self._set_aside is None:
            self._set_aside = replace(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Counters and flags as of now, in plain Python."""
        return asdict(replace(self._state, step=self.step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self._state = _State(**state_dict)

    def _begins_task(self, label: Any) -> bool:
        state = self._state
        if state.new_task or label != state.label:
            return True
        if not state.in_task:
            # A label that stays the same over two fits is one task, although the first fit's end has ended it.
            return label is None or state.task < 0
        # True only after a resume from a checkpoint made in an epoch's last batch: Lightning skips that epoch's end.
        return self._chosen.is_over(self.steps_in_task, self.epochs_in_task)

    def _start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, label: Any) -> None:
        state = self._state
        state.task += 1
        if state.task == 0:
            self._warn_if_followed_before(pl_module)
        _followers[pl_module] = (ref(self), state.task + 1)
        state.in_task, state.new_task, state.label = True, False, label
        state.start_step, state.start_epochs = self.step, state.epochs
        self._call_with_batch("on_task_start", trainer, pl_module, batch)

    def _warn_if_followed_before(self, pl_module: LightningModule) -> None:
        tracker, tasks = _followers.get(pl_module, (None, 0))
        if tracker is not None and tracker() is not self:
            self._warn_once(
                f"This {type(pl_module).__name__} has been followed through {tasks} task(s) by other callbacks; with "
                "these ones tasks count from 0 again, so records of the same boundary replace each other, and an alert "
                "sees no past. In a loop over tasks make the callbacks once, before the loop. In a new run nothing is "
                "wrong."
            )

    def _call_with_batch(self, hook: str, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self.first_batch = batch
        try:
            self._call_hooks(hook, trainer, pl_module)
        finally:
            self.first_batch = None

    def _call_hooks(self, name: str, trainer: Trainer, pl_module: LightningModule) -> None:
        # Callbacks before the module is Lightning's own order.
        callbacks = sorted(_callbacks(trainer), key=partial(_turn, hook=name))
        for owner in (*callbacks, pl_module, getattr(trainer, "datamodule", None)):
            hook = getattr(owner, name, None)
            if not callable(hook):
                continue
            arguments = (trainer, pl_module, self._state.task)
            if (found := _other_signature(hook, arguments)) is None:
                hook(*arguments)
                continue
            self._warn_once(
                f"{type(owner).__name__} has a method {name}{found}, which cannot be called with {HOOK_ARGUMENTS} and "
                f"is left alone. If it is meant to hear of tasks, define {name}(self, trainer, pl_module, task); "
                "if it is not, give it another name."
            )

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the hooks, so that a run resumed from a checkpoint made in one of them does not end the task again.
        self._state.in_task = False
        self._call_hooks("on_task_end", trainer, pl_module)

    def _end_if_over(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._state.in_task and self._chosen.is_over(self.steps_in_task, self.epochs_in_task):
            self._end(trainer, pl_module)

    def _count_from(self, trainer: Trainer) -> None:
        """Join this Trainer's counters to ours; a checkpoint brings offsets that fit the counters it restores."""
        state = self._state
        untouched = state.task < 0 and state.step == 0 and state.epochs == 0
        if self._resuming or untouched:
            return
        state.step_offset = state.step - trainer.global_step
        state.epoch_offset = state.epochs - trainer.current_epoch

    def _count_epochs(self, finished: int) -> None:
        # From the Trainer's counter, not from the calls of on_train_epoch_end, which a resumed run may skip or repeat;
        # it may also be one behind after a resume, hence the maximum.
        self._state.epochs = max(self._state.epochs, finished + self._state.epoch_offset)

    def _let_go(self) -> None:
        self._state.step = self.step
        self._trainer = None

    def _clean_up(self) -> None:
        self._let_go()
        self._resuming = False
        if self._set_aside is not None:
            self._state, self._set_aside = self._set_aside, None


# The Trainer's class does not declare its ``callbacks``, hence the two functions with an untyped Trainer.
def _callbacks(trainer: Any) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def _set_callbacks(trainer: Any, callbacks: list[Callback]) -> None:
    trainer.callbacks = callbacks


def _updates_weights(callback: Callback) -> bool:
    return bool(getattr(callback, "updates_weights", False))


def _turn(callback: Callback, hook: str) -> int:
    """A task begins with what its resets leave, and monitors see that; what updates weights otherwise comes last."""
    if hook == "on_task_start" and getattr(callback, "resets_at_task_start", False):
        return -1
    return int(_updates_weights(callback))


def _default_schedule(trainer: Trainer, pl_module: LightningModule, warn_once: WarnOnce) -> TaskSchedule:
    return EveryFit() if find_attribute(trainer, pl_module, "task_id", None, warn_once) is None else TaskAttribute()


def _other_signature(hook: Callable[..., Any], arguments: tuple[Any, ...]) -> inspect.Signature | None:
    """The signature of a method that cannot take the arguments: a user's own, that happens to have a hook's name."""
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # written in C, or a class that says nothing
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return signature
    return None


def _why_no_step(trainer: Trainer, loop_entered: bool) -> str:
    """Cause and remedy, asked in the order in which Lightning's fit loop decides to skip training."""
    if loop_entered:
        return "the training dataloader yielded no batch. Check its dataset; an iterator may be used up."
    if trainer.limit_train_batches == 0:
        return "limit_train_batches=0 leaves no training batch. Raise it, or call validate instead of fit."
    if trainer.num_training_batches == 0:
        return (
            "the training dataloader has no batches. Check the dataset's length, limit_train_batches, and drop_last "
            "with a batch_size above that length."
        )
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return (
            f"this Trainer has already reached max_steps={trainer.max_steps}. For the next task use a new Trainer, "
            "or raise trainer.fit_loop.epoch_loop.max_steps before fit."
        )
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        return (
            f"this Trainer has already reached max_epochs={trainer.max_epochs}. For the next task use a new Trainer, "
            "or raise trainer.fit_loop.max_epochs before fit."
        )
    return (
        "the Trainer was told to stop before the first batch (trainer.should_stop). See what set it, such as a Timer."
    )
