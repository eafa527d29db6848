"""Which measures tell of the next task's learning, from a study's table: ``python -m benchmarks.prediction STUDY_DIR``.

Give it runs that fall and runs that do not, e.g. ``--only plain,l2er,ln_l2``. Writes ``prediction.csv`` into the
directory and prints the measures, those first that follow a run best.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plasticity.study import read_table
from lightning_plasticity.study.files import write_text
from lightning_plasticity.study.prediction import alarm, prediction_table
from lightning_plasticity.study.prediction.alarm import FIRST_TASK, fall

FIXED = {"features/srank": 0.946, "online_accuracy": 0.87}
ORDER = ("ggn/eps_rank_0.01", "ggn/relative_eps_rank_0.001", "features/effective_rank", "features/srank")
SHOWN = (
    "pooled_1",
    "last_pooled_1",
    "within_1",
    "last_within_1",
    "partial_1",
    "pooled_2",
    "within_2",
    "partial_2",
    "detected",
    "lead",
    "false_alarms",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="the --out of a study")
    parser.add_argument("--only", help="methods, with commas between them (default all)")
    parser.add_argument("--outcome", default="online_accuracy")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--layers", action="store_true", help="single layers too, not only means over them")
    given = parser.parse_args(arguments)
    rows = read_table(given.study)
    if given.only:
        rows = [row for row in rows if row["method"] in given.only.split(",")]
    keys = {key for row in rows for key in row}
    if not given.layers:
        rows = [{key: value for key, value in row.items() if key.rpartition("/")[0] not in keys} for row in rows]
    table = prediction_table(rows, given.outcome, resamples=given.resamples)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(given.study / "prediction.csv", text.getvalue())
    print(f"{table[0]['falling']} runs fall, {table[0]['steady']} do not; value [95 % bootstrap over runs]\n")
    print(f"| measure | {' | '.join(SHOWN)} |\n{'|---' * (len(SHOWN) + 1)}|")
    for row in sorted(table, key=lambda row: -abs(_number(row["within_1"]))):
        cells = [_cell(*(float(row[f"{name}{end}"]) for end in ("", "_lower", "_upper"))) for name in SHOWN]
        print(f"| {row['measure']} | {' | '.join(cells)} |")
    print(
        "\nThresholds that were set before, on other runs:\n\n| measure | share of its best | detected | lead | false |"
    )
    print("|---|---|---|---|---|")
    for measure, share in FIXED.items():
        found = alarm(rows, measure, given.outcome, threshold=share, resamples=given.resamples)
        scores = [_cell(s.value, s.lower, s.upper) for s in (found.detected, found.lead, found.false_alarms)]
        print(f"| {measure}, from task {FIRST_TASK} | {share} | {' | '.join(scores)} |")
    print("\nWhich fell first? Task (from 0) of the first drop of 20 % below the best so far, in the runs that fall:\n")
    print(f"| run | outcome | {' | '.join(ORDER)} |\n{'|---' * (len(ORDER) + 2)}|")
    for (method, seed), run in _by_run(rows).items():
        if math.isfinite(first := fall(np.array([row[given.outcome] for row in run]))):
            places = [fall(np.array([row[key] for row in run if key in row])) for key in ORDER]
            print(f"| {method} {seed} | {first:.0f} | {' | '.join(_place(place) for place in places)} |")


def _by_run(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["task"]):
        found.setdefault((row["method"], row["seed"]), []).append(row)
    return found


def _place(task: float) -> str:
    return f"{task:.0f}" if math.isfinite(task) else "never"


def _cell(value: float, lower: float, upper: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f} [{lower:+.2f}, {upper:+.2f}]"


def _number(value: float | str) -> float:
    return 0.0 if isinstance(value, str) or math.isnan(value) else value


if __name__ == "__main__":
    main()
