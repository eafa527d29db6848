"""What goes wrong in a run, and where: set off at the n-th time that a place is reached, mostly while measuring."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_plasticity import Spectrum
from lightning_plasticity.callbacks import monitor as monitor_file
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.records import FILE_NAME, append_record


class UnspeakableError(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: ZeroDivisionError("mine"),
    "odd text": lambda: ValueError("a; b: 12\n\u00fc {} %s \ud800."),
    "no text": lambda: AssertionError(),
    "unspeakable": UnspeakableError,
    "stop": lambda: StopIteration("mine"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory of the CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory"),
    "interrupt": KeyboardInterrupt,
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
}
IN_CODE = ("error", "odd text", "no text", "unspeakable", "stop", "interrupt")
MEMORY = ("memory", "memory of the CPU")
PLACES: dict[str, tuple[str, ...]] = {
    "nothing": ("",),
    "training step": IN_CODE,
    "forward hook": IN_CODE,
    "hook of a parameter's gradient": IN_CODE,
    "hook of an output's gradient": IN_CODE,
    "out of memory": MEMORY,
    "dataset": IN_CODE,
    "collate function": IN_CODE,
    "NaN loss": ("",),
    "inf loss": ("",),
    "NaN weights": ("",),
    "logger": IN_CODE,
    "histogram or figure": IN_CODE,
    "record file": ("disk full", "interrupt"),
    "spectrum file": ("disk full", "interrupt"),
    "training step, training": ("error", "stop", "memory", "unspeakable"),
    "training step, training, interrupt": ("interrupt",),
}
MEMORY_PLACES = ("training step", "forward hook", "hook of a parameter's gradient", "hook of an output's gradient")
FACTORS = {"NaN loss": float("nan"), "inf loss": float("inf")}
OUTSIDE = ("logger", "histogram or figure", "record file", "spectrum file")  # not inside ``undisturbed``


@dataclass(frozen=True)
class Fault:
    """A failure: its row in the table, where it is, which error, at which call, once or from then on."""

    row: str
    place: str
    error: str
    nth: int
    once: bool
    which: int  # of the submodules or parameters

    @property
    def in_training(self) -> bool:
        return self.place.startswith("training step, training")


class Live:
    """The fault of the run that goes on; global, for what a measured module reaches is put back after measuring."""

    fault: Fault | None = None
    at_boundary = False  # monitors, and nobody else, are at work
    count = fired = 0

    def due(self, place: str) -> bool:
        """Whether the fault goes off, now that a place is reached."""
        fault = self.fault
        if fault is None or fault.place != place or self.at_boundary == fault.in_training:
            return False
        if is_measuring() == (fault.in_training or place in OUTSIDE):
            return False
        self.count += 1
        due = self.count == fault.nth or (self.count > fault.nth and not fault.once)
        self.fired += due
        return due

    def reach(self, place: str) -> None:
        if self.due(place):
            assert self.fault is not None
            raise ERRORS[self.fault.error]()


LIVE = Live()


def _reach(place: str) -> None:
    LIVE.reach(place)


def _due(place: str) -> bool:
    return LIVE.due(place)


class Arm(L.Callback):
    """Puts the places into a module, whether the fault goes off in this run or not; and notes what is left over."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.armed, self.left = fault, False, []  # type: ignore[var-annotated]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not self.armed:
            self.armed = True
            _arm_step(pl_module, late=self.fault.which % 2 == 0)
            _arm_layers(pl_module, self.fault)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.fault.place == "NaN weights" and self.fault.nth % 2 == 0:
            _spoil(pl_module, self.fault)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.fault.place == "NaN weights" and self.fault.nth % 2:
            _spoil(pl_module, self.fault)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        stepping = [*trainer.optimizers, *(each.scheduler for each in trainer.lr_scheduler_configs)]
        self.left.append([sorted(vars(each)) for each in stepping])


def _spoil(module: Any, fault: Fault) -> None:
    parameters = list(module.parameters())
    LIVE.fired += 1
    with torch.no_grad():
        parameters[fault.which % len(parameters)].fill_(float("nan") if fault.once else float("inf"))


