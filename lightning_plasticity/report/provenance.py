"""How the numbers were made: settings of the monitors, and the files that they came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from lightning_plasticity.records import FILE_NAME
from lightning_plasticity.report.find import Run
from lightning_plasticity.report.series import parse

# Differ from task to task, or are data: not how something was measured.
NOT_SETTINGS = ("curves", "identity", "seconds", "resolution")
MAX_VALUES = 4


def settings_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """Monitor, setting, its values, and in which groups; then what the files of studies say."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for run in runs:
        for record in run.records:
            for key, value in _flat(record.settings):
                found.setdefault((record.monitor, key), {}).setdefault(value, set()).add(run.group)
            for package, number in record.versions.items():
                found.setdefault(("versions", package), {}).setdefault(number, set()).add(run.group)
        for key, value in run.settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            found.setdefault(("study", key), {}).setdefault(text, set()).add(run.group)
    groups = {run.group for run in runs}
    rows = []
    for (monitor, key), values in found.items():
        for value, where in list(values.items())[: MAX_VALUES if monitor != "study" else len(values)]:
            rows.append((monitor, key, value, "all" if where == groups else ", ".join(sorted(where))))
        if monitor != "study" and len(values) > MAX_VALUES:
            rows.append((monitor, key, f"and {len(values) - MAX_VALUES} other values", ""))
    return rows


def source_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, str, str]]:
    """Run, number of records, of tasks, when the records were last written, directory."""
    rows = []
    for run in runs:
        file = run.directory / FILE_NAME
        written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc) if file.exists() else None
        tasks = {record.task for record in run.records} | set(run.rows)
        when = "no records" if written is None else written.strftime("%Y-%m-%d %H:%M UTC")
        rows.append((run.name, str(len(run.records)), str(len(tasks)), when, str(run.directory)))
    return rows


def thresholds(runs: Sequence[Run]) -> dict[str, list[float]]:
    """By matrix the absolute eps whose counts were recorded."""
    found: dict[str, set[float]] = {}
    for run in runs:
        for record in run.records:
            for key in record.values:
                counted = re.fullmatch(r"(\w+)/eps_rank_([\d.e+-]+)", parse(key, record.phase)[0])
                if counted and float(counted[2]) > 0:
                    found.setdefault(counted[1], set()).add(float(counted[2]))
    return {matrix: sorted(values) for matrix, values in found.items()}


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if key in NOT_SETTINGS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)
