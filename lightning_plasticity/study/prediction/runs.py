"""Runs of a study as a measure and an outcome over tasks; scores with bootstrap intervals over runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_plasticity.study.table import TableRow, per_run

RESAMPLES = 500


@dataclass(frozen=True)
class Score:
    """A number with its 95 % bootstrap interval over runs."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Run:
    """One run; all three arrays are (T,), over tasks."""

    seed: int
    measure: np.ndarray  # (T,) known at the boundary before task t
    last: np.ndarray  # (T,) outcome of task t - 1
    outcome: np.ndarray  # (T,)


def runs(rows: Sequence[TableRow], measure: str, outcome: str) -> list[Run]:
    """All runs of a table; what is known after a task only is moved to the next, where it is known before."""
    measures, outcomes = per_run(rows, measure), per_run(rows, outcome)
    known_after = measure == outcome or measure.startswith(("end", "online_"))
    found = []
    for method, runs in outcomes.items():
        for seed, series in runs.items():
            values = np.array(measures[method][seed])
            result = np.array(series)
            found.append(Run(seed, _shifted(values) if known_after else values, _shifted(result), result))
    return found


def _shifted(values: np.ndarray) -> np.ndarray:
    """What was known after a task is known before the next."""
    return np.concatenate([[math.nan], values[:-1]])


def bootstrap(statistics: Callable[[np.ndarray], np.ndarray], runs: int, resamples: int, seed: int) -> list[Score]:
    """Scores on all runs, with 95 % percentile intervals over resampled runs."""
    random = np.random.default_rng(seed)
    value = statistics(np.arange(runs))
    drawn = np.array([statistics(random.integers(0, runs, runs)) for _ in range(resamples if runs else 0)])
    scores = []
    for k, center in enumerate(value):
        known = drawn[:, k][np.isfinite(drawn[:, k])] if len(drawn) else np.zeros(0)
        lower, upper = np.percentile(known, (2.5, 97.5)) if len(known) and math.isfinite(center) else (math.nan,) * 2
        scores.append(Score(float(center), float(lower), float(upper)))
    return scores


def mean(values: np.ndarray) -> float:
    """Of what is known; NaN for nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
