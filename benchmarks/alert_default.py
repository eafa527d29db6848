"""An alert for streams nobody has seen: thresholds set on all studies but one and tried on that one.

Run: python -m benchmarks.alert_default STUDY_DIR STUDY_DIR ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_plasticity.study import read_table
from lightning_plasticity.study.prediction import Score, alarm

MEASURES = {
    "online_accuracy": 0.87,
    "end_accuracy": 0.87,
    "features/srank": 0.946,
    "features/effective_rank": None,
    "features/approximate_rank": None,
    "features/stable_rank": None,
    "features/feature_rank": None,
    "features/dead_units": None,
    "features/dormant_units_0.025": None,
    "weights/norm": None,
    "ggn/trace": None,
    "ggn/lambda_max": None,
    "ggn/effective_rank": None,
    "ggn/eps_rank_0.1": None,
    "ggn/eps_rank_0.01": None,
    "ggn/eps_rank_0.001": None,
    "ggn/relative_eps_rank_0.01": None,
    "ggn/relative_eps_rank_0.001": None,
}


def joined(studies: Sequence[Path]) -> list[dict[str, Any]]:
    """All runs; a study takes the place of a seed, so that leaving seeds out leaves studies out."""
    rows: list[dict[str, Any]] = []
    for k, study in enumerate(studies):
        rows += [
            {**row, "method": f"{study.name} {row['method']} {row['seed']}", "seed": k} for row in read_table(study)
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--resamples", type=int, default=500)
    given = parser.parse_args(arguments)
    rows = joined(given.studies)
    print("| measure | shares of the best | detected | lead, tasks | false alarms |\n|---|---|---|---|---|")
    for measure, fixed in MEASURES.items():
        for share in (None, fixed) if fixed is not None else (None,):
            found = alarm(rows, measure, threshold=share, resamples=given.resamples)
            low, high = found.thresholds
            shown = f"{low:.3f}" if share is not None else f"{low:.3f} to {high:.3f}"
            side = "" if found.higher_is_better else " (high is bad)"
            scores = " | ".join(_cell(s) for s in (found.detected, found.lead, found.false_alarms))
            print(f"| {measure}{side}{', set before' if share is not None else ''} | {shown} | {scores} |")


def _cell(score: Score) -> str:
    return f"{score.value:+.2f} [{score.lower:+.2f}, {score.upper:+.2f}]"


if __name__ == "__main__":
    main()
