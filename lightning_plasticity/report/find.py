"""Which runs a directory holds, and what each has written: a log directory, a study, a demo, or a tree of these."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plasticity.records import FILE_NAME, TaskRecord, latest
from lightning_plasticity.report.search import search

SEED = re.compile(r"seed_?(\d+)")
NOT_MEASURES = ("method", "seed", "task")
LARGEST = 2**53  # of a step or a task; no run has more, and floats cannot tell them apart


class ReportError(ValueError):
    """Nothing to report on: says what was received, what was expected and what to do."""


@dataclass
class Run:
    """What one run has written.

    Attributes:
        group: what it is compared as: the method of a study or a demo, else the run's own name.
        name: of the run, unique in a report.
        directory: where its records are.
        records: what the monitors wrote, in the order of time.
        rows: by task what a study or a demo adds: accuracy and the like.
        problems: what could not be read, or why the run itself failed.
        settings: of a study's unit; empty elsewhere.
        logged: by name what its loggers wrote, each (points, 3): task, step, value.
        others: names of what they wrote besides.
    """

    group: str
    name: str
    directory: Path
    records: list[TaskRecord] = field(default_factory=list)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    logged: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """All runs in the directories, grouped by method where there are methods.

    Raises:
        ReportError: where a directory is missing or nothing in it was written by a monitor.
    """
    runs = []
    for directory in directories:
        if not directory.exists():
            raise ReportError(
                f"{directory} does not exist; pass a run's log directory, such as lightning_logs/version_0, or the "
                "--out directory of a study or a demo."
            )
        root = directory.parent if directory.is_file() else directory
        found, left_out = _study(root), ""
        if not found:
            found, left_out = _logs(root)
        if not found:
            raise ReportError(
                f"No {FILE_NAME} and no results.jsonl of a study in {directory}, nor below it; expected what a monitor "
                "(HessianSpectrumMonitor, FeatureRankMonitor, ...) writes to a run's log directory. Give the Trainer a "
                f"logger, or the monitors save_dir=, and pass that directory. {left_out}".rstrip()
            )
        found[0].problems += [left_out] if left_out else []
        if len(directories) > 1:
            _tell_apart(found, root.resolve().name)
        runs += found
    return _distinct(runs)


def _study(root: Path) -> list[Run]:
    """The units of a study: ``units/<method>/seed<s>``, with the rows of ``results.jsonl`` or of each unit's result."""
    lines, problems = _lines(root / "results.jsonl")
    table = [line for line in lines if _is_row(line)]
    if len(table) < len(lines):
        problems.append(f"{root / 'results.jsonl'}: {len(lines) - len(table)} line(s) are no rows of a study.")
    units = [path for path in sorted(root.glob("units/*/*")) if path.is_dir()]
    if not units and not table:
        return []
    rows: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in table:
        key = (str(row.get("method", "")), str(row.get("seed", 0)))
        rows.setdefault(key, {})[row["task"]] = _numbers(row)
    runs = {}
    for path in units:
        method, seed = path.parent.name, _seed(path.name)
        run = _read(path, method, f"{method}/{path.name}")
        result = _json(path / "result.json")
        own = dict(enumerate(map(_numbers, result["rows"]))) if isinstance(result.get("rows"), list) else {}
        run.rows = rows.pop((method, seed), {}) or own
        run.settings = _json(path / "settings.json").get("settings", {})
        if (path / "error.txt").is_file() and not result:
            run.problems.append((path / "error.txt").read_text(encoding="utf-8", errors="replace")[:2000])
        if run.rows or run.records or run.problems:
            runs[method, seed] = run
    for (method, seed), found in rows.items():  # of units whose directories are gone
        runs[method, seed] = Run(method, f"{method}/seed{seed}", root, rows=found)
    order = list(dict.fromkeys(str(row.get("method", "")) for row in table))
    order += [method for method, _ in runs if method not in order]
    ordered = [runs[key] for key in sorted(runs, key=lambda key: (order.index(key[0]), _whole(key[1], 0)))]
    if ordered:
        ordered[0].problems += problems
    return ordered


def _is_row(line: Mapping[str, Any]) -> bool:
    """Whether a line of ``results.jsonl``, a name that others use too, is a study's: a task of a method's seed."""
    task = line.get("task")
    whole = isinstance(task, int) and 0 <= task < LARGEST
    return whole and isinstance(line.get("method"), str) and isinstance(line.get("seed"), int)


