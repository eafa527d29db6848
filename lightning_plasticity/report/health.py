"""Health at a glance: where each measure stands, against the best of its own run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_plasticity.report.find import Run
from lightning_plasticity.report.metrics import NAMED
from lightning_plasticity.report.sections import label
from lightning_plasticity.report.series import Line, Points

# Shares of a run's best below which PlasticityAlert would sound, with what they were worth: docs/studies/prediction.md.
THRESHOLDS = {r"features/srank": 0.946, r"online_[^/]+|logged/(?=.*train)(?=.*acc).*": 0.87}
Best = Literal["highest", "lowest", "first"]
LOW = r"(?i:.*(loss|error|perplexity).*)"
# Pattern of the measure, which of its values is best so far (the first where neither end is), and what it says.
WATCHED: tuple[tuple[str, Best, str], ...] = (
    (f"online_{LOW}", "lowest", "while a task is learnt; should not rise over tasks"),
    (f"online_(?!{LOW})[^/]+", "highest", "while a task is learnt; should not fall over tasks"),
    (f"end_{LOW}", "lowest", "of a task when it has been learnt; should not rise"),
    (f"end_(?!{LOW})[^/]+", "highest", "of a task when it has been learnt; should not fall"),
    (
        rf"logged/(?!{LOW})(?!.*_step$).*{NAMED.pattern}.*",
        "highest",
        "as the run logged it; should not fall over tasks",
    ),
    (rf"logged/(?!.*_step$){LOW}", "lowest", "as the run logged it; should not rise"),
    (r"ggn/eps_rank_0\.01", "highest", "directions with curvature; few are left after a collapse, and at task 0 too"),
    (r"hessian/eps_rank_0\.01", "highest", "the same of the whole Hessian"),
    (r"features/effective_rank", "highest", "directions in the hidden features; should not fall far"),
    (r"features/srank", "highest", "the same, counted; PlasticityAlert watches it"),
    (r"features/dead_units", "lowest", "share that is 0 on every sample and passes no gradient"),
    (r"weights/norm", "first", "tends to grow; says little by itself"),
    (r"trainability/gap_to_fresh", "lowest", "above 0: learns the new task worse than a fresh network"),
)
MOST_LOGGED = 2  # series of a kind on a card


@dataclass(frozen=True)
class Fact:
    """One measure of one group: means over its runs, and what is worth a word.

    Attributes:
        name: of the measure.
        says: what it tells, in a few words.
        course: by task the mean over runs.
        last: value at the last task it was measured at.
        best: best value of each run so far; the first value where no end is best.
        best_is: ``"highest"``, ``"lowest"`` or ``"first"``, and of a single run at which task.
        share: last / best, NaN where that says nothing, as where the last task has no value.
        judged: whether there is a threshold for it.
        below: how its share stands to that threshold, empty where it is not below.
        caution: why the last value is not what it seems, empty where it is.
    """

    name: str
    says: str
    course: Mapping[int, float]
    last: float
    best: float
    best_is: str
    share: float
    judged: bool
    below: str
    caution: str


def facts_of(group: str, measures: Mapping[str, Sequence[Line]]) -> list[Fact]:
    """What there is to say of a group, one line for each of the main measures that it has."""
    found = []
    own = [line for lines in measures.values() for line in lines if line.group == group]
    last_task = max((task for line in own for points in line.runs.values() for task in points), default=0)
    for pattern, best_is, says in WATCHED:
        # Without the usual threshold, the first that there is.
        keys = [key for key in measures if re.fullmatch(pattern, key)]
        if not keys and "eps_rank" in pattern:
            keys = [key for key in measures if re.match(pattern.replace(r"0\.01", ""), key)][:1]
        for key in keys[:MOST_LOGGED] if pattern.startswith("logged") else keys:
            lines = [line for line in measures[key] if line.group == group and "fresh" not in line.variant]
            if lines:
                fact = _fact(key, lines[0], best_is, says, last_task)
                found += [fact] if fact else []
    return found


def _fact(key: str, line: Line, best_is: Best, says: str, last_task: int) -> Fact | None:
    runs = [finite for points in line.runs.values() if (finite := _finite(points))]
    if not runs:
        return None
    ends = [(max(values), _best_task(values, best_is)) for values in runs]
    lasts = [values[last] for values, (last, _) in zip(runs, ends, strict=True)]
    bests = [values[at] for values, (_, at) in zip(runs, ends, strict=True)]
    shares = [last / top for last, top in zip(lasts, bests, strict=True) if top > 0 and best_is == "highest"]
    share = sum(shares) / len(shares) if len(shares) == len(runs) else math.nan
    threshold = next((limit for pattern, limit in THRESHOLDS.items() if re.fullmatch(pattern, key)), 0.0)
    low = sum(share < threshold for share in shares)
    whose = "" if len(runs) == 1 else f" in {low} of {len(runs)} runs"
    tasks = sorted({task for values in runs for task in values})
    latest = max(tasks)
    share = math.nan if latest < last_task else share
    return Fact(
        name=label(key) + (f" ({line.variant})" if line.variant else ""),
        says=says,
        course={task: _mean([values[task] for values in runs if task in values]) for task in tasks},
        last=_mean(lasts),
        best=_mean(bests),
        best_is=f"{best_is}, task\N{NO-BREAK SPACE}{ends[0][1]}" if len(runs) == 1 else best_is,
        share=share,
        judged=threshold > 0 and bool(shares),
        below=f"below {threshold} of its best{whose}" if low else "",
        caution=f"last is task {latest}: no value since, only intervals or nothing" if latest < last_task else "",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
