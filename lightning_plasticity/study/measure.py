"""What a study writes down of each task: the online metric, the metric at the task's end, and what the monitors saw."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity.callbacks import TaskTracker
from lightning_plasticity.callbacks.live import live_optimizers, quiet
from lightning_plasticity.callbacks.probe_data import probe_batches
from lightning_plasticity.curvature.loss.closure import step_arguments
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.batches import batch_size, clone_batch
from lightning_plasticity.nn.snapshot import shadow_method
from lightning_plasticity.records import TaskRecord
from lightning_plasticity.study.build import Maker
from lightning_plasticity.study.config import Settings, StudyError, column_name

END_SAMPLES = 10_000
Row = dict[str, float]


def monitor_makers(measure: list[Settings], where: str = "measure") -> list[tuple[Maker, Any]]:
    """The monitors, checked, each with its ``tasks``: ``"all"``, ``"last"`` or every so many."""
    found = []
    for k, entry in enumerate(measure):
        maker = Maker(entry, f"{where}[{k}]")
        tasks = entry.get("tasks", "all")
        if tasks not in ("all", "last") and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
            raise StudyError(f"{where}[{k}]: tasks is {tasks!r}, expected all, last, or every so many tasks, e.g. 4.")
        if tasks != "all" and "every_n_tasks" not in maker.names:
            raise StudyError(f"{where}[{k}]: {entry['class_path']} takes no every_n_tasks, so tasks must be all.")
        maker.check()
        found.append((maker, tasks))
    return found


def every_n_tasks(tasks: Any, num_tasks: int) -> int:
    """``"last"`` is the first task and the last: the first says where a network began."""
    if tasks == "all":
        return 1
    return max(1, num_tasks - 1) if tasks == "last" else int(tasks)


class TaskRows(Callback):
    """Keeps a row for each task; comes after the monitors, so that it hears of a task's end after them.

    The online value is the metric of each minibatch before its update, mean over the task's minibatches. The end value
    is the metric of the final weights on the task's training data (``END_SAMPLES`` of them at most), with BatchNorm
    and dropout switched off.

    Args:
        metric: a key of the dict that ``training_step`` returns, else of what the module logs.
        tracker: of the run's tasks.
        tell: called with each row.
    """

    def __init__(self, metric: str, tracker: TaskTracker, tell: Callable[[int, Row], None] | None = None) -> None:
        self.metric = metric
        self.tracker = tracker
        self.tell = tell
        self.rows: list[Row] = []
        self._per_epoch: bool | None = None  # how the metric comes, once known
        self._values: list[Tensor] = []
        self._epoch_open = False
        self._returned = "no dict"  # by the last training step, for errors
        self._logged: list[str] = []  # by the first training step
        self._stop_listening: Callable[[], None] | None = None
        self._started = 0.0
        self._warned = False

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Start the clock."""
        self._values.clear()
        self._started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hear what the first step logs: a metric that is logged by the epoch shows at the epoch's end only."""
        if self._per_epoch is not None or self._stop_listening is not None:
            return
        log = pl_module.log

        def listening(name: str, *args: Any, **kwargs: Any) -> Any:
            self._logged.append(name)
            return log(name, *args, **kwargs)

        self._stop_listening = shadow_method(pl_module, "log", listening)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the value before the update."""
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        self._epoch_open = True
        self._returned = ", ".join(outputs) if isinstance(outputs, Mapping) else "no dict"
        if self._per_epoch:
            return
        value = outputs.get(self.metric) if isinstance(outputs, Mapping) else None
        if value is None:
            value = trainer.callback_metrics.get(self.metric)
        if self._per_epoch is None:
            self._per_epoch = value is None
            if value is None and self.metric not in self._logged:
                self._say_missing(trainer, pl_module)
        if value is not None:
            self._values.append(_scalar(value, self.metric))
        elif not self._per_epoch:
            raise self._missing(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect a metric that is logged by the epoch: its mean over the epoch's minibatches."""
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        """Once for each epoch: a task may end in an epoch's end before this callback hears of that."""
        if self._epoch_open and self._per_epoch:
            value = trainer.callback_metrics.get(self.metric)
            if value is None:
                raise self._missing(trainer)
            self._values.append(_scalar(value, self.metric))
        self._epoch_open = False

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Close the row."""
        seconds = time.perf_counter() - self._started
        self._end_epoch(trainer)
        name = column_name(self.metric)
        online = float(torch.stack(self._values).double().mean()) if self._values else math.nan
        row = {f"online_{name}": online, f"end_{name}": self._end_value(trainer, pl_module)}
        row |= {"steps": float(self.tracker.steps_in_task), "seconds": seconds}
        self.rows.append(row)
        self._values.clear()
        if self.tell is not None:
            self.tell(task, row)

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows, "per_epoch": self._per_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows of the tasks before the interruption."""
        self.rows, self._per_epoch = list(state_dict["rows"]), state_dict["per_epoch"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tell": None, "_stop_listening": None}

    def _say_missing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the first step: an error where nothing else can log it later, a warning where something may."""
        too_late = "on_train_epoch_end"  # Lightning calls the module's after those of callbacks
        hooks = [name for name in dir(LightningModule) if name.startswith("on_") and name != too_late]
        others = [name for name in hooks if getattr(type(pl_module), name) is not getattr(LightningModule, name, None)]
        others += [type(callback).__name__ for callback in trainer.callbacks if not _is_known(callback)]  # type: ignore[attr-defined]
        if not others:
            raise self._missing(trainer)
        warnings.warn(
            f"online_metric {self.metric!r} is not there after the first step: training_step returned "
            f"{self._returned} and logged {', '.join(self._logged) or 'nothing'}. The unit fails at the end of its "
            f"first epoch, unless one of these logs it: {', '.join(others)}.",
            stacklevel=2,
        )

    def _missing(self, trainer: Trainer) -> StudyError:
        keys = dict.fromkeys([*self._logged, *trainer.callback_metrics])
        logged = ", ".join(key for key in keys if not key.startswith("plasticity/")) or "nothing"
        return StudyError(
            f"online_metric {self.metric!r} was not found: training_step returned {self._returned}, and the module "
            f"logged {logged}. Return it in training_step's dict, log it there, or name another key."
        )

    def _end_value(self, trainer: Trainer, pl_module: LightningModule) -> float:
        try:
            with quiet(trainer):
                return _end_value(trainer, pl_module, self.metric)
        except Exception as error:
            if not self._warned:
                self._warned = True
                why = f"{type(error).__name__}: {error}"
                warnings.warn(f"{self.metric} at the end of a task could not be measured: {why}", stacklevel=2)
            return math.nan


def _is_known(callback: Callback) -> bool:
    """Ours and Lightning's own, which log nothing of the user's."""
    return type(callback).__module__.partition(".")[0] in ("lightning_plasticity", "lightning", "pytorch_lightning")


def _end_value(trainer: Trainer, pl_module: LightningModule, metric: str) -> float:
    batches = probe_batches(trainer, pl_module, None, END_SAMPLES, None).batches
    total, samples = 0.0, 0
    for batch in batches:
        size = batch_size(batch)
        total += size * _step_value(pl_module, batch, metric)
        samples += size
    return total / samples


def _step_value(pl_module: LightningModule, batch: Any, metric: str) -> float:
    """What the training step returns, else logs, under a name; nothing of it stays."""
    logged: dict[str, Any] = {}
    with undisturbed(pl_module, **live_optimizers(pl_module)), torch.no_grad():
        undo = (
            shadow_method(pl_module, "log", lambda name, value, *args, **kwargs: logged.update({name: value})),
            shadow_method(pl_module, "log_dict", lambda values, *args, **kwargs: logged.update(values)),
        )
        try:
            for submodule in pl_module.modules():
                if isinstance(submodule, Metric):
                    submodule.reset()
            step: Any = pl_module.training_step
            returned = step(*step_arguments(step, clone_batch(batch), 0))
            value = returned.get(metric) if isinstance(returned, Mapping) else None
            value = logged[metric] if value is None else value
            return float(value.compute() if isinstance(value, Metric) else value)
        finally:
            for restore in reversed(undo):
                restore()


def _scalar(given: Any, name: str) -> Tensor:
    value: Tensor = torch.as_tensor(given).detach()
    if value.numel() != 1:
        raise StudyError(f"online_metric {name!r} has the shape {tuple(value.shape)}, expected one number.")
    return value.reshape(()).clone()  # the module may write into it again


def measured(callbacks: Iterable[Any]) -> dict[int, Row]:
    """The values of all records of the callbacks, by task and key; ``plasticity/`` is left out of the keys.

    Estimates that are not exact bring their interval as ``<key>_lower`` and ``<key>_upper``; ``measuring_seconds`` is
    what the records took.
    """
    rows: dict[int, Row] = {}
    for callback in callbacks:
        for record in getattr(callback, "records", ()):
            if isinstance(record, TaskRecord):
                row = rows.setdefault(record.task, {})
                row |= _values(record)
                row["measuring_seconds"] = row.get("measuring_seconds", 0.0) + record.seconds
    return rows


def _values(record: TaskRecord) -> Row:
    row = {}
    for key, estimate in record.values.items():
        name = key.removeprefix("plasticity/")
        name = name if record.phase == "start" else f"end/{name}"
        row[name] = float(estimate.value)
        if not estimate.exact:
            row |= {f"{name}_lower": float(estimate.lower), f"{name}_upper": float(estimate.upper)}
    return row
