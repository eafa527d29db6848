"""A study as a table for reading: mean over seeds, least and most; ``python -m benchmarks.study_table STUDY_DIR``."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_plasticity.study import read_table

Rows = Sequence[dict[str, Any]]


def last(key: str) -> Callable[[Rows], float]:
    """The value at a run's last task."""
    return lambda rows: float(rows[-1].get(key, math.nan))


def early(key: str) -> Callable[[Rows], float]:
    """The mean over the second to the fourth task."""
    return lambda rows: statistics.fmean(float(row[key]) for row in rows[1:4])


def over_tasks(key: str) -> Callable[[Rows], float]:
    """The mean over all tasks."""
    return lambda rows: statistics.fmean(float(row[key]) for row in rows)


COLUMNS: dict[str, tuple[Callable[[Rows], float], str]] = {
    "online, tasks 2-4": (early("online_accuracy"), ".2f"),
    "online, last": (last("online_accuracy"), ".2f"),
    "online, mean": (over_tasks("online_accuracy"), ".2f"),
    "end, last": (last("end_accuracy"), ".2f"),
    "GGN > 0.01": (last("ggn/eps_rank_0.01"), ".0f"),
    "GGN > 0.001 max": (last("ggn/relative_eps_rank_0.001"), ".0f"),
    "the same, fresh": (last("fresh/ggn/relative_eps_rank_0.001"), ".0f"),
    "effective rank": (last("features/effective_rank"), ".0f"),
    "the same, of fresh": (last("fresh/features/effective_rank"), ".0f"),
    "srank": (last("features/srank"), ".0f"),
    "dead units": (last("features/dead_units"), ".2f"),
    "weight norm": (last("weights/norm"), ".1f"),
    "probe: gap to fresh": (last("trainability/gap_to_fresh"), "+.2f"),
    "probe: reached": (last("trainability/reached"), ".1f"),
}


def table(rows: Rows) -> str:
    """Markdown; a column that no run has is left out."""
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        runs.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    cells: dict[str, list[str]] = {}
    shown = []
    for title, (value, digits) in COLUMNS.items():
        values = {
            method: [value(sorted(run, key=lambda r: r["task"])) for run in seeds.values()]
            for method, seeds in runs.items()
        }
        if all(math.isnan(v) for found in values.values() for v in found):
            continue
        shown.append(title)
        for method, found in values.items():
            cells.setdefault(method, []).append(_cell(found, digits))
    lines = [f"| method | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    return "\n".join(lines + [f"| {method} | {' | '.join(row)} |" for method, row in cells.items()])


def _cell(values: list[float], digits: str) -> str:
    mean, least, most = (format(v, digits) for v in (statistics.fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="the --out of a study")
    print(table(read_table(parser.parse_args(arguments).study)))


if __name__ == "__main__":
    main()
