"""``PlasticityAlert``: watch a recorded measure over tasks, say when it falls, and act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_plasticity.callbacks.arguments import choice, whole_number
from lightning_plasticity.callbacks.base import Callback
from lightning_plasticity.callbacks.intervention import join
from lightning_plasticity.callbacks.live import FewHooks
from lightning_plasticity.callbacks.monitor import PHASES, BoundaryMonitor, Phase
from lightning_plasticity.callbacks.processes import describe, several
from lightning_plasticity.callbacks.task_tracker import TaskTracker
from lightning_plasticity.callbacks.warn_once import WarnOnce
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.loggers import log_directory, log_scalars
from lightning_plasticity.records import TaskRecord, append_record, installed_versions

Against = Literal["best", "early", "fresh"]
Bad = Literal["low", "high"]
ADVICE = (
    "Regularise (L2ERMixin) or do so more, put LayerNorm before the activations, or act at once with "
    "on_alert=ReDo() or on_alert=ShrinkAndPerturb()"
)


class PlasticityAlert(FewHooks):
    """Warns when a measure says that the network loses its plasticity; can start an intervention.

    At every task it compares the value of ``measure`` with a reference and warns when it falls below ``fraction`` times
    the reference (rises above it, with ``bad="high"``): once when that happens, again only after it has recovered.
    Absolute thresholds mean nothing here: a fresh network's curvature count is small because its outputs are. It is a
    hint: with the defaults, on three streams, it found 88 % of the falling runs and sounded in 39 % of the healthy
    ones (docs/studies/prediction.md).

    Logged: ``plasticity/alert/ratio`` (value / reference) and ``plasticity/alert/active`` (0 or 1); also appended to
    ``plasticity.jsonl``.

    Args:
        measure: a key that a monitor records, such as ``"plasticity/features/srank"`` (the mean over hidden layers), or
            one that the module logs, such as ``"train_accuracy"``.
        against: ``"best"``: the best value of this run so far; ``"early"``: the mean over the tasks before
            ``from_task``; ``"fresh"``: the same measure of a freshly initialised network on the same task, which needs
            a monitor with ``fresh_control=True``.
        fraction: of the reference; alert beyond it.
        from_task: first task (from 0) that may alert.
        bad: ``"low"`` for what should stay high (ranks, counts, accuracy), ``"high"`` for dead or dormant units.
        phase: ``"start"`` or ``"end"``: which record of a task to look at. What the module logs is read at the end.
        on_alert: an intervention (``ReDo()``, ``ShrinkAndPerturb()``, ...) or several, to act at every alerted task.
            They act on demand only, unless they are among the Trainer's callbacks too. One that fails gives a warning
            and training goes on; in several processes, whose weights would differ from then on, its error is raised.
        save_dir: where ``plasticity.jsonl`` goes; None for the log directory.

    Raises:
        ValueError: for settings out of range.
        TypeError: for an ``on_alert`` that cannot intervene.

    Example:
        >>> from lightning_plasticity import PlasticityAlert
        >>> PlasticityAlert(measure="plasticity/features/dead_units", bad="high", against="early", fraction=2.0).bad
        'high'
    """

    # Hears of tasks after the monitors, whose records it reads, and may change weights.
    updates_weights = True

    def __init__(
        self,
        measure: str = "plasticity/features/srank",
        against: Against = "best",
        fraction: float = 0.946,
        from_task: int = 3,
        bad: Bad = "low",
        phase: Phase = "start",
        on_alert: Callback | Sequence[Callback] | None = None,
        save_dir: str | None = None,
    ) -> None:
        super().__init__()
        choice("against", against, ("best", "early", "fresh"))
        choice("bad", bad, ("low", "high"))
        choice("phase", phase, PHASES)
        if not isinstance(measure, str) or not measure:
            raise ValueError(f"measure={measure!r}, expected a key such as 'plasticity/features/srank'.")
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < math.inf:
            raise ValueError(f"fraction={fraction!r}, expected a number > 0, such as 0.9.")
        if (fraction > 1) == (bad == "low") and fraction != 1:
            raise ValueError(
                f"fraction={fraction!r} with bad={bad!r} would alert at the reference itself; "
                "expected at most 1 where low values are bad, at least 1 where high values are."
            )
        least = 1 if against != "fresh" else 0
        self.from_task = whole_number("from_task", from_task, least)
        self.measure, self.against, self.fraction = measure, against, float(fraction)
        self.bad, self.phase, self.save_dir = bad, phase, save_dir
        self.on_alert = on_alert
        self._interventions = _interventions(on_alert)
        self.history: dict[int, float] = {}  # value by task
        self.alerted: list[int] = []  # tasks
        self._tracker: TaskTracker | None = None
        self._resuming = True
        self._warn_once = WarnOnce("PlasticityAlert")
        # Made once: Lightning asks for it at every hook of every step.
        self._state_key = self._generate_state_key(measure=self.measure, against=self.against, phase=self.phase)

    on_train_batch_start: Any = None  # as in ``FewHooks``
    on_train_batch_end: Any = None

    @property
    def state_key(self) -> str:
        """Alerts on several measures keep their states apart."""
        return self._state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the Trainer's task tracker, or give it one."""
        self._tracker = TaskTracker.attach(trainer, self._tracker)
        for intervention in self._interventions:
            join(trainer, pl_module, stage, intervention)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only a fit resumes; an evaluation from a checkpoint must not roll the history back."""
        self._resuming = trainer.state.fn == "fit"

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Look at what the monitors saw at the start."""
        if self.phase == "start":
            self._look(trainer, pl_module, task)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Look at what the monitors saw at the end, and at what the module logged."""
        if self.phase == "end":
            self._look(trainer, pl_module, task)

    def state_dict(self) -> dict[str, Any]:
        """Values and alerts so far, in plain Python."""
        return {"history": dict(self.history), "alerted": list(self.alerted)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        if self._resuming:
            self.history, self.alerted = dict(state_dict["history"]), list(state_dict["alerted"])

    def _look(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        values = self._recorded(trainer, task)
        value = values.get(self.measure, math.nan)
        if not math.isfinite(value):
            self._say_missing(values)
            return
        reference = self._reference(task, values)
        self.history[task] = value
        if not math.isfinite(reference):
            self._say_no_fresh(trainer, task, values)
            return
        beyond = value < self.fraction * reference if self.bad == "low" else value > self.fraction * reference
        ratio = value / reference if reference else math.nan
        self._log(trainer, task, ratio, beyond)
        if not beyond:
            return
        if task - 1 not in self.alerted:
            rank_zero_warn(self._message(task, value, reference))
        self.alerted.append(task)
        for intervention in self._interventions:
            try:
                intervention.intervene(trainer, pl_module)
            except Exception as error:
                if several(trainer):  # it may have acted on the other ranks
                    raise
                self._warn_once(
                    f"PlasticityAlert: {type(intervention).__name__} failed at the {self.phase} of task {task}: "
                    f"{describe(error).rstrip('.')}. It may have changed some of the weights before. Training goes on.",
                    cause=f"{type(intervention).__name__} {describe(error)}",
                )

    def _recorded(self, trainer: Any, task: int) -> dict[str, float]:
        """What the monitors recorded at this task and phase, and what the module logged."""
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()} if self.phase == "end" else {}
        for monitor in trainer.callbacks:
            if isinstance(monitor, BoundaryMonitor):
                for record in monitor.records:
                    if record.task == task and record.phase == self.phase:
                        logged |= {key: estimate.value for key, estimate in record.values.items()}
        return logged

    def _reference(self, task: int, values: dict[str, float]) -> float:
        """What the value is compared with; NaN while there is nothing to compare with."""
        if task < self.from_task:
            return math.nan
        if self.against == "fresh":
            return next((values[key] for key in self._fresh_keys() if key in values), math.nan)
        earlier = {then: value for then, value in self.history.items() if then < task}
        if self.against == "early":
            early = [value for then, value in earlier.items() if then < self.from_task]
            return sum(early) / len(early) if early else math.nan
        best = max if self.bad == "low" else min
        return best(earlier.values(), default=math.nan)

    def _fresh_keys(self) -> list[str]:
        """Where a monitor puts the measure of its fresh network: behind the name that it may have."""
        first, *rest = self.measure.split("/")
        return ["/".join([first, *rest[:after], "fresh", *rest[after:]]) for after in (0, 1)]

    def _message(self, task: int, value: float, reference: float) -> str:
        early = f"the mean before task {self.from_task}"
        best = f"the best so far, of task {self._task_of(reference)}"
        name = {"best": best, "early": early, "fresh": "a fresh network"}[self.against]
        relation = "below" if self.bad == "low" else "above"
        done = [type(intervention).__name__ for intervention in self._interventions]
        action = f"Acting now: {', '.join(done)}." if done else f"{ADVICE}."
        return (
            f"PlasticityAlert at the {self.phase} of task {task}: {self.measure} is {value:.4g}, {relation} "
            f"{self.fraction:g} of {name} ({reference:.4g}). {action}"
        )

    def _task_of(self, value: float) -> int | None:
        return next((task for task, seen in self.history.items() if seen == value), None)

    def _say_missing(self, values: dict[str, float]) -> None:
        """Once; a measurement that failed has had its warning from the monitor."""
        if self.measure in values:
            return
        known = ", ".join(sorted(key for key in values if key.count("/") <= 2)) or "none; add a monitor"
        self._warn_once(
            f"PlasticityAlert watches {self.measure!r} at a task's {self.phase}, which no monitor has recorded"
            f"{' and no module has logged' if self.phase == 'end' else ''}. Known there: {known}.",
            cause="missing",
        )

    def _say_no_fresh(self, trainer: Any, task: int, values: dict[str, float]) -> None:
        """Once; where a monitor tried a fresh network and failed, it has said so itself."""
        if self.against != "fresh" or task < self.from_task or any(key in values for key in self._fresh_keys()):
            return
        monitors = [monitor for monitor in trainer.callbacks if isinstance(monitor, BoundaryMonitor)]
        recorded = [m for m in monitors if any(self.measure in record.values for record in m.records)]
        if any(monitor.fresh_control for monitor in recorded):
            return
        self._warn_once(
            f"PlasticityAlert compares {self.measure!r} with that of a fresh network, which nobody measures: give the "
            "monitor fresh_control=True (HessianSpectrumMonitor, FeatureRankMonitor), or choose against='best' or "
            "'early'. Until then it cannot alert.",
            cause="fresh",
        )

    def _log(self, trainer: Trainer, task: int, ratio: float, active: bool) -> None:
        assert self._tracker is not None
        values = {"plasticity/alert/active": float(active), "plasticity/alert/ratio": ratio}
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            with self._warn_once.surviving("write what it saw"):
                log_scalars(logger, values, self._tracker.step)
        with self._warn_once.surviving("write what it saw"):
            directory = Path(self.save_dir) if self.save_dir is not None else log_directory(trainer.loggers)
            if directory is not None and not getattr(trainer, "fast_dev_run", False):
                numbers = {key: Estimate.exactly(value) for key, value in values.items()}
                settings = {
                    "identity": self.state_key,
                    "measure": self.measure,
                    "against": self.against,
                    "fraction": self.fraction,
                    "bad": self.bad,
                }
                about = (type(self).__name__, task, self.phase, self._tracker.step)
                append_record(directory, TaskRecord(*about, numbers, settings, versions=installed_versions()))


def _interventions(on_alert: Callback | Sequence[Callback] | None) -> list[Any]:
    several = isinstance(on_alert, list | tuple)
    found: list[Any] = [] if on_alert is None else list(on_alert) if several else [on_alert]  # type: ignore[arg-type]
    for intervention in found:
        if not callable(getattr(intervention, "intervene", None)):
            raise TypeError(
                f"on_alert={intervention!r}, expected an intervention such as ReDo() or ShrinkAndPerturb(), "
                "or a callback of your own with a method intervene(trainer, pl_module)."
            )
    return found
