"""What all monitors share: when to measure, keeping records, logging them, and never killing a run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy

from lightning_plasticity.callbacks.arguments import choices, label, whole_number
from lightning_plasticity.callbacks.interrupts import INTERRUPTED, Interrupts, end_measurements
from lightning_plasticity.callbacks.live import FewHooks, live_optimizers, quiet
from lightning_plasticity.callbacks.measurement import (
    Measurement,
    log_measurement,
    reach_callback_metrics,
    record_directory,
    save_spectrum,
)
from lightning_plasticity.callbacks.probe_data import FIRST_BATCH, Probe, probe_batches
from lightning_plasticity.callbacks.processes import (
    describe,
    exchange,
    merged_failures,
    no_collectives,
    several,
    shared_probe,
)
from lightning_plasticity.callbacks.progress import LONG, expectation, line_below, shown, tell
from lightning_plasticity.callbacks.sharding import refuse_unknown_sharding, whole
from lightning_plasticity.callbacks.task_tracker import TaskTracker
from lightning_plasticity.callbacks.warn_once import WarnOnce
from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.curvature.measured import dtype_name
from lightning_plasticity.linalg.progress import part
from lightning_plasticity.loggers import pixels_of, takes_images
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.batches import is_plain, map_tensors
from lightning_plasticity.nn.precision import measured_dtype
from lightning_plasticity.records import TaskRecord, append_record, installed_versions
from lightning_plasticity.trainability.fresh import reinitialize

Phase = Literal["start", "end"]
PHASES = ("start", "end")
OnError = Literal["warn", "raise"]


class BoundaryMonitor(FewHooks):
    """Base of the monitors that measure at task boundaries; a subclass says what, in ``measure``.

    Args:
        probe_samples: how many samples to measure on.
        when: boundaries to measure at, ``"start"``, ``"end"`` or both.
        every_n_tasks: measure at tasks 0, n, 2n, ...
        data: what to measure on: a batch, dataset, loader, or callable ``(trainer, pl_module)`` returning one; None for
            samples of the task's own training data.
        on_error: ``"warn"`` records a failed measurement and goes on; ``"raise"`` stops, for tests.
        save_dir: where records and spectra go; None for the log directory of the first logger that has one.
        name: part of keys, file names and checkpoints, for two monitors that otherwise differ in their data only.
        fresh_control: measure a freshly initialised network too, under ``plasticity/fresh/...``.
    """

    def __init__(
        self,
        probe_samples: int,
        when: Phase | Sequence[Phase],
        every_n_tasks: int,
        data: Any,
        on_error: OnError,
        save_dir: str | None,
        name: str | None = None,
        fresh_control: bool = False,
    ) -> None:
        super().__init__()
        label("name", name)
        self.fresh_control = fresh_control
        self.name = name
        self.probe_samples = whole_number("probe_samples", probe_samples)
        self.when = choices("when", when, PHASES, "'start', 'end' or both, e.g. when=('start', 'end')")
        self.every_n_tasks = whole_number("every_n_tasks", every_n_tasks)
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error={on_error!r}, expected 'warn' (record the failure, go on) or 'raise'.")
        self.data = data
        self.on_error = on_error
        self.save_dir = save_dir
        self.records: list[TaskRecord] = []
        self._tracker: TaskTracker | None = None
        self._probe: Probe | None = None
        self._probed_task: int | None = None  # whose probe data has been fetched, or could not be
        self._warn_once = WarnOnce(type(self).__name__, raising=on_error == "raise")
        self._resuming = True
        self._state_key: str | None = None  # while a Trainer runs

    @property
    def state_key(self) -> str:
        """Tells monitors of one class apart by what they measure; Lightning asks for it at every hook of every step."""
        return self._made_state_key() if self._state_key is None else self._state_key

    def identity(self) -> dict[str, Any]:
        """The settings by which two monitors of the class differ, besides their names."""
        return {}

    def measure(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], phase: Phase) -> Measurement:
        """Measure on the probe batches; may raise anything."""
        raise NotImplementedError

    def may_be_long(self, pl_module: LightningModule) -> bool:
        """Whether to expect a long measurement where none has been made yet."""
        return False

    def plans(self) -> Any:
        """What this rank chose to do, in plain Python, for the others to do the same from now on."""
        return None

    def take_plans(self, plans: Any) -> None:
        """Do as rank zero does."""

    def named(self, key: str) -> str:
        """The key with the monitor's name in it."""
        return key if self.name is None else key.replace("plasticity/", f"plasticity/{self.name}/", 1)

    def figures(self, measurement: Measurement, record: TaskRecord) -> dict[str, Any]:
        """Matplotlib figures by key, for loggers that show some; none by default."""
        return {}

    # ---- Lightning's hooks -----------------------------------------------------------------------------------------

    on_train_batch_start: Any = None  # as in ``FewHooks``
    on_train_batch_end: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the Trainer's task tracker, or give it one; an evaluation may load one from a checkpoint."""
        self._tracker = TaskTracker.attach(trainer, self._tracker)
        if stage == "fit":
            refuse_unknown_sharding(trainer, type(self).__name__)
        self._state_key = self._made_state_key()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Between runs a monitor, or a copy of it, may get another name."""
        self._state_key = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring samples of a checkpoint, or of the last fit whose task goes on, to the module's device."""
        if self._probe is not None:
            self._probe = replace(self._probe, batches=[_moved(b, pl_module.device) for b in self._probe.batches])

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Measure the weights the task begins with, on its data."""
        self._probe, self._probed_task = None, task
        if task % self.every_n_tasks:
            return
        if "start" in self.when:
            self._at_boundary(trainer, pl_module, task, "start")
        elif self._tracker is not None:
            self._fetch_for_end(trainer, pl_module, self._tracker.first_batch)

    def on_task_resume(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """In a fit that goes on inside a task: samples for its end, while there is a batch to take them from.

        A checkpoint made before the first step, by an interrupt say, may lack the measurement of the start.
        """
        if self._tracker is None or self._probed_task == task:
            return
        self._probed_task = task
        if task % self.every_n_tasks:
            return
        self._fetch_for_end(trainer, pl_module, self._tracker.first_batch)
        start = [record for record in self.records if (record.task, record.phase) == (task, "start")]
        measured = any(record.failure != INTERRUPTED for record in start)
        if "start" in self.when and not measured and self._tracker.steps_in_task == 0:
            self.records = [record for record in self.records if record not in start]
            self._at_boundary(trainer, pl_module, task, "start")

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Measure the new weights on the same samples."""
        if "end" in self.when and task % self.every_n_tasks == 0:
            self._at_boundary(trainer, pl_module, task, "end")
        self._probe = None

    def state_dict(self) -> dict[str, Any]:
        """The records, in plain Python, and a first batch that cannot be fetched again for the task's end."""
        state: dict[str, Any] = {"records": [record.to_dict() for record in self.records]}
        probe = self._probe
        first = probe is not None and probe.source.startswith(FIRST_BATCH)  # of this process, or of all
        if probe is not None and first and "end" in self.when and is_plain(probe.batches):
            state["probe"] = (self._probed_task, probe.batches, probe.source)
        return state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only a fit resumes; an evaluation from a checkpoint must not roll the records back."""
        self._resuming = trainer.state.fn == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records of the run that is resumed."""
        if not self._resuming:
            return
        self.records = [TaskRecord.from_dict(plain) for plain in state_dict["records"]]
        if "probe" in state_dict:
            self._probed_task, batches, source = state_dict["probe"]
            self._probe = Probe(list(batches), source)

    def _made_state_key(self) -> str:
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(**self.identity(), **named)

    # ---- one measurement -------------------------------------------------------------------------------------------

    def _at_boundary(self, trainer: Trainer, pl_module: LightningModule, task: int, phase: Phase) -> None:
        assert self._tracker is not None
        name = type(self).__name__
        line, expected = line_below(trainer), self._expected(pl_module, phase)
        if line is None and expected >= LONG:
            with self._warn_once.surviving("say that it measures"):
                tell(trainer, f"{name}: measuring at the {phase} of task {task}, {expectation(expected)}")
        started = time.perf_counter()
        measurement, error = Measurement(), None
        interrupts = Interrupts(trainer)
        try:
            with (
                interrupts if self._alone(trainer) else nullcontext(),
                quiet(trainer),
                shown(line, f"task {task} {phase}", expected),
            ):
                measurement = self._measured(trainer, pl_module, phase)
        except KeyboardInterrupt:
            if not self._alone(trainer) or interrupts.end_run():
                raise
            measurement = Measurement(failures={"": INTERRUPTED})
        except Exception as caught:
            if self.on_error == "raise":  # else nobody keeps it, and the memory that its frames hold is free again
                error = caught
            measurement.failures[""] = describe(caught)
        if interrupts.second:  # while the first one was being cleaned up after
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        if several(trainer):  # every rank comes here, whatever happened to it
            measurement, seconds = self._agreed(measurement, seconds)
        if error is not None:
            raise error
        causes = _by_cause(measurement.failures)
        failure = "; ".join(f"{parts}: {why}" if parts else why for why, parts in causes.items()) or None
        if failure is not None and self.on_error == "raise":
            raise MeasurementError(failure)
        if interrupts.late and INTERRUPTED not in causes:
            self._say_again("Ctrl-C came when the measurement was all but over; it is whole.")
        for why, parts in causes.items():
            if why == INTERRUPTED:
                self._say_again(f"the measurement at the {phase} of task {task} was {why}.")
                continue
            what = f"{name} could not measure {f'{parts} ' if parts else ''}at the {phase} of task {task}"
            self._warn_once(f"{what}: {why.rstrip('.')}. Training goes on.", why)
        if seconds >= LONG:
            with self._warn_once.surviving("say that it has measured"):
                tell(trainer, f"{name}: measured at the {phase} of task {task} in {seconds:.0f} s")
        settings = measurement.settings | {"identity": self.state_key}
        values = {self.named(key): estimate for key, estimate in measurement.values.items()}
        about = (name, task, phase, self._tracker.step)
        record = TaskRecord(*about, values, settings, seconds, failure, versions=installed_versions())
        self._keep(trainer, pl_module, record, measurement)

    def _measured(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> Measurement:
        _refuse_lazy(pl_module)
        if self._probe is None:
            assert self._tracker is not None
            self._fetch(trainer, pl_module, self._tracker.first_batch)
        assert self._probe is not None
        smaller = self._probe.smaller
        measurement = None
        module = whole(pl_module)
        with no_collectives(trainer):
            try:
                measurement = self.measure(trainer, module, self._probe.batches, phase)
            except Exception as error:
                if smaller is None or isinstance(error, MeasurementError):
                    raise
            if smaller is not None and (measurement is None or measurement.retry):
                self._probe = smaller()
                measurement = self.measure(trainer, module, self._probe.batches, phase)
            assert measurement is not None
            if self.fresh_control:
                self._add_control(trainer, module, measurement, phase)
        measurement.settings |= {"data": self._probe.source, "dtype": dtype_name(measured_dtype(pl_module))}
        return measurement

    def _add_control(self, trainer: Trainer, module: Any, measurement: Measurement, phase: Phase) -> None:
        """The same of a freshly initialised network, which is forgotten afterwards."""
        assert self._probe is not None
        try:
            with undisturbed(module, mode="as_is", **live_optimizers(module)), part("fresh network"):
                reinitialize(module)
                control = self.measure(trainer, module, self._probe.batches, phase)
        except Exception as error:
            measurement.failures["a fresh network"] = describe(error)
            return
        fresh = {key.replace("plasticity/", "plasticity/fresh/", 1): value for key, value in control.values.items()}
        measurement.values |= fresh
        measurement.failures |= {f"{part} of a fresh network": why for part, why in control.failures.items()}

    def _agreed(self, measurement: Measurement, seconds: float) -> tuple[Measurement, float]:
        """Rank zero's numbers on all ranks, with what failed on any; only rank zero keeps what it saves."""
        mine = measurement
        try:
            ranks = exchange(lambda: (mine.values, mine.settings, mine.failures, seconds, self.plans()))
        except MeasurementError as error:
            return Measurement(failures={"": str(error)}), seconds
        values, settings, _, seconds, plans = ranks[0]
        if torch.distributed.get_rank():
            measurement = Measurement(values, settings)
            self.take_plans(plans)
        measurement.failures = merged_failures([failures for _, _, failures, _, _ in ranks])
        return measurement, seconds

    def _fetch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        fetch = partial(probe_batches, trainer, pl_module, self.data, self.probe_samples, batch)
        self._probe = shared_probe(trainer, pl_module, fetch, self.probe_samples)

    def _fetch_for_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Fetch ahead; what fails here fails again at the end, and is recorded there."""
        with suppress(Exception), quiet(trainer):
            self._fetch(trainer, pl_module, batch)

    def _keep(self, trainer: Trainer, pl_module: LightningModule, record: TaskRecord, measurement: Measurement) -> None:
        """Files, records, loggers; a full disk or a broken logger must not kill the run either."""
        directory = None
        with self._warn_once.surviving("write its record"):  # a logger is asked for its directory
            directory = record_directory(trainer, self.save_dir)
        if directory is not None:
            names = {}
            for matrix, spectrum in measurement.spectra.items():
                with self._warn_once.surviving("write its record"):
                    names[matrix] = save_spectrum(directory, record, matrix, spectrum, self.name)
            record = replace(record, spectra=names)
            with self._warn_once.surviving("write its record"):
                append_record(directory, record)
        self.records.append(record)
        if record.phase == "start":
            with self._warn_once.surviving("log to the module"):
                reach_callback_metrics(pl_module, record, several(trainer))
        loggers = trainer.loggers if trainer.is_global_zero else []
        images = {}
        if any(takes_images(logger) for logger in loggers):
            with self._warn_once.surviving("draw its figures"):
                drawn = self.figures(measurement, record).items()
                images = {self.named(key): pixels_of(figure) for key, figure in drawn}
        for logger in loggers:
            with self._warn_once.surviving(f"log to {type(logger).__name__}"):
                log_measurement(logger, record, measurement, images, self.named)

    def _expected(self, pl_module: LightningModule, phase: Phase) -> float:
        """Seconds that the next measurement will take; infinite for a first one that may be long."""
        if whole := [record for record in self.records if record.failure != INTERRUPTED]:
            like = [record for record in whole if record.phase == phase] or whole
            return like[-1].seconds
        with suppress(Exception):
            return math.inf if self.may_be_long(pl_module) else 0.0
        return 0.0

    def _alone(self, trainer: Trainer) -> bool:
        """Whether an interrupt may end a measurement only: other processes would wait for this one, or go on alone."""
        return self.on_error != "raise" and end_measurements() and not several(trainer)

    def _say_again(self, what: str) -> None:
        """As often as it happens."""
        message = f"{type(self).__name__}: {what} Training goes on; Ctrl-C again ends it."
        warnings.warn(message, stacklevel=2)


def _refuse_lazy(pl_module: LightningModule) -> None:
    """A forward pass of ours would be the one that gives lazy layers their shape, and draws their first weights."""
    lazy = [name for name, parameter in pl_module.named_parameters() if is_lazy(parameter)]
    if lazy:
        some = f"{', '.join(lazy[:3])}{', ...' if len(lazy) > 3 else ''}"
        raise MeasurementError(
            f"There are uninitialised lazy parameters ({some}), which measuring would initialise; run one forward pass "
            "before fit."
        )


def _moved(batch: Any, device: torch.device) -> Any:
    try:
        return move_data_to_device(batch, device)
    except ValueError:  # a frozen dataclass, which Lightning refuses
        return map_tensors(batch, lambda tensor: tensor.to(device))


def _by_cause(failures: Mapping[str, str]) -> dict[str, str]:
    """The parts that failed, by cause, so that one cause is told once."""
    causes: dict[str, list[str]] = {}
    for name, why in failures.items():
        causes.setdefault(why, []).append(name)
    return {why: ", ".join(filter(None, parts)) for why, parts in causes.items()}
