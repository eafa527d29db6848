"""The tidy table of a study: a row for each method, seed and task; as rows in memory, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_plasticity.study.files import write_text

INDEX = ("method", "seed", "task")
TableRow = dict[str, Any]


def tidy(results: Iterable[Mapping[str, Any]]) -> list[TableRow]:
    """Rows of the results of units, in their order; tasks count from 0."""
    return [
        {"method": result["method"], "seed": result["seed"], "task": task, **row}
        for result in results
        for task, row in enumerate(result["rows"])
    ]


def columns(rows: Iterable[TableRow]) -> list[str]:
    """All keys, those of the index first, the others as they first appear."""
    found = dict.fromkeys(INDEX)
    for row in rows:
        found |= dict.fromkeys(row)
    return list(found)


def write_table(rows: list[TableRow], directory: Path) -> None:
    """Write ``results.csv`` and ``results.jsonl``, whole or not at all.

    A value that was not measured is an empty field or a missing key; NaN and infinities are ``nan`` and ``inf`` in CSV
    and null in JSON, which has neither.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "results.csv", text.getvalue())
    lines = (json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) for row in rows)
    write_text(directory / "results.jsonl", "".join(f"{line}\n" for line in lines))


def read_table(path: Path) -> list[TableRow]:
    """The rows of a ``results.jsonl``, or of the study's directory that holds one; null is NaN again.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = path / "results.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"No table at {path}; pass the directory that a study was written to.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def per_run(rows: Iterable[TableRow], key: str) -> dict[str, dict[int, list[float]]]:
    """One column by method and seed, as lists over tasks; NaN where it was not measured."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        series = found.setdefault(row["method"], {}).setdefault(row["seed"], [])
        series += [math.nan] * (row["task"] + 1 - len(series))
        series[row["task"]] = float(row.get(key, math.nan))
    return found


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
