"""A case by its number: a module of the zoo, settings of the Trainer, monitors with settings of theirs, and a fault."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import lightning as L
from zoo import KINDS, Kind

from fuzz.faults import MEMORY_PLACES, PLACES, Fault
from lightning_plasticity import (
    EveryNEpochs,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    Regularization,
    TaskTracker,
)


@dataclass(frozen=True)
class Case:
    """All that makes a run, in plain Python; every run makes its own callbacks."""

    number: str
    kind: Kind
    settings: dict[str, Any]
    schedule: tuple[str, int]
    monitors: list[tuple[str, dict[str, Any]]]
    given: bool  # whether monitors get the data from the user
    images: bool
    l2er: bool
    own_directory: bool
    fault: Fault

    def extras(self) -> list[L.Callback]:
        """Callbacks of both runs."""
        return [Regularization.l2er(rank_every_n_steps=2)] if self.l2er else []

    def watching(self, save_dir: str | None) -> list[Any]:
        """Monitors, and what finds the boundaries."""
        classes: Any = {"hessian": HessianSpectrumMonitor, "features": FeatureRankMonitor}
        data = self.kind.make_loaders()[0] if self.given else None
        name, n = self.schedule
        schedules: dict[str, Any] = {"epochs": EveryNEpochs, "steps": EveryNSteps}
        tracker = [TaskTracker(schedules[name](n))] if name in schedules else []
        made = [classes[name](**settings, data=data, save_dir=save_dir) for name, settings in self.monitors]
        return [*tracker, *made]


def draw(seed: int, index: int) -> Case:
    """Case ``index`` of a seed; kinds of failure take turns, the rest is drawn."""
    rng = random.Random(f"{seed}, {index}")
    row = list(PLACES)[index % len(PLACES)]
    place = rng.choice(MEMORY_PLACES) if row == "out of memory" else row
    nth = max(1, round(2 ** rng.uniform(0, 7)))
    fault = Fault(row, place, rng.choice(PLACES[row]), nth, rng.random() < 0.5, rng.randrange(1000))
    kind = rng.choice(KINDS)
    settings: dict[str, Any] = {
        "precision": rng.choice(["32-true", "32-true", "bf16-mixed", "64-true", "bf16-true"]),
        "accumulate_grad_batches": rng.choice([1, 1, 2, 3]),
        "gradient_clip_val": rng.choice([None, None, 0.05]),
        "max_epochs": rng.choice([1, 2]),
        "limit_train_batches": rng.choice([1.0, 1.0, 2, 1]),
    }
    if settings["gradient_clip_val"]:
        settings["gradient_clip_algorithm"] = rng.choice(["norm", "value"])
    schedule = rng.choice([("fits", 1), ("fits", 1), ("epochs", 1), ("epochs", 2), ("steps", 2)])
    monitors = [_hessian(rng, "a"), _features(rng, "a")]
    monitors += rng.choice([[], [], [_hessian(rng, "b")], [_features(rng, "b")]])
    flags = [rng.random() < share for share in (0.15, 0.2, 0.25, 0.5)]
    return Case(f"{seed}:{index}", kind, settings, schedule, monitors, *flags, fault)


def _shared(rng: random.Random, name: str) -> dict[str, Any]:
    return {
        "probe_samples": rng.choice([1, 2, 5, 12, 512]),
        "when": rng.choice([("start", "end"), ("start", "end"), "start", "end"]),
        "every_n_tasks": rng.choice([1, 1, 1, 2]),
        "mode": rng.choice(["frozen", "frozen", "as_is", "eval"]),
        "name": rng.choice([name, name, None]) if name == "a" else name,
    }


def _hessian(rng: random.Random, name: str) -> tuple[str, dict[str, Any]]:
    quantities = ["ggn", "hessian", "ntk"]
    return "hessian", _shared(rng, name) | {
        "quantities": tuple(rng.sample(quantities, rng.randint(1, 3))),
        "num_steps": rng.choice([1, 3, 8, 80]),
        "max_rows": rng.choice([1, 8, 1024]),
        "max_seconds": rng.choice([None, None, 0.05]),
        "max_memory": rng.choice([None, 2**28]),
        "seed": rng.randrange(3),
    }


def _features(rng: random.Random, name: str) -> tuple[str, dict[str, Any]]:
    return "features", _shared(rng, name) | {
        "dormant_tau": rng.choice([0.025, (0.025, 0.1)]),
        "conv": rng.choice(["positions", "flatten"]),
    }
