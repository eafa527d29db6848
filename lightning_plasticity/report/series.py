"""Every measure over tasks: a line for each run, or the mean and band of a method's seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from lightning_plasticity.linalg import Estimate
from lightning_plasticity.report.caps import Caps, cap_of
from lightning_plasticity.report.find import Run
from lightning_plasticity.report.metrics import task_means

QUANTITIES = ("ggn", "hessian", "ntk", "features", "weights", "trainability", "alert")
DIGITS = 6
Points = dict[int, Estimate]  # by task


@dataclass(frozen=True)
class Line:
    """One measure of one group.

    Attributes:
        group: a method or a run.
        variant: what else tells lines apart: the end of a task, a fresh network, a monitor's name; ``""`` for none.
        runs: by run its values over tasks, none of them empty.
        caps: by run what its counts of eigenvalues cannot exceed, where the records tell.
    """

    group: str
    variant: str
    runs: Mapping[str, Points]
    caps: Mapping[str, Caps] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: tasks, values and the ends of intervals; of several runs means, 95 % bands and how many."""
        tasks = sorted({task for points in self.runs.values() for task in points})
        plain: dict[str, Any] = {"group": self.group, "variant": self.variant, "tasks": tasks}
        if len(self.runs) == 1:
            (points,) = self.runs.values()
            found = [[getattr(points[task], part) for task in tasks] for part in ("value", "lower", "upper")]
        else:
            table = {
                k: [points[task].value if task in points else math.nan for task in tasks]
                for k, points in enumerate(self.runs.values())
            }
            found = [list(part) for part in band(table)]
            finite = np.isfinite(np.array(list(table.values())))
            plain["runs"] = [int(count) for count in finite.sum(0)]
        values, lower, upper = ([to_json(x) for x in part] for part in found)
        exact = all(
            (low in (value, None) and high in (value, None))
            for value, low, high in zip(values, lower, upper, strict=True)
        )
        return plain | {"value": values} | ({} if exact else {"lower": lower, "upper": upper})

    def caps_to_plain(self) -> dict[str, Any]:
        """For JSON: by task the cap that all runs agree on, None where they do not."""
        tasks = sorted({task for points in self.runs.values() for task in points})
        agreed = [
            {self.caps.get(name, {}).get(task) for name, points in self.runs.items() if task in points}
            for task in tasks
        ]
        values = [next(iter(caps)) if len(caps) == 1 else None for caps in agreed]
        return {"group": self.group, "tasks": tasks, "value": [None if x is None else to_json(x) for x in values]}


def band(runs: Mapping[int, Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds with the ends of its 95 % interval of Student's t, each (tasks,).

    Tasks that some seeds have no value for are judged on the others; of one value the interval is NaN.
    """
    length = max(map(len, runs.values()))
    table = np.array([[*series, *[math.nan] * (length - len(series))] for series in runs.values()])
    count = np.isfinite(table).sum(0)
    known = np.where(np.isfinite(table), table, 0.0)
    mean = np.where(count > 0, known.sum(0) / np.maximum(count, 1), np.nan)
    squares = np.where(np.isfinite(table), (table - mean) ** 2, 0.0).sum(0)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    half = np.where(count > 1, stats.t.ppf(0.975, np.maximum(count - 1, 1)) * error, np.nan)
    return mean, mean - half, mean + half


def lines_by_measure(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """By measure (``ggn/eps_rank_0.01``, ``features/srank/net.1``, ``online_accuracy``) a line for each group."""
    found: dict[str, dict[tuple[str, str], tuple[dict[str, Points], dict[str, Caps]]]] = {}
    for run in runs:
        caps = _caps_of(run)
        for (measure, variant), points in points_of(run).items():
            of_runs, of_caps = found.setdefault(measure, {}).setdefault((run.group, variant), ({}, {}))
            of_runs[run.name] = points
            of_caps[run.name] = caps.get((measure, variant), {})
    return {
        measure: [Line(group, variant, *both) for (group, variant), both in lines.items()]
        for measure, lines in found.items()
    }


def _caps_of(run: Run) -> dict[tuple[str, str], Caps]:
    found: dict[tuple[str, str], Caps] = {}
    for record in run.records:
        for key in record.values:
            place = parse(key, record.phase)
            if (cap := cap_of(record, place[0])) is not None:
                found.setdefault(place, {})[record.task] = cap
    return found


def points_of(run: Run) -> dict[tuple[str, str], Points]:
    """By measure and variant the values of a run over tasks; rows of a study fill in for records that are gone."""
    found: dict[tuple[str, str], Points] = {}
    for task, row in sorted(run.rows.items()):
        for key, value in row.items():
            if not key.endswith(("_lower", "_upper")):
                lower, upper = row.get(f"{key}_lower", value), row.get(f"{key}_upper", value)
                phase = "end" if key.startswith("end/") else "start"
                found.setdefault(parse(key, phase), {})[task] = Estimate(value, lower, upper)
    for name, series in run.logged.items():
        means = task_means(series)
        if means:
            found[f"logged/{name}", ""] = {task: Estimate.exactly(mean) for task, mean in means.items()}
    for record in run.records:
        for key, estimate in record.values.items():
            place = parse(key, record.phase)
            if not place[0].startswith("alert/"):  # several alerts share their keys
                found.setdefault(place, {})[record.task] = estimate
    return found


@cache
def parse(key: str, phase: str) -> tuple[str, str]:
    """Measure and variant of a logged key: ``plasticity/end/val/fresh/ggn/trace`` is ggn/trace, "val, fresh, end"."""
    parts = key.removeprefix("plasticity/").split("/")
    variant = ["end of task"] if phase == "end" and "/" in key else []
    if phase == "end" and parts[0] == "end":
        parts = parts[1:]
    at = next((k for k, part in enumerate(parts) if part in QUANTITIES), 0)
    names = ["fresh network" if part == "fresh" else part for part in parts[:at]]
    return "/".join(parts[at:]), ", ".join(names + variant)


def to_json(x: float) -> float | int | str | None:
    """A number that JSON can hold: six digits; infinities by name, NaN as None."""
    if math.isnan(x):
        return None
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    short = float(f"{x:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 10**15 else short


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sorting key by which net.10 comes after net.9."""
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in re.split(r"(\d+)", text) if part]
