"""An alarm on a measure: how far ahead of a fall it sounds, and how often for nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from lightning_plasticity.study.prediction.runs import RESAMPLES, Score, bootstrap, mean, runs
from lightning_plasticity.study.table import TableRow

FIRST_TASK = 3  # before it, no alarm: a fresh network's measures say little
DROP = 0.2


@dataclass(frozen=True)
class Alarm:
    """An alarm that sounds where a measure has fallen to a share of its best so far, tried on seeds it was not set on.

    Attributes:
        measure: column of the table.
        falling: runs whose outcome falls.
        steady: runs whose outcome does not.
        detected: share of the falling runs with an alarm at or before the start of the task of the fall.
        lead: tasks from the alarm to the fall, mean over the falling runs that had an alarm at any time; 0 for an alarm
            at the start of the task of the fall, negative for a late one.
        false_alarms: share of the steady runs with an alarm.
        thresholds: least and largest share of the best that was chosen, over the seeds left out.
        higher_is_better: whether most of these choices took a large value for healthy.
    """

    measure: str
    falling: int
    steady: int
    detected: Score
    lead: Score
    false_alarms: Score
    thresholds: tuple[float, float]
    higher_is_better: bool


def alarm(
    rows: Sequence[TableRow],
    measure: str,
    outcome: str = "online_accuracy",
    *,
    drop: float = DROP,
    first_task: int = FIRST_TASK,
    threshold: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Alarm:
    """An alarm on a measure, its threshold chosen for each seed on all the others (leave-seeds-out).

    A run falls in the first task whose outcome is at most ``1 - drop`` of its best so far. The alarm sounds at the
    first boundary, from ``first_task`` on, where the measure is at most a share of its best so far; for measures that
    are small in health, where the least so far is at most that share of it. Share and direction are those with the
    most detected minus false alarms on the other seeds: the middle of the widest range of shares that do equally well.

    Args:
        rows: of a study: runs that fall and runs that do not.
        measure: column.
        outcome: column.
        drop: of the outcome, relative to its best so far.
        first_task: index of the first task before which it may sound.
        threshold: a share that was chosen elsewhere, of a measure that is large in health; None to choose as above.
        resamples: of the bootstrap over runs.
        seed: of the bootstrap.
    """
    found = runs(rows, measure, outcome)
    falls = np.array([fall(run.outcome, drop) for run in found])
    shares = {up: _joined([_shares(run.measure, up, first_task) for run in found]) for up in (True, False)}
    seeds = np.array([run.seed for run in found])
    detected, lead, false = (np.full(len(found), math.nan) for _ in range(3))
    chosen = []
    for left_out in np.unique(seeds):
        train = seeds != left_out
        choice: tuple[float, bool] | None = None if threshold is None else (threshold, True)
        if choice is None:
            choice = _choose({up: table[train] for up, table in shares.items()}, falls[train])
        if choice is None:
            continue
        chosen.append(choice)
        for k in np.flatnonzero(~train):
            when = _first(shares[choice[1]][k], choice[0])
            detected[k], lead[k], false[k] = _verdict(when, falls[k])

    def statistics(picked: np.ndarray) -> np.ndarray:
        return np.array([mean(values[picked]) for values in (detected, lead, false)])

    scores = bootstrap(statistics, len(found), resamples, seed)
    limits = [share for share, _ in chosen] or [math.nan]
    ups = [up for _, up in chosen]
    falling = int(np.isfinite(falls).sum())
    return Alarm(
        measure,
        falling,
        len(found) - falling,
        detected=scores[0],
        lead=scores[1],
        false_alarms=scores[2],
        thresholds=(min(limits), max(limits)),
        higher_is_better=2 * sum(ups) >= max(1, len(ups)),
    )


def fall(outcome: np.ndarray, drop: float = DROP) -> float:
    """Index of the task of the fall; infinite for none."""
    fallen = outcome <= (1 - drop) * np.fmax.accumulate(outcome)
    return float(np.argmax(fallen)) if fallen.any() else math.inf


def _shares(measure: np.ndarray, up: bool, first_task: int) -> np.ndarray:
    """(T,) how much of the best so far is left, in [0, 1]; NaN where there is no alarm to expect."""
    known = np.isfinite(measure) & (measure >= 0)
    values = np.where(known, measure, np.nan)
    best = np.fmax.accumulate(values) if up else np.fmin.accumulate(values)
    high, low = (best, values) if up else (values, best)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(high == 0, 1.0, low / high)
    shares = np.where(known, shares, np.nan)
    shares[:first_task] = np.nan
    return shares


def _joined(series: list[np.ndarray]) -> np.ndarray:
    """(R, T) of runs that may be of unequal length; NaN behind the end."""
    table = np.full((len(series), max(map(len, series), default=0)), math.nan)
    for row, values in zip(table, series, strict=True):
        row[: len(values)] = values
    return table


def _first(shares: np.ndarray, threshold: float) -> float:
    """Index of the task at whose start the alarm sounds; infinite for never."""
    with np.errstate(invalid="ignore"):
        sounding = shares <= threshold
    return float(np.argmax(sounding)) if sounding.any() else math.inf


def _verdict(when: float, fall: float) -> tuple[float, float, float]:
    """Detected, lead, false alarm; NaN where the question does not arise."""
    if math.isinf(fall):
        return math.nan, math.nan, float(math.isfinite(when))
    return float(when <= fall), fall - when if math.isfinite(when) else math.nan, math.nan


def _choose(shares: dict[bool, np.ndarray], falls: np.ndarray) -> tuple[float, bool] | None:
    """Threshold and direction for runs (R,) with shares (R, T); None where they do not vary."""
    best: tuple[tuple[float, float], float, bool] | None = None
    for up, table in shares.items():
        values = np.unique(table[np.isfinite(table)])
        if len(values) < 2:
            continue
        gains = _gains(table, falls, (values[:-1] + values[1:]) / 2)
        for gain, group in groupby(range(len(gains)), gains.__getitem__):  # neighbours that do equally well
            places = list(group)
            low, high = float(values[places[0]]), float(values[places[-1] + 1])
            if best is None or (gain, high - low) > best[0]:
                best = (gain, high - low), (low + high) / 2, up
    return None if best is None else best[1:]


def _gains(shares: np.ndarray, falls: np.ndarray, thresholds: np.ndarray) -> list[float]:
    """Share detected minus share of false alarms, for each threshold."""
    left = np.where(np.isfinite(shares), shares, np.inf)[:, :, None] > thresholds  # (R, T, K)
    when = np.where(left.all(1), np.inf, np.argmin(left, 1))  # (R, K)
    falling = np.isfinite(falls)
    gains = np.zeros(len(thresholds))
    if falling.any():
        gains += (when[falling] <= falls[falling, None]).mean(0)
    if not falling.all():
        gains -= np.isfinite(when[~falling]).mean(0)
    found: list[float] = gains.round(9).tolist()
    return found
