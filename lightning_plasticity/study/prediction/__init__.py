"""How well a measure, taken before a task, tells how well that task will be learnt; beside the last task's accuracy.

A pure function of a study's table. All is said of the boundary before task t. Known there: measures at the start of t,
measures at the end of t - 1, and the outcome (e.g. online accuracy) of t - 1, which is the trivial predictor. To be
told: the outcome of t (one task ahead) and of t + 1 (two).

Intervals are percentiles of a bootstrap over runs: tasks of one run are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_plasticity.study.prediction.alarm import Alarm, alarm
from lightning_plasticity.study.prediction.correlation import Correlation, correlation
from lightning_plasticity.study.prediction.runs import RESAMPLES, Score
from lightning_plasticity.study.table import INDEX, TableRow, columns

__all__ = ["Alarm", "Correlation", "Score", "alarm", "correlation", "prediction_table"]


def prediction_table(
    rows: Sequence[TableRow],
    outcome: str = "online_accuracy",
    measures: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
) -> list[dict[str, float | str]]:
    """A row for each measure: its correlations one and two tasks ahead, and its alarm; the last outcome is one of them.

    Args:
        rows: of a study.
        outcome: column.
        measures: columns; None for all numbers that vary.
        resamples: of the bootstraps.

    Returns:
        Rows with ``measure`` and, for each score, ``<score>``, ``<score>_lower`` and ``<score>_upper``.
    """
    if measures is None:
        # Wall times are not the network's, and the number of steps is the stream's.
        left_out = {*INDEX, "steps", "seconds", "measuring_seconds"}
        measures = [key for key in columns(rows) if key not in left_out and not key.endswith(("_lower", "_upper"))]
    table: list[dict[str, float | str]] = []
    for measure in measures:
        values = [float(row[measure]) for row in rows if measure in row]
        if len(set(values)) < 2:
            continue
        line: dict[str, float | str] = {"measure": measure}
        for ahead in (1, 2):
            found = correlation(rows, measure, outcome, ahead, resamples=resamples)
            for name in ("pooled", "within", "partial", "last_pooled", "last_within"):
                line |= _columns(f"{name}_{ahead}", getattr(found, name))
        sounded = alarm(rows, measure, outcome, resamples=resamples)
        for name in ("detected", "lead", "false_alarms"):
            line |= _columns(name, getattr(sounded, name))
        line |= {"falling": sounded.falling, "steady": sounded.steady}
        line |= {"threshold_min": sounded.thresholds[0], "threshold_max": sounded.thresholds[1]}
        line["higher_is_better"] = float(sounded.higher_is_better)
        table.append(line)
    return table


def _columns(name: str, score: Score) -> dict[str, float]:
    return {name: score.value, f"{name}_lower": score.lower, f"{name}_upper": score.upper}
