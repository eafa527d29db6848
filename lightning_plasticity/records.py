"""What a monitor writes down: one ``TaskRecord`` for each measurement, in memory and as a line of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_plasticity.linalg import Estimate

FILE_NAME = "plasticity.jsonl"


@dataclass(frozen=True)
class TaskRecord:
    """One measurement at a task boundary.

    Attributes:
        monitor: which monitor made it.
        task: index of the task, from 0.
        phase: ``"start"`` (before the first update on the task) or ``"end"`` (after the last).
        step: cumulative optimizer step.
        values: numbers by key (as logged), each with its interval.
        settings: what was measured on and how: samples, dtype, mode, method; ``identity`` tells monitors of one class
            apart.
        seconds: wall time of the measurement.
        failure: why nothing could be measured, else None.
        spectra: file names of the spectra, beside the record, by matrix.
        versions: of the packages that made it, by name: ``lightning-plasticity``, ``lightning``, ``torch``. Empty in
            records that were written before they were kept.
    """

    monitor: str
    task: int
    phase: str
    step: int
    values: Mapping[str, Estimate] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None
    spectra: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON and checkpoints; NaN and infinities become strings."""
        values = {key: [estimate.value, estimate.lower, estimate.upper] for key, estimate in self.values.items()}
        plain: dict[str, Any] = _to_json({**vars(self), "values": values})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TaskRecord:
        """The record that ``to_dict`` described; fields of later versions are left out."""
        values = {key: Estimate(*(float(x) for x in numbers)) for key, numbers in plain["values"].items()}
        known = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        return cls(**{**known, "values": values})


def _to_json(value: Any) -> Any:
    """Plain Python that strict JSON can hold; exact types only, for ``numpy.float64`` passes for a float."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)


@cache
def installed_versions() -> dict[str, str]:
    """Of the installed packages that decide what is measured."""
    found = {}
    for name in ("lightning-plasticity", "lightning", "pytorch-lightning", "torch"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def append_record(directory: str | os.PathLike[str], record: TaskRecord) -> None:
    """Append one line to ``plasticity.jsonl`` in a directory, which is made when missing."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record.to_dict(), allow_nan=False) + "\n"
    with open(path / FILE_NAME, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that a crash cut short must not swallow the next
                line = "\n" + line
        file.write(line.encode())


def read_records(path: str | os.PathLike[str]) -> list[TaskRecord]:
    """The records of a run, from its ``plasticity.jsonl`` or the directory that holds it, in the order of time.

    Where a resumed run measured a boundary again, the last measurement counts. A line cut short by a crash is skipped.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.exists():
        raise FileNotFoundError(
            f"No {FILE_NAME} at {path}; pass a run's log directory, such as lightning_logs/version_0."
        )
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            plain = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(TaskRecord.from_dict(plain))
    return latest(found)


def latest(records: Iterable[TaskRecord]) -> list[TaskRecord]:
    """One record for each monitor, task and phase, the last, in the order of time."""
    found: dict[tuple[str, str, int, str], TaskRecord] = {}
    for record in records:
        key = (record.monitor, str(record.settings.get("identity")), record.task, record.phase)
        found.pop(key, None)
        found[key] = record
    return list(found.values())
