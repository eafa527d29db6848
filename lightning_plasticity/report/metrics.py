"""What a Trainer's loggers wrote beside the records: accuracy, loss or return over steps, and its mean in each task."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plasticity.records import FILE_NAME, TaskRecord
from lightning_plasticity.report.find import LARGEST

NAMED = re.compile(r"(?i:(?<![a-z])(acc|accuracy|return|reward|f1|auroc|loss|error|perplexity)(?![a-z]))")
NEW_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in BinaryF1Score, valLoss, MSELoss
LOW_IS_GOOD = re.compile(r"loss|error|perplexity", re.I)
OWN = "plasticity/"  # keys of the monitors, which are in the records already
TASK = "plasticity/task"
MAX_SERIES = 40
MAX_POINTS = 600  # of a series in the figure; more are means of neighbours
MAX_BYTES = 300e6  # of an event file, which pictures and histograms can make large
Row = tuple[int, dict[str, float]]  # step, and what was logged at it


def read_metrics(
    directory: Path, records: Sequence[TaskRecord], names: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray[Any, Any]], list[str], list[str]]:
    """Series by name, each (points, 3): task, cumulative step, value; names of what else is logged; and problems.

    ``metrics.csv`` (CSVLogger) and event files (TensorBoard) in the directory, or below it, or, where there are none,
    in the directory above. A task's rows are those after the monitors' own row that tells the task; without such rows
    those from the task's first step on. A Trainer of its own for each task counts steps from 0: these are moved.

    Args:
        directory: of the records.
        records: of the run, for the steps at which its tasks begin.
        names: the series to read; without any those that are named for an accuracy, a return or a loss.
    """
    starts: dict[int, int] = {}
    for record in records:
        starts[record.task] = min(record.step, starts.get(record.task, record.step))
    found: dict[str, dict[int, tuple[int, float]]] = {}
    others: set[str] = set()
    problems: list[str] = []
    for files, read in ((_near(directory, "metrics.csv"), _csv), (_near(directory, "*tfevents*"), _events)):
        known = set(found)  # one logger is enough for a series
        newest: dict[str, int] = {}
        task = min(starts, default=0)
        for file in files:
            marked = moved = False
            back = ""
            try:
                for step, values in read(file):
                    if abs(marker := values.get(TASK, math.nan)) <= LARGEST:
                        moved = moved and int(marker) == task
                        task, marked = int(marker), True
                    elif not marked:
                        task = max((k for k, start in starts.items() if start <= step), default=task)
                    for name, value in values.items():
                        if name.startswith(OWN) and name not in names:
                            continue
                        if not (name in names if names else _is_named(name)):
                            others.add(name)
                        elif name not in known:
                            if step < newest.get(name, step) and not marked and len(starts) > 1:
                                back = back or f"{name} goes back from step {newest[name]} to {step}"
                            newest[name] = step
                            moved = moved or step < starts.get(task, 0)
                            found.setdefault(name, {})[step + moved * starts.get(task, 0)] = (task, value)
            except Exception as error:  # half a file, or one of another program
                problems.append(f"{file} could be read in part at most ({type(error).__name__}: {str(error)[:150]}).")
            if back:
                problems.append(
                    f"{file}: {back}, and no row of {TASK} tells the task, so values may be at the wrong one; of one "
                    "step the last counts. That is right for a resumed run, but a Trainer made anew for each task "
                    "counts from 0 again: let it have the logger that the monitors write to."
                )
    order = sorted(found, key=_order)
    series = {name: np.array([(task, at, x) for at, (task, x) in sorted(found[name].items())], float) for name in order}
    if len(order) > MAX_SERIES:
        problems.append(
            f"{directory}: {len(order)} series are logged; shown are {MAX_SERIES}. Name others by --metric."
        )
    rest = sorted(others, key=lambda name: (not _is_named(name), name))
    return dict(list(series.items())[:MAX_SERIES]), rest, problems


def task_means(series: np.ndarray[Any, Any]) -> dict[int, float]:
    """By task the mean of a series' finite values in it."""
    finite = series[np.isfinite(series[:, 2])]
    return {int(task): float(finite[finite[:, 0] == task, 2].mean()) for task in np.unique(finite[:, 0])}


def thinned(series: np.ndarray[Any, Any]) -> tuple[list[float], list[float]]:
    """Steps and values for a figure; of more than ``MAX_POINTS`` means of neighbours."""
    finite = series[np.isfinite(series[:, 2])]
    if len(finite) > MAX_POINTS:
        finite = np.array([part.mean(0) for part in np.array_split(finite, MAX_POINTS)])
    return [round(float(x), 1) for x in finite[:, 1]], [float(f"{x:.6g}") for x in finite[:, 2]]


def _is_named(name: str) -> bool:
    """Whether a series is named for an accuracy, a return or a loss: val_acc, trainLoss, MulticlassAccuracy."""
    return bool(NAMED.search(NEW_WORD.sub("_", name)))


def _order(name: str) -> tuple[bool, bool, str]:
    """Accuracies before losses, means of epochs before single steps."""
    return bool(LOW_IS_GOOD.search(name)), name.endswith("_step"), name


def _near(directory: Path, pattern: str) -> list[Path]:
    """Files in the directory, or below it outside other runs, or else above it; in the order they were begun."""
    here = list(directory.glob(pattern))
    here += [
        file
        for deeper in ("*/", "*/*/")
        for file in directory.glob(deeper + pattern)
        if not any((place / FILE_NAME).exists() for place in (file.parent, file.parent.parent) if place != directory)
    ]
    return sorted(here or directory.parent.glob(pattern))


def _csv(file: Path) -> Iterator[Row]:
    """The rows of CSVLogger's file; a last one cut short has fewer cells or half a number, and is left out."""
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    wrong = 0
    for row in csv.DictReader(whole.splitlines()):
        step = _number(row.pop("step", None))
        values = {name: _number(x) for name, x in row.items() if name and isinstance(x, str) and x.strip()}
        if abs(step) <= LARGEST:
            yield int(step), values
        else:
            wrong += math.isfinite(step)  # others are rows without a step
    if wrong:
        raise ValueError(f"{wrong} row(s) are at a step that no run reaches")
    if whole != text:
        raise ValueError("its last line was cut short")


def _events(file: Path) -> Iterator[Row]:
    """The scalars of an event file, up to where it breaks off."""
    # Slow to import, and only needed where there is such a file.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.stat().st_size / 1e6:.0f} MB are more than the report reads")
    event = None
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, {value.tag: value.simple_value}
            elif value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                yield event.step, {value.tag: float(make_ndarray(value.tensor).item())}
    if event is None and file.stat().st_size:
        raise ValueError("it holds no events")


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
