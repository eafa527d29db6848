"""Measure and write the tables. From the root of the repository, with the ``bench`` extra installed:

python -m benchmarks.peers                       everything
python -m benchmarks.peers --only ggn product    some tasks; the others keep the numbers they have
python -m benchmarks.peers --quick               every library on toy problems, printed and not kept (a smoke test)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import FULL, QUICK, TITLES, Case
from benchmarks.peers.report import machine, render
from benchmarks.peers.targets import OURS, everything, lines, save

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
LONG = 10.0  # seconds of a turn, from which on there are fewer turns: two, and one for those that are not the best
CLOSE = 1.1  # who takes this many times as long as the best may still be the best


def start(jobs: Sequence[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """The jobs' results, run in order in one fresh process."""
    command = [sys.executable, "-m", "benchmarks.peers.worker", json.dumps(jobs)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return [{"failed": f"stopped after {timeout:.0f} s"}] * len(jobs)
    found = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return found + [{"failed": last[:200]}] * (len(jobs) - len(found))


def job(case: Case, peer: str, options: argparse.Namespace) -> dict[str, Any]:
    least = 0.0 if options.quick else 0.5
    if not case.peers:
        arguments = {"subject": case.problem, "rounds": options.rounds, "min_seconds": least}
        return {"task": case.task, "arguments": arguments}
    return {"task": case.task, "problem": case.problem, "peer": peer, "steps": case.steps, "min_seconds": least}


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One table's rows: the libraries take turns, each turn in a fresh process."""
    if not case.peers:
        (found,) = start([job(case, "", options)], options.timeout * options.rounds)  # all rounds in one process
        return found if "rows" in found else {"rows": {"measurement": found}}
    rows: dict[str, Any] = {}
    for turn in range(options.rounds):
        for peer in [peer for peer in case.peers if turn < turns(peer, rows, options.rounds)]:
            (found,) = start([job(case, peer, options)], options.timeout)
            merge(rows, peer, found)
    return {"rows": rows}


def turns(peer: str, rows: dict[str, Any], wanted: int) -> int:
    """How many turns a library gets: all, unless it cannot, or a turn is long."""
    row = rows.get(peer, {})
    if "failed" in row:
        return 0
    if "seconds" not in row or row["seconds"][0] < LONG:
        return wanted
    others = [r["seconds"][0] for key, r in rows.items() if key not in OURS and "seconds" in r]
    worth = peer in OURS or row["seconds"][0] <= CLOSE * min(others)
    return min(wanted, 2 if worth else 1)


def measure_quickly(cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process for each library, for all its cases."""
    found: list[dict[str, Any]] = [{"rows": {}} for _ in cases]
    for peer in sorted({peer for case in cases for peer in case.peers}):
        mine = [index for index, case in enumerate(cases) if peer in case.peers]
        results = start([job(cases[index], peer, options) for index in mine], options.timeout)
        for index, result in zip(mine, results, strict=True):
            merge(found[index]["rows"], peer, result)
    alone = [index for index, case in enumerate(cases) if not case.peers]
    for index, result in zip(alone, start([job(cases[i], "", options) for i in alone], options.timeout), strict=True):
        found[index] = result if "rows" in result else {"rows": {"measurement": result}}
    return found


def merge(rows: dict[str, Any], peer: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        rows[peer] = found
        return
    row = rows.setdefault(peer, {"seconds": [], "peak_mb": [], "check": found["check"]})
    row["seconds"].append(found["seconds"])
    row["peak_mb"].append(found["peak_mb"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy problems, one round, nothing kept")
    parser.add_argument("--only", nargs="+", choices=TITLES, metavar="TASK", help=f"some of: {', '.join(TITLES)}")
    parser.add_argument("--case", help="only cases whose name contains this, e.g. mlp-500")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every library (fewer where a turn is long)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one process may take")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of peers.md and peers.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    chosen = [case for case in (QUICK if options.quick else FULL) if case.task in (options.only or TITLES)]
    chosen = [case for case in chosen if options.case is None or options.case in case.name]
    if options.quick:
        results = dict(zip([case.key for case in chosen], measure_quickly(chosen, options), strict=True))
        print(render(results, lines(results)))
        return
    raw = options.output / "peers.json"
    options.output.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        started = time.monotonic()
        found = measure(case, options) | {"when": time.strftime("%Y-%m-%d"), "machine": machine()}
        kept = json.loads(raw.read_text()) if raw.exists() else {}
        kept[case.key] = found
        raw.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{case.key} ({time.monotonic() - started:.0f} s)", flush=True)
        write(kept, options.output)


def write(results: dict[str, Any], folder: Path) -> None:
    """``peers.md``, with the lines of the other measurements that are in the same folder."""
    save(lines(results), folder, "peers")
    (folder / "peers.md").write_text(render(results, everything(folder)))


if __name__ == "__main__":
    main()
