"""Run a case, with monitors or without, and keep what it left behind."""

from __future__ import annotations

import random
import signal
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from runs import Witness, csv_rows, outcome, trainer
from states import bits, changed, state

from fuzz.cases import Case
from fuzz.faults import LIVE, Arm, Breaking, Fault, arm_loader, armed
from lightning_plasticity.nn import is_measuring

# Lightning's name of the hook, and the training step that a regulariser has let go of.
OF_EXCEPTIONS = ("module._current_fx_name", "module.training_step")


class Hung(BaseException):
    """Over the time limit."""


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        outcome: weights, metrics, random states and the rest, as values that can be compared.
        batches: as training saw them, one after the other.
        error: what came out of ``fit``.
        again: the weights after one more, plain, fit of the same module.
        told: warnings.
        due: boundaries that were reached.
        differences: what a boundary's measurements changed.
        cut: whether a measurement was cut short by an interrupt.
        fired, count: how often the fault went off, and how often its place was reached.
    """

    outcome: dict[str, Any]
    batches: list[Any]
    error: str
    again: Any
    told: list[str]
    monitors: list[Any]
    fired: int
    count: int
    due: list[tuple[int, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    cut: bool = False
    directory: Path = Path()


class First(L.Callback):
    """Before the monitors: the whole state, to be compared after them."""

    def __init__(self, run: Run) -> None:
        self.run, self.inside, self.before = run, False, {}  # type: ignore[var-annotated]

    def look(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        return state(pl_module) | {"loggers": [id(logger) for logger in trainer.loggers]}

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int, phase: str = "start") -> None:
        self.run.due.append((task, phase))
        self.before, self.inside = self.look(trainer, pl_module), True
        LIVE.at_boundary = True

    def on_task_end(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.on_task_start(trainer, pl_module, task, "end")

    def compare(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.inside = LIVE.at_boundary = False
        by_others = OF_EXCEPTIONS if self.run.cut else ()
        found = changed(self.before, self.look(trainer, pl_module))
        self.run.differences += [each for each in found if each.removesuffix(" is") not in by_others]

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.inside:
            self.run.cut = True
            self.compare(trainer, pl_module)


class Last(L.Callback):
    """After the monitors."""

    def __init__(self, first: First) -> None:
        self.first = first

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.first.compare(trainer, pl_module)

    def on_task_end(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.first.compare(trainer, pl_module)


def run(case: Case, fault: Fault, directory: Path, watched: bool) -> Run:
    """Both tasks, from a fixed seed, up to the end or an error; then one more batch without anything."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    interrupt = signal.getsignal(signal.SIGINT)
    module, witness, arm = case.kind.make_module(), Witness(), Arm(fault)
    done = Run({}, witness.batches, "", None, [], [], 0, 0)
    callbacks: list[Any] = [arm]
    if watched:
        watching = case.watching(None if case.own_directory else str(directory))
        done.monitors = [each for each in watching if hasattr(each, "records")]
        first = First(done)
        callbacks += [first, *watching, Last(first)]
    breaking = Breaking(case.images)
    loggers = [breaking, CSVLogger(directory, name="", version="")]
    settings = case.settings | dict(case.kind.expectation.settings)
    loaders = case.kind.make_loaders()
    for loader in loaders:
        arm_loader(loader, fault)
    last: Any = None
    with warnings.catch_warnings(record=True) as caught, armed(fault if watched or fault.in_training else None) as live:
        warnings.simplefilter("always")
        try:
            callbacks += [*case.extras(), witness]
            for loader in loaders:
                last = trainer(callbacks, logger=loggers, **settings)
                last.fit(module, loader)
        except Hung:
            raise
        except BaseException as error:
            done.error = described(error)
        done.fired, done.count = live.fired, live.count
        rows = csv_rows(directory) if (directory / "metrics.csv").exists() else []
        left = {"logged": breaking.rows, "rows": rows, "left over": arm.left, "measuring": is_measuring()}
        done.directory = directory
        done.outcome = outcome(module, witness, last) | left
        done.told = [str(warning.message) for warning in caught]
        signal.signal(signal.SIGINT, interrupt)
        done.again = _again(module, case, settings)
    return done


def described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _again(module: Any, case: Case, settings: dict[str, Any]) -> Any:
    """The module is of use after all: its weights after another batch, or why there are none."""
    LIVE.fault = None
    try:
        trainer([], **{**settings, "limit_train_batches": 1, "max_epochs": 1}).fit(module, case.kind.make_loaders()[0])
    except Hung:
        raise
    except BaseException as error:
        return described(error)
    return {name: bits(tensor) for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
