"""Spectra over tasks as heat maps: how many eigenvalues of each magnitude, counted in bins of a quarter decade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.report.find import Run
from lightning_plasticity.report.series import parse

BINS_PER_DECADE = 4
LOWEST, HIGHEST = -16, 12  # decades that are counted apart; what is beyond goes to the outermost bin
MAX_BINS = 60
MAX_CELLS = 300_000  # of all maps together, so that the file stays small
EDGES = np.linspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * BINS_PER_DECADE + 1)
Counts = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class HeatMap:
    """The spectra of one matrix in one run.

    Attributes:
        group: of the run.
        run: its name.
        matrix: ``"ggn"``, ``"hessian"``, ...
        variant: as in ``Line``.
        columns: by task, what ``count`` says of its spectrum.
    """

    group: str
    run: str
    matrix: str
    variant: str
    columns: dict[int, dict[str, Any]] = field(default_factory=dict)

    def to_plain(self, low: int, high: int) -> dict[str, Any]:
        """For JSON, with bins ``low`` to ``high`` of the common ones; what is smaller is one number, ``below``."""
        tasks = sorted(self.columns)
        columns = [self.columns[task] for task in tasks]
        plain: dict[str, Any] = {
            "group": self.group,
            "run": self.run,
            "matrix": self.matrix,
            "variant": self.variant,
            "tasks": tasks,
            "from": float(EDGES[low]),
            "step": 1 / BINS_PER_DECADE,
            "below": [_short(column["counts"][:low].sum()) for column in columns],
            "counts": [[_short(x) for x in column["counts"][low:high]] for column in columns],
        }
        if any(column["negative"].any() for column in columns):
            plain["negative"] = [[_short(x) for x in column["negative"][low:high]] for column in columns]
        for key in ("zeros", "rounding", "params", "samples", "exact"):
            plain[key] = [column[key] for column in columns]
        return plain


def heat_maps(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """The heat maps for JSON, and what could not be read."""
    problems: list[str] = []
    maps = [one for run in runs for one in _of_run(run, problems)]
    cells = sum(len(one.columns) * MAX_BINS for one in maps)
    if cells > MAX_CELLS:
        first: dict[tuple[str, str, str], HeatMap] = {}
        for one in maps:
            first.setdefault((one.group, one.matrix, one.variant), one)
        problems.append(f"Spectra of {len(maps)} runs would make the page slow; shown is the first run of each method.")
        maps = list(first.values())
    plain = []
    for matrix in dict.fromkeys(one.matrix for one in maps):
        alike = [one for one in maps if one.matrix == matrix]
        used = np.flatnonzero(sum(column["counts"] for one in alike for column in one.columns.values()))
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        plain += [one.to_plain(max(low, high - MAX_BINS), high) for one in alike]
    return plain, problems


def _of_run(run: Run, problems: list[str]) -> list[HeatMap]:
    found: dict[tuple[str, str], HeatMap] = {}
    missing, broken = 0, []
    for record in run.records:
        variant = parse(next(iter(record.values), ""), record.phase)[1].replace("fresh network, ", "")
        for matrix, name in record.spectra.items():
            path = run.directory / str(name)
            if not path.is_file():
                missing += 1
                continue
            try:
                column = count(Spectrum.load(path))
            except Exception as error:  # a file of another version, or half of one
                broken.append(f"{path.name} ({type(error).__name__}: {error})"[:200])
                continue
            place = (matrix, variant)
            one = found.setdefault(place, HeatMap(run.group, run.name, matrix, variant))
            one.columns[record.task] = column
    if missing:
        problems.append(f"{run.name}: {missing} file(s) of spectra that the records name are not there.")
    if broken:
        problems.append(f"{run.name}: {len(broken)} file(s) of spectra could not be read, the first {broken[0]}.")
    return list(found.values())


def count(spectrum: Spectrum) -> dict[str, Any]:
    """Eigenvalues by log10 of their magnitude; zeros and what cannot be told from zero are apart."""
    values, counts = spectrum.eigenvalues.numpy(), spectrum.counts.numpy()
    size = np.abs(values)
    seen = np.isfinite(size) & (size > spectrum.resolution) & (size > 0)
    logs = np.clip(np.log10(size[seen]), LOWEST, np.nextafter(HIGHEST, 0))
    negative = values[seen] < 0
    return {
        "counts": np.histogram(logs, EDGES, weights=counts[seen])[0],
        "negative": np.histogram(logs[negative], EDGES, weights=counts[seen][negative])[0],
        "zeros": _short(counts[size == 0].sum()),
        "rounding": _short(counts[(size > 0) & (size <= spectrum.resolution)].sum()),
        "params": spectrum.num_params,
        "samples": spectrum.num_samples,
        "exact": spectrum.exact,
    }


def _short(x: float) -> float | int:
    """Counts of an exact spectrum are whole numbers but for rounding; those of an estimate need no more digits."""
    short = round(float(x), 2)
    return int(short) if short.is_integer() else short
