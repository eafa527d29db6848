"""Rank correlations of a measure with the outcome of the tasks ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_plasticity.study.prediction.runs import RESAMPLES, Run, Score, bootstrap, mean, runs
from lightning_plasticity.study.table import TableRow


@dataclass(frozen=True)
class Correlation:
    """How a measure goes with the outcome some tasks ahead.

    Attributes:
        measure: column of the table.
        ahead: 1 for the task about to begin, 2 for the one after it.
        pairs: (boundary, run) pairs in which measure, last outcome and outcome ahead are all known.
        runs: that they come from.
        pooled: Spearman's correlation over all pairs.
        within: the mean over runs of Spearman's correlation over a run's own pairs.
        partial: Spearman's partial correlation over all pairs, given the last outcome (of ranks).
        last_pooled: ``pooled`` of the last outcome, the trivial predictor, on the same pairs.
        last_within: ``within`` of the last outcome.
    """

    measure: str
    ahead: int
    pairs: int
    runs: int
    pooled: Score
    within: Score
    partial: Score
    last_pooled: Score
    last_within: Score


def correlation(
    rows: Sequence[TableRow],
    measure: str,
    outcome: str = "online_accuracy",
    ahead: int = 1,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Correlation:
    """Spearman correlations of a measure with the outcome ahead, beside those of the last outcome.

    Args:
        rows: of a study, all runs that are to be pooled.
        measure: column; of ``end...`` columns, and of the outcome itself, the value of the task before is taken.
        outcome: column.
        ahead: 1 or 2 tasks.
        resamples: of the bootstrap over runs.
        seed: of the bootstrap.
    """
    blocks = [block for run in runs(rows, measure, outcome) if len(block := _pairs(run, ahead)) > 0]
    within = np.array([[_spearman(b[:, 0], b[:, 2]), _spearman(b[:, 1], b[:, 2])] for b in blocks]).reshape(-1, 2)

    def statistics(chosen: np.ndarray) -> np.ndarray:
        joined = np.concatenate([blocks[k] for k in chosen]) if len(chosen) else np.zeros((0, 3))
        with_measure, with_last = _spearman(joined[:, 0], joined[:, 2]), _spearman(joined[:, 1], joined[:, 2])
        between = _spearman(joined[:, 0], joined[:, 1])
        means = [mean(within[chosen, k]) for k in (0, 1)]
        return np.array([with_measure, means[0], _partial(with_measure, between, with_last), with_last, means[1]])

    scores = bootstrap(statistics, len(blocks), resamples, seed)
    return Correlation(measure, ahead, sum(map(len, blocks)), len(blocks), *scores)


def _pairs(run: Run, ahead: int) -> np.ndarray:
    """(K, 3) measure, last outcome, outcome ahead, where all are known."""
    length = len(run.outcome) - (ahead - 1)
    table = np.stack([run.measure[:length], run.last[:length], run.outcome[ahead - 1 :]], axis=1)
    known: np.ndarray = table[np.isfinite(table).all(1)]
    return known


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """NaN for fewer than three pairs, or where one of the two does not vary."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _partial(ab: float, ac: float, bc: float) -> float:
    """Correlation of a and b given c; NaN where c tells all of one of them."""
    left = (1 - ac**2) * (1 - bc**2)
    return (ab - ac * bc) / math.sqrt(left) if left > 1e-12 else math.nan
