"""What each method of a study costs: CPU time of a training step without monitors, as a ratio to plain training.

Methods take turns in an order that changes every round; ratios are taken round by round. A round is two tasks of each
method, so that what acts at boundaries is in it. One thread.

Run: python -m benchmarks.methods examples/study_digits.yaml > benchmarks/methods.txt
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.overhead import interval
from lightning_plasticity.study import load_study
from lightning_plasticity.study.build import importable
from lightning_plasticity.study.config import Unit
from lightning_plasticity.study.surroundings import one_unit
from lightning_plasticity.study.unit import TRAINER_DEFAULTS, assemble

TASKS = 2


class Clock(Callback):
    """CPU seconds of training, without setting up."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time() - self.started
        self.steps += trainer.global_step


def step_seconds(unit: Unit, epochs: int) -> float:
    """CPU seconds of one training step, the mean over two tasks."""
    seed_everything(unit.seed, verbose=False)
    parts = assemble(replace(unit, settings=unit.settings | {"measure": [], "fits": "per_task"}), Path("unused"))
    clock = Clock()
    for task in range(min(TASKS, parts.num_tasks)):
        parts.stream.task_id = task
        arguments: dict[str, Any] = TRAINER_DEFAULTS | unit.settings["trainer"] | {"max_epochs": epochs}
        callbacks = [callback for callback in parts.callbacks if callback is not parts.rows]
        Trainer(**arguments, callbacks=[clock, *callbacks]).fit(parts.module, datamodule=parts.stream)
    return clock.seconds / clock.steps


def measure(units: Sequence[Unit], epochs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by method, one number for each round; a first round is thrown away."""
    found: dict[str, list[float]] = {unit.method: [] for unit in units}
    order = random.Random(0)
    for round_index in range(rounds + 1):
        for unit in order.sample(list(units), len(units)):
            seconds = step_seconds(unit, epochs if round_index else 1)
            if round_index:
                found[unit.method].append(seconds)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=6, help="of each of the two tasks")
    parser.add_argument("--reference", help="method that the ratios are to (default the first)")
    parser.add_argument("--quick", action="store_true", help="two rounds of one epoch")
    given = parser.parse_args(arguments)
    rounds, epochs = (2, 1) if given.quick else (given.rounds, given.epochs)
    study = load_study(given.config)
    reference = given.reference or next(iter(study.methods))
    units = [Unit(method, study.seeds[0], settings, study.search) for method, settings in study.methods.items()]
    with tempfile.TemporaryDirectory() as directory, importable(study.search), one_unit(1, Path(directory) / "log"):
        found = measure(units, epochs, rounds)
    print(f"{rounds} rounds, {epochs} epoch(s) of {TASKS} tasks; torch {torch.__version__}, one thread, CPU time")
    print(f"medians, ratio to {reference} with the 95 % interval of the median")
    for method, seconds in found.items():
        ratios = [value / plain for value, plain in zip(seconds, found[reference], strict=True)]
        print(f"  {method:20s} {1e3 * statistics.median(seconds):7.3f} ms per step, ratio {interval(ratios)}")


if __name__ == "__main__":
    main()
