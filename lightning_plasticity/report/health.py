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
THRESHOLDS = {r"features/srank": 0.946, r"online_[^/]*acc[^/]*|logged/(?=.*train)(?=.*acc).*": 0.87}
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


Ends = tuple[float, float]  # of an interval that holds the value; equal where it is known


@dataclass(frozen=True)
class Fact:
    """One measure of one group: means over its runs, and what is worth a word.

    Attributes:
        name: of the measure.
        says: what it tells, in a few words.
        course: by task the mean over runs of the values that are known.
        last: value at the last task it was measured at.
        best: best value of each run so far; the first value where no end is best.
        best_is: ``"highest"``, ``"lowest"`` or ``"first"``, and of a single run at which task.
        share: last / best, NaN where that says nothing, as where the last task has no value or one at its cap.
        judged: whether there is a threshold for it.
        below: how its share stands to that threshold, empty where it is not below.
        caution: why the last value is not what it seems, empty where it is.
    """

    name: str
    says: str
    course: Mapping[int, float]
    last: Ends
    best: Ends
    best_is: str
    share: float
    judged: bool
    below: str
    caution: str


def facts_of(group: str, measures: Mapping[str, Sequence[Line]]) -> list[Fact]:
    """What there is to say of a group, one line for each of the main measures that it has."""
    found = []
    own = {key: [line for line in lines if line.group == group] for key, lines in measures.items()}
    last_task = max(
        (task for lines in own.values() for line in lines for run in line.runs.values() for task in run), default=0
    )
    for pattern, best_is, says in WATCHED:
        # Without the usual threshold, the first that there is.
        keys = [key for key in measures if re.fullmatch(pattern, key)]
        if not keys and "eps_rank" in pattern:
            keys = [key for key in measures if re.match(pattern.replace(r"0\.01", ""), key)][:1]
        for key in keys[:MOST_LOGGED] if pattern.startswith("logged") else keys:
            shown = _shown(key, own)
            fact = _fact(*shown, best_is, says, last_task) if shown else None
            found += [fact] if fact else []
    return found


def _shown(key: str, own: Mapping[str, Sequence[Line]]) -> tuple[str, Line, str] | None:
    """A measure and its line; of a count at its cap that of the next larger eps that is not, if any, and why."""
    lines = {one: line for one, of_one in own.items() for line in of_one[::-1] if "fresh" not in line.variant}
    if key not in lines:
        return None
    if full := _at_cap(lines[key]):
        before, eps = _split_eps(key)
        larger = {_split_eps(other)[1]: other for other in lines if _split_eps(other)[0] == before}
        for other in (larger[more] for more in sorted(larger) if more > eps):
            if not _at_cap(lines[other]):
                return other, lines[other], f"; > {eps:g} is {full}, so it cannot show more"
    return key, lines[key], ""


def _split_eps(key: str) -> tuple[str, float]:
    found = re.fullmatch(r"(.*eps_rank_)(\d+(\.\d+)?)", key)
    return (found[1], float(found[2])) if found else (key, math.nan)


def _at_cap(line: Line) -> str:
    """Such as "at its cap (320)" where a run's last count is all that it can be; empty elsewhere."""
    caps = []
    for name, points in line.runs.items():
        known = _known(points)
        cap = line.caps.get(name, {}).get(max(known), math.inf) if known else math.inf
        caps += [cap] if known and known[max(known)][0] > cap - 0.5 else []  # an estimate need not be whole
    if not caps:
        return ""
    whose = "" if len(caps) == len(line.runs) else f" in {len(caps)} of {len(line.runs)} runs"
    return f"at its cap ({spell((min(caps), max(caps)))}){whose}"


def _fact(key: str, line: Line, more: str, best_is: Best, says: str, last_task: int) -> Fact | None:
    runs = [known for points in line.runs.values() if (known := _known(points))]
    if not runs:
        return None
    lasts = [known[max(known)] for known in runs]
    bests = [_best(known, best_is) for known in runs]
    latest = max(task for known in runs for task in known)
    full = _at_cap(line)
    sure = not full and best_is == "highest"
    sure = sure and all(low == high for low, high in (*lasts, *bests)) and all(best > 0 for best, _ in bests)
    shares = [last / best for (last, _), (best, _) in zip(lasts, bests, strict=True)] if sure else []
    threshold = next((limit for pattern, limit in THRESHOLDS.items() if re.fullmatch(pattern, key)), 0.0)
    low = sum(share < threshold for share in shares)
    whose = "" if len(runs) == 1 else f" in {low} of {len(runs)} runs"
    best = _mean_ends(bests)
    at = f", task\N{NO-BREAK SPACE}{_task_of(runs[0], best[0])}" if len(runs) == 1 and best[0] == best[1] else ""
    caution = f"last is task {latest}: no value since" if latest < last_task else ""
    if full:
        samples = "" if key.startswith("hessian") else ", or measure more samples"
        caution = f"{full}, so it cannot show more: look at a larger eps{samples}"
    return Fact(
        name=label(key) + (f" ({line.variant})" if line.variant else ""),
        says=says + more,
        course=_course(runs),
        last=_mean_ends(lasts),
        best=best,
        best_is=best_is + at,
        share=_mean(shares) if shares and latest == last_task else math.nan,
        judged=threshold > 0 and bool(shares),
        below=f"below {threshold} of its best{whose}" if low else "",
        caution=caution,
    )


def _known(points: Points) -> dict[int, Ends]:
    """By task the value, or the ends of the interval where there is only one; nothing where there is neither."""
    found = {}
    for task, point in sorted(points.items()):
        low = -math.inf if math.isnan(point.lower) else point.lower
        high = math.inf if math.isnan(point.upper) else point.upper
        if math.isfinite(point.value):
            found[task] = point.value, point.value
        elif math.isnan(point.value) and (math.isfinite(low) or math.isfinite(high)):
            found[task] = low, high
    return found


def _best(known: Mapping[int, Ends], best_is: Best) -> Ends:
    """The best value, between these ends where a task's value may be better than all that are known."""
    if best_is == "first":
        return known[min(known)]
    pick = max if best_is == "highest" else min
    return pick(low for low, _ in known.values()), pick(high for _, high in known.values())


def _task_of(known: Mapping[int, Ends], value: float) -> int:
    return next(task for task, ends in known.items() if ends == (value, value))


def _course(runs: Sequence[Mapping[int, Ends]]) -> dict[int, float]:
    exact: dict[int, list[float]] = {}
    for known in runs:
        for task, (low, high) in known.items():
            if low == high:
                exact.setdefault(task, []).append(low)
    return {task: _mean(exact[task]) for task in sorted(exact)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_ends(ends: Sequence[Ends]) -> Ends:
    return _mean([low for low, _ in ends]), _mean([high for _, high in ends])


def spell(ends: Ends) -> str:
    """A number, or what is known of it: "17", "5926 to 11177", "at least 101"."""
    low, high = ends
    if low == high:
        return _number(low)
    if math.isinf(high):
        return f"at least {_number(low)}" if math.isfinite(low) else "unknown"
    return f"{_number(low)} to {_number(high)}" if math.isfinite(low) else f"at most {_number(high)}"


def _number(x: float) -> str:
    return f"{x:.0f}" if 1e3 <= abs(x) < 1e7 else f"{x:.4g}"


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