def _logs(root: Path) -> tuple[list[Run], str]:
    """Every log directory at or below ``root``, those of a demo with its accuracies; and which were left out."""
    summary = _json(root / "summary.json").get("methods", {})
    runs = []
    files, left_out = search(root, FILE_NAME)
    for file in files:
        path = file.parent
        parts = path.relative_to(root).parts
        seeded = len(parts) > 1 and SEED.fullmatch(parts[-1])
        group = parts[-2] if seeded else "/".join(parts) or root.resolve().name
        run = _read(path, group, "/".join(parts[-2:] if seeded else parts) or group)
        numbers = summary.get(group) if isinstance(summary, dict) else None
        if isinstance(numbers, dict) and isinstance(numbers.get("online_accuracy"), list):
            run.rows = {k: {"online_accuracy": _number(x)} for k, x in enumerate(numbers["online_accuracy"])}
        runs.append(run)
    order = list(summary) if isinstance(summary, dict) else []
    return sorted(runs, key=lambda run: order.index(run.group) if run.group in order else len(order)), left_out


def _read(directory: Path, group: str, name: str) -> Run:
    plain, problems = _lines(directory / FILE_NAME)
    records, bad = [], 0
    for line in plain:
        try:
            records.append(_record(line))
        except (TypeError, ValueError, KeyError, OverflowError):
            bad += 1
    if bad:
        problems.append(f"{directory / FILE_NAME}: {bad} line(s) are no records of this package and were left out.")
    if replaced := _replaced(records):
        problems.append(
            f"{directory / FILE_NAME}: {replaced} record(s) were replaced by later ones of the same task and phase, "
            "made at another step or after the steps had begun anew; the later ones are shown. Callbacks that are made "
            "anew for each task count tasks from 0 each time: make them once and use them in all fits, or give each "
            "fit its own directory."
        )
    return Run(group, name, directory, latest(records), problems=problems)


def _replaced(records: Sequence[TaskRecord]) -> int:
    """How many records another run of the same monitors took the place of.

    A run that was resumed from a checkpoint measures boundaries again, too, but at the same steps, and not the first
    boundary once it has been past it.
    """
    steps: dict[tuple[str, str], dict[tuple[int, str], int]] = {}  # of each monitor, by boundary
    begun_anew: set[tuple[str, str]] = set()
    count = 0
    for record in records:
        monitor, boundary = (record.monitor, str(record.settings.get("identity"))), (record.task, record.phase)
        known = steps.setdefault(monitor, {})
        if boundary in known:
            first = boundary == next(iter(known))
            if record.step != known[boundary] or (first and record.step < max(known.values())):
                begun_anew.add(monitor)
            count += monitor in begun_anew
        known[boundary] = record.step
    return count


def _record(plain: Mapping[str, Any]) -> TaskRecord:
    """A record of this version or another: what is missing gets a neutral value, a bare number is an exact one."""
    values = plain.get("values")
    triples = {}
    for key, numbers in (values if isinstance(values, dict) else {}).items():
        triple = [_number(x) for x in numbers] if isinstance(numbers, list) else [_number(numbers)] * 3
        triples[key] = triple if len(triple) == 3 else [triple[0]] * 3 if triple else [math.nan] * 3
    kept = {key: plain[key] for key in ("settings", "spectra") if isinstance(plain.get(key), dict)}
    return TaskRecord.from_dict(
        {
            "monitor": str(plain["monitor"]),
            "task": _checked(int(plain["task"])),
            "phase": str(plain.get("phase", "start")),
            "step": _checked(_whole(plain.get("step"), 0)),
            "values": triples,
            "seconds": _number(plain.get("seconds")),
            "failure": None if plain.get("failure") is None else str(plain["failure"]),
            **kept,
        }
    )


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file of JSON lines, and what there is to say of lines that are none; nothing for no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path} could not be read ({error.strerror})."]
    found, bad = [], 0
    for line in text.splitlines():
        try:
            plain = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):  # the latter of thousands of brackets
            plain = None
        if isinstance(plain, dict):
            found += [plain] if plain else []
        else:
            bad += 1
    cut = f"{path}: {bad} line(s) were cut short or are no JSON and were left out; a run that was killed leaves one."
    return found, [cut] if bad else []


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or half of one."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _numbers(row: Any) -> dict[str, float]:
    row = row if isinstance(row, dict) else {}
    return {key: _number(value) for key, value in row.items() if key not in NOT_MEASURES}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _checked(number: int) -> int:
    if abs(number) > LARGEST:
        raise ValueError("no step or task of a run is as large")
    return number


def _whole(value: Any, default: int) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _seed(name: str) -> str:
    found = SEED.fullmatch(name)
    return found[1] if found else name


def _tell_apart(runs: Sequence[Run], root: str) -> None:
    for run in runs:
        if run.group != root:  # a log directory itself has its own name already
            run.group, run.name = f"{root}/{run.group}", f"{root}/{run.name}"


def _distinct(runs: list[Run]) -> list[Run]:
    """Give runs of one name, such as of two directories called ``version_0``, different ones."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name, run.group = f"{run.name} ({seen[run.name]})", f"{run.group} ({seen[run.name]})"
    return runs
