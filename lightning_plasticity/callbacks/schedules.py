"""Where one task ends and the next begins; ``task_tracker.py`` asks at the right moments and tells everybody."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.warn_once import WarnOnce

__all__ = ["EveryFit", "EveryNEpochs", "EveryNSteps", "TaskAttribute", "TaskSchedule", "find_attribute", "plain_label"]

_MISSING = object()


class TaskSchedule:
    """Base of all schedules; by itself it marks no boundary, which leaves them all to ``TaskTracker.new_task()``.

    For boundaries of your own override one of the two methods. Both are called at every training batch, so keep them
    cheap, and on all ranks, so let them give the same answer everywhere.

    Attributes:
        starts_with_fit: whether each ``fit`` begins a new task, except one that resumes from a checkpoint.
        ends_with_fit: whether the end of a ``fit`` ends the task; else the task goes on in the next fit.
    """

    starts_with_fit: bool = False
    ends_with_fit: bool = False

    def is_over(self, steps: int, epochs: int) -> bool:
        """Whether a task is complete after so many optimizer steps and finished epochs of its own."""
        return False

    def label(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """What identifies the task of the batch that has just arrived; None says nothing, a new value is a new task."""
        return None


class EveryFit(TaskSchedule):
    """Each ``fit`` is a task: it starts with the first batch and ends when the fit ends."""

    starts_with_fit = True
    ends_with_fit = True


class EveryNEpochs(TaskSchedule):
    """A task lasts n epochs, counted from its first batch, over several fits if need be.

    Args:
        n: length of a task in epochs. The epoch in which a task begins counts as its first.
        ends_with_fit: end a task that the last fit leaves unfinished. By default it stays open: the next fit, or a
            resumed run with more epochs, finishes it.
    """

    def __init__(self, n: int, *, ends_with_fit: bool = False) -> None:
        self.n = _positive_int(n, "EveryNEpochs")
        self.ends_with_fit = ends_with_fit

    def is_over(self, steps: int, epochs: int) -> bool:
        """Whether n epochs are finished."""
        return epochs >= self.n


class EveryNSteps(TaskSchedule):
    """A task lasts n optimizer steps, over several fits if need be; under gradient accumulation a step is not a batch.

    Args:
        n: length of a task in optimizer steps, all optimizers together, as in ``trainer.global_step``.
        ends_with_fit: end a task that the last fit leaves unfinished. By default it stays open: the next fit, or a
            resumed run with more steps, finishes it.
    """

    def __init__(self, n: int, *, ends_with_fit: bool = False) -> None:
        self.n = _positive_int(n, "EveryNSteps")
        self.ends_with_fit = ends_with_fit

    def is_over(self, steps: int, epochs: int) -> bool:
        """Whether n steps are taken."""
        return steps >= self.n


class TaskAttribute(TaskSchedule):
    """A new value of an attribute of the module or the datamodule is a new task.

    The module is asked before the datamodule, and ``_task_id`` serves where ``task_id`` is missing. While the value is
    None the tasks are the fits; a property that raises counts as None, after a warning. A later fit with the same value
    continues the same task: it does not start again.

    The value is read when a batch has arrived, before the module's ``on_train_batch_start``. Set it earlier: between
    fits, in ``on_train_epoch_start``, or, for a stream, in ``on_after_batch_transfer`` of the batch it belongs to.

    Args:
        name: name of the attribute. Its values should be numbers or strings; others are compared by their ``repr``.
        ends_with_fit: end the task when the fit ends. Right where each task has its fit, or one fit has all tasks.
            With several fits to a task pass False: then a task ends when the next one begins, and the last stays open.
    """

    def __init__(self, name: str = "task_id", *, ends_with_fit: bool = True) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"TaskAttribute got name={name!r}; pass the name of an attribute, such as 'task_id'.")
        self.name = name
        self.ends_with_fit = ends_with_fit
        self._warn_once = WarnOnce("TaskAttribute")

    def label(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Value of the attribute.

        Raises:
            AttributeError: if neither the module nor the datamodule has the attribute.
        """
        value = find_attribute(trainer, pl_module, self.name, _MISSING, self._warn_once)
        if value is _MISSING:
            if self._warn_once:  # it is there, but cannot be read
                return None
            raise AttributeError(
                f"TaskAttribute(name={self.name!r}) found no attribute {self.name!r} on {_owners(trainer, pl_module)}; "
                "set it before the first training batch, or pass the name of an attribute that exists."
            )
        return value


def find_attribute(trainer: Trainer, pl_module: LightningModule, name: str, default: Any, warn_once: WarnOnce) -> Any:
    """Value of an attribute of the module, else of the datamodule, else the default; methods do not count.

    A property that raises counts as missing; it is warned of once.
    """
    names = ("task_id", "_task_id") if name == "task_id" else (name,)
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        for candidate in names:
            value = _read(owner, candidate, warn_once)
            if value is not _MISSING and not callable(value):
                return value
    return default


def _read(owner: Any, name: str, warn_once: WarnOnce) -> Any:
    try:
        return getattr(owner, name)
    except Exception as error:
        if isinstance(error, AttributeError) and not hasattr(type(owner), name):
            return _MISSING
        attribute = f"{type(owner).__name__}.{name}"
        warn_once(
            f"{attribute} raised {type(error).__name__}: {error}. As long as it does, it marks no tasks; let it "
            "return None where there is no task.",
            attribute,
        )
        return _MISSING


def plain_label(value: Any) -> Any:
    """Label as plain Python: a numpy number in a checkpoint would stop the default, weights-only, load."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        value = value.item()  # a tensor or a numpy number
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return repr(value)
    return value if type(value) in (bool, int, float, str) else repr(value)


def _owners(trainer: Trainer, pl_module: LightningModule) -> str:
    datamodule = getattr(trainer, "datamodule", None)
    module = f"the module ({type(pl_module).__name__})"
    return (
        f"{module}; there is no datamodule"
        if datamodule is None
        else f"{module} or datamodule ({type(datamodule).__name__})"
    )


def _positive_int(n: int, owner: str) -> int:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"{owner} got n={n!r} of type {type(n).__name__}; pass a whole number of at least 1.")
    if n < 1:
        raise ValueError(f"{owner} got n={n}; a task needs at least one, pass n >= 1.")
    return n
