"""Log directories that are one run: a new Trainer and logger for each task make version_0, version_1, ..."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_plasticity.report.find import Run

VERSION = re.compile(r"version_(\d+)")


def join_versions(runs: Sequence[Run]) -> list[Run]:
    """The runs, where one that goes on at the task after another's last is made part of it.

    A run of its own begins at task 0. One in ``version_1`` that begins at task 3 goes on where ``version_0`` beside it
    ended at task 2.
    """
    chains: list[list[Run]] = []
    for run in sorted(runs, key=_version):
        chain = next((one for one in chains if _goes_on(one[-1], run)), None)
        if chain is None:
            chains.append([run])
        else:
            chain.append(run)
    places = {run.name: place for place, run in enumerate(runs)}
    chains.sort(key=lambda chain: places[chain[0].name])
    return [chain[0] if len(chain) == 1 else _one(chain) for chain in chains]


def _version(run: Run) -> int:
    found = VERSION.fullmatch(run.directory.resolve().name)
    return int(found[1]) if found else -1


def _goes_on(before: Run, run: Run) -> bool:
    if not before.records or not run.records or _version(run) <= _version(before) or _version(before) < 0:
        return False
    beside = before.directory.resolve().parent == run.directory.resolve().parent
    last = max(record.task for record in before.records)
    return beside and min(record.task for record in run.records) == last + 1


def _one(chain: Sequence[Run]) -> Run:
    first, last = chain[0], chain[-1].directory.resolve().name
    records = []
    for run in chain:
        way = os.path.relpath(run.directory, first.directory)
        for record in run.records:
            spectra = {matrix: os.path.join(way, name) for matrix, name in record.spectra.items()}
            records.append(replace(record, spectra=spectra))
    logged: dict[str, list[np.ndarray]] = {}
    for run in chain:
        for name, series in run.logged.items():
            logged.setdefault(name, []).append(series)
    return replace(
        first,
        group=f"{first.group} to {last}",
        name=f"{first.name} to {last}",
        records=records,
        logged={name: np.concatenate(parts) for name, parts in logged.items()},
        problems=[problem for run in chain for problem in run.problems],
    )