def _arm_step(module: Any, late: bool) -> None:
    step = module.training_step

    @functools.wraps(step)
    def armed(*args: Any, **kwargs: Any) -> Any:
        if not late:
            _reach_step()
        returned = step(*args, **kwargs)
        if late:
            _reach_step()
        return _spoilt(returned)

    module.training_step = armed


def _reach_step() -> None:
    for place in ("training step", "training step, training", "training step, training, interrupt"):
        _reach(place)


def _spoilt(returned: Any) -> Any:
    loss = returned["loss"] if isinstance(returned, Mapping) else returned
    for place, factor in FACTORS.items():
        if isinstance(loss, Tensor) and _due(place):
            return {**returned, "loss": loss * factor} if isinstance(returned, Mapping) else loss * factor
    return returned


def _arm_layers(module: Any, fault: Fault) -> None:
    layers = [layer for layer in module.modules() if layer is not module and not list(layer.children())]
    layers = [layer for layer in layers if not isinstance(layer, torch.jit.ScriptModule)]

    def in_forward(layer: Any, inputs: Any, outputs: Any) -> None:
        _reach("forward hook")
        if is_measuring() and isinstance(outputs, Tensor) and outputs.requires_grad:
            outputs.register_hook(lambda gradient: _reach("hook of an output's gradient"))

    if layers and fault.place in ("forward hook", "hook of an output's gradient"):
        layers[fault.which % len(layers)].register_forward_hook(in_forward)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if parameters and fault.place == "hook of a parameter's gradient":
        parameters[fault.which % len(parameters)].register_hook(
            lambda gradient: _reach("hook of a parameter's gradient")
        )


def arm_loader(loader: Any, fault: Fault) -> None:
    """Let the dataset or the collate function of a loader break."""
    if not isinstance(loader, DataLoader):
        return
    kind = type(loader.dataset)
    if fault.place == "dataset" and hasattr(kind, "__getitem__"):

        def get(self: Any, index: Any) -> Any:
            _reach("dataset")
            return kind.__getitem__(self, index)

        loader.dataset.__class__ = type(kind.__name__, (kind,), {"__getitem__": get})
    if fault.place == "collate function":
        collate = loader.collate_fn

        def collated(samples: Any) -> Any:
            _reach("collate function")
            return collate(samples)

        loader.collate_fn = collated


class Breaking(Logger):
    """Keeps what Lightning logs; breaks on what monitors log. It can show histograms and, if asked, images."""

    def __init__(self, images: bool) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.keys: set[str] = set()
        self._experiment = _Images() if images else _Histograms()

    name, version = "breaking", 0

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append("hyperparameters")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any("plasticity" in key for key in metrics):
            _reach("logger")
            self.keys.update(metrics)
        else:
            self.rows.append((step, repr(sorted(metrics.items()))))


class _Histograms:
    def add_histogram_raw(self, *args: Any, **kwargs: Any) -> None:
        _reach("histogram or figure")


class _Images(_Histograms):
    def add_image(self, *args: Any, **kwargs: Any) -> None:
        _reach("histogram or figure")


@contextmanager
def armed(fault: Fault | None) -> Iterator[Live]:
    """The fault goes off inside, and files break in the middle of a write."""
    LIVE.fault, LIVE.at_boundary, LIVE.count, LIVE.fired = fault, False, 0, 0
    saved = Spectrum.save

    def append(directory: Any, record: Any) -> None:
        if _due("record file"):
            Path(directory).mkdir(parents=True, exist_ok=True)
            with open(Path(directory) / FILE_NAME, "a") as file:
                file.write('{"monitor": "Hess')
            assert fault is not None
            raise ERRORS[fault.error]()
        append_record(directory, record)

    def save(self: Spectrum, path: Any) -> None:
        if _due("spectrum file"):
            Path(path).write_bytes(b"PK")
            assert fault is not None
            raise ERRORS[fault.error]()
        saved(self, path)

    try:
        with patch.object(monitor_file, "append_record", append), patch.object(Spectrum, "save", save):
            yield LIVE
    finally:
        LIVE.fault = None
