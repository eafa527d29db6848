"""The demo over three seeds: mean (min-max) of what both networks show at the last task, and the wall time.

Run: python benchmarks/demo_seeds.py > benchmarks/demo_seeds.txt   (about 3 minutes on two cores)
"""

import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from lightning_plasticity.demo import run_demo

SEEDS = (0, 1, 2)
KEYS = ("ggn_eps_rank_0.01", "effective_rank", "dead_units")


def summarise(values, digits):
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main():
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        summaries = [run_demo(seed, Path(directory) / str(seed)) for seed in SEEDS]
    print(f"seeds {SEEDS}, mean (min-max); accuracy is online, the rest at the start of the last task")
    print(f"wall seconds for both networks together: {summarise([s['seconds'] for s in summaries], 0)}")
    for method in ("plain", "l2er"):
        runs = [summary["methods"][method] for summary in summaries]
        early = [statistics.mean(run["online_accuracy"][1:4]) for run in runs]
        print(f"{method}: accuracy tasks 2-4 {summarise(early, 2)}", end="")
        print(f", last task {summarise([run['online_accuracy'][-1] for run in runs], 2)}", end="")
        for key, digits in zip(KEYS, (0, 1, 2), strict=True):
            print(f", {key} {summarise([run[key][-1] for run in runs], digits)}", end="")
        print()
    for summary in summaries:
        for method, run in summary["methods"].items():
            print(f"seed {summary['seed']} {method}, by task")
            print("  accuracy   " + " ".join(f"{x:4.2f}" for x in run["online_accuracy"]))
            print("  GGN > 0.01 " + " ".join(f"{x:4.0f}" for x in run["ggn_eps_rank_0.01"]))


if __name__ == "__main__":
    main()
