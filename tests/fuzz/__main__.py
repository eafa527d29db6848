"""Many cases, each in a process with a time limit: ``python -m fuzz --cases 200``, in ``tests``, ``PYTHONPATH=..``."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fuzz.cases import draw
from fuzz.check import Verdict, check
from fuzz.faults import PLACES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.md"
COLUMNS = ("measured", "failed", "told", "ended", "propagated", "not reached", "changed", "lost", "hung", "broken")
HEAD = """# Random modules, settings and failures

Written by `{command}` in `tests`, with `PYTHONPATH=..`. Each case draws a module of the zoo, settings of the Trainer,
monitors with settings of theirs and a failure at a random point, and runs with and without monitors.

- measured: every boundary has its numbers; failed: some have the reason instead, for what was injected or because the
  module cannot be measured; told: a logger or a file broke, and was warned of; ended: an interrupt while measuring;
  propagated: the module's own error, the same in both runs (in rows without "training": of a module that cannot be
  fitted twice, or refuses NaN itself); not reached: the point does not exist in this case.
- changed: weights, buffers, gradients, optimizers, random states, logged values, batches, attributes or hooks differ
  from the run without monitors in some bit, right after a boundary or at the end. lost: a record, a spectrum, or the
  one warning of a failure is not there. hung: over the time limit. broken: no verdict.
- measurements, failures: records of all cases, and those of them with a failure.
"""


def judge(seed: int, index: int, connection: Any) -> None:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            connection.send(check(draw(seed, index), Path(directory)))
        except BaseException:
            connection.send(traceback.format_exc())


def in_process(seed: int, index: int, limit: float) -> tuple[Any, Any, float]:
    """A new process, where its verdict comes from, and when it is over."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=judge, args=(seed, index, theirs))
    process.start()
    theirs.close()
    return process, ours, time.monotonic() + limit


def verdicts(seed: int, indices: list[int], processes: int, limit: float) -> dict[int, Verdict | str]:
    """All verdicts by case: what was found, ``"hung"``, or why there is none."""
    found: dict[int, Verdict | str] = {}
    waiting, at_work = list(indices), {}
    while waiting or at_work:
        while waiting and len(at_work) < processes:
            index = waiting.pop(0)
            at_work[index] = in_process(seed, index, limit)
        for index, (process, ours, over) in list(at_work.items()):
            if ours.poll(0.02):
                try:
                    found[index] = ours.recv()
                except EOFError:
                    found[index] = f"the process died: {process.exitcode}"
            elif time.monotonic() > over:
                process.kill()
                found[index] = "hung"
            else:
                continue
            process.join()
            del at_work[index]
            print(index, _line(found[index]), flush=True)
    return found


def _line(verdict: Verdict | str) -> str:
    if isinstance(verdict, str):
        return verdict
    wrong = "".join(f"\n    {name}: {each}" for name in ("changed", "lost") for each in getattr(verdict, name))
    return f"{verdict.row}: {verdict.result} {verdict.error}{wrong}" + (f"\n    {verdict.about}" if wrong else "")


def table(found: dict[int, Verdict | str]) -> str:
    """Counts by kind of failure, in Markdown."""
    counts: dict[str, Counter[str]] = {row: Counter() for row in PLACES}
    for index, verdict in found.items():
        count = counts[list(PLACES)[index % len(PLACES)]]
        count["cases"] += 1
        if isinstance(verdict, str):
            count["hung" if verdict == "hung" else "broken"] += 1
            continue
        count.update([verdict.result, *["changed"] * bool(verdict.changed), *["lost"] * bool(verdict.lost)])
        count["measurements"] += verdict.measurements
        count["failures"] += verdict.failures
    names = ("cases", *COLUMNS, "measurements", "failures")
    counts["all"] = sum(counts.values(), Counter())
    lines = [f"| failure | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {row} | {' | '.join(str(count[name]) for name in names)} |" for row, count in counts.items()]
    return "\n".join(lines)


def _wrong(found: dict[int, Verdict | str]) -> str:
    bad = {n: v for n, v in sorted(found.items()) if isinstance(v, str) or v.changed or v.lost}
    return "".join(f"\nCase {number}:\n\n```\n{_line(verdict)}\n```\n" for number, verdict in bad.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="some of the cases, by number; nothing is written")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    indices = list(range(options.cases)) if options.only is None else options.only
    found = verdicts(options.seed, indices, options.processes, options.limit)
    written = table(found)
    print(written)
    if options.only is None:
        command = f"python -m fuzz --cases {options.cases} --seed {options.seed}"
        RESULTS.write_text(f"{HEAD.format(command=command)}\n{written}\n{_wrong(found)}", encoding="utf-8")


if __name__ == "__main__":
    main()
