"""Health at a glance: where each measure stands, against the best of its own run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_plasticity.report.find import Run
from lightning_plasticity.report.sections import label
from lightning_plasticity.report.series import Line, Points

# Shares of a run's best below which PlasticityAlert would sound, with what they were worth: docs/studies/prediction.md.
THRESHOLDS = {r"features/srank": 0.946, r"online_[^/]+": 0.87}
Best = Literal["highest", "lowest", "first"]
# Pattern of the measure, and which of its values is best so far; the first where neither end is.
WATCHED: tuple[tuple[str, Best], ...] = (
    (r"(online|end)_[^/]*(loss|error|perplexity)[^/]*", "lowest"),
    (r"online_(?!.*(loss|error|perplexity))[^/]+", "highest"),
    (r"end_(?!.*(loss|error|perplexity))[^/]+", "highest"),
    (r"ggn/eps_rank_0\.01", "highest"),
    (r"hessian/eps_rank_0\.01", "highest"),
    (r"features/effective_rank", "highest"),
    (r"features/srank", "highest"),
    (r"features/dead_units", "lowest"),
    (r"weights/norm", "first"),
    (r"trainability/gap_to_fresh", "lowest"),
)


@dataclass(frozen=True)
class Fact:
    """One measure of one group: means over its runs, and what is worth a word.

    Attributes:
        name: of the measure.
        last: value at the last task it was measured at.
        best: best value of each run so far; the first value where no end is best.
        best_is: ``"highest"``, ``"lowest"`` or ``"first"``.
        share: last / best, NaN where that says nothing.
        note: at which tasks, and a threshold that it is beyond.
    """

    name: str
    last: float
    best: float
    best_is: Best
    share: float
    note: str


def facts_of(group: str, measures: Mapping[str, Sequence[Line]]) -> list[Fact]:
    """What there is to say of a group, one line for each of the main measures that it has."""
    found = []
    for pattern, best_is in WATCHED:
        # Without the usual threshold, the first that there is.
        keys = [key for key in measures if re.fullmatch(pattern, key)]
        if not keys and "eps_rank" in pattern:
            keys = [key for key in measures if re.match(pattern.replace(r"0\.01", ""), key)][:1]
        for key in keys:
            lines = [line for line in measures[key] if line.group == group and "fresh" not in line.variant]
            if lines:
                fact = _fact(key, lines[0], best_is)
                found += [fact] if fact else []
    return found


def _fact(key: str, line: Line, best_is: Best) -> Fact | None:
    runs = [finite for points in line.runs.values() if (finite := _finite(points))]
    if not runs:
        return None
    ends = [(max(values), _best_task(values, best_is)) for values in runs]
    lasts = [values[last] for values, (last, _) in zip(runs, ends, strict=True)]
    bests = [values[at] for values, (_, at) in zip(runs, ends, strict=True)]
    shares = [last / top for last, top in zip(lasts, bests, strict=True) if top > 0 and best_is == "highest"]
    share = sum(shares) / len(shares) if len(shares) == len(runs) else math.nan
    notes = [f"task {ends[0][0]}; {best_is} at task {ends[0][1]}"] if len(runs) == 1 else []
    threshold = next((limit for pattern, limit in THRESHOLDS.items() if re.fullmatch(pattern, key)), 0.0)
    below = sum(share < threshold for share in shares)
    if below:
        whose = "" if len(runs) == 1 else f" in {below} of {len(runs)} runs"
        notes.append(f"below {threshold} of its best{whose}")
    name = label(key) + (f" ({line.variant})" if line.variant else "")
    return Fact(name, sum(lasts) / len(lasts), sum(bests) / len(bests), best_is, share, "; ".join(notes))


def _best_task(values: Mapping[int, float], best_is: Best) -> int:
    if best_is == "first":
        return min(values)
    return (max if best_is == "highest" else min)(values, key=values.__getitem__)


def _finite(points: Points) -> dict[int, float]:
    return {task: point.value for task, point in points.items() if math.isfinite(point.value)}


def alerts_of(run: Run) -> list[dict[str, Any]]:
    """Each alert of a run, for JSON: what it watches, and its ratio and state over tasks."""
    found: dict[str, dict[str, Any]] = {}
    for record in run.records:
        values = {key.rpartition("/")[2]: value.value for key, value in record.values.items() if "/alert/" in key}
        if "active" not in values:
            continue
        about = record.settings
        identity = f"{record.monitor} {about.get('identity')} {record.phase}"
        fraction = about.get("fraction")
        alert = found.setdefault(
            identity,
            {
                "group": run.group,
                "run": run.name,
                "measure": str(about.get("measure", "an unnamed measure")).removeprefix("plasticity/"),
                "against": str(about.get("against", "its reference")),
                "fraction": fraction if isinstance(fraction, float | int) else None,
                "tasks": [],
                "ratio": [],
                "active": [],
            },
        )
        alert["tasks"].append(record.task)
        alert["ratio"].append(values.get("ratio", math.nan))
        alert["active"].append(values["active"] == 1)
    return list(found.values())
