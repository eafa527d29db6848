"""Tables from raw results."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.peers.cases import TITLES
from benchmarks.peers.problems import ABOUT
from benchmarks.peers.targets import TARGETS, Line, judge, ratios, spread, summary

LIBRARIES = (
    "lightning-plasticity",
    "torch",
    "numpy",
    "scipy",
    "pyhessian",
    "hessian-eigenthings",
    "curvlinops-for-pytorch",
    "vivit-for-pytorch",
    "backpack-for-pytorch",
    "torchvision",
)
NAMES = {
    "ours": "**lightning_plasticity**",
    "ours-dual": "**lightning_plasticity**, Lanczos on the Gram matrix, m=100",
    "lightning_plasticity": "**lightning_plasticity**",
    "pyhessian": "PyHessian, one batch (graph kept)",
    "pyhessian-loader": "PyHessian, loader of 5 batches",
    "eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops (does not reorthogonalise)",
    "vivit": "ViViT (float32)",
    "backpack": "BackPACK SqrtGGNExact rows",
    "gemm": "the matrix products alone",
}
HEAD = """# Next to other libraries

Written by `python -m benchmarks.peers` (`--only TASK` for a part); raw numbers in `peers.json`. CPU seconds of one
thread, libraries in turns, each turn in a fresh process that has run a toy problem before. *seconds* is the median over
turns (least-most); *to ours* is the median of each turn's ratio to our time (above 1: ours is faster); *memory* is the
peak above what the process held before. *agrees* compares a result with ours, so that the same work is compared;
Lanczos runs start from different probes, and agree as far as they have converged. Turns of more than 10 s are fewer:
two, and one for a library that is not the best of the others. Dates come with the load average when a table was
finished: well above 1, the machine was shared, and the numbers are preliminary.

Every line: our ratio to the best of the others, least and most over the turns in brackets.
"""


def machine() -> str:
    """What the numbers depend on."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    chip = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    about = f"{chip}, {os.cpu_count()} cores (load {load}), {platform.system()}, Python {platform.python_version()}"
    return f"{about}; {', '.join(found)}"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []


def render(results: dict[str, Any], lines: list[Line]) -> str:
    """Everything as Markdown, tasks in their order."""
    parts = [
        HEAD + "\n" + summary(lines),
        "## Networks",
        "\n".join(f"- `{name}`: {about}" for name, about in ABOUT.items()),
    ]
    machines = sorted({found["machine"].split(" (load")[0] for found in results.values() if "machine" in found})
    libraries = sorted({found["machine"].split("; ", 1)[1] for found in results.values() if "machine" in found})
    parts += [f"Machine: {one}." for one in machines] + [f"Versions: {one}." for one in libraries]
    for task, title in TITLES.items():
        mine = {key.split(": ", 1)[1]: found for key, found in results.items() if key.split(":")[0] == task}
        if mine:
            parts += [f"## {title}", *(table(task, name, found) for name, found in mine.items())]
    return "\n\n".join(parts) + "\n"


def table(task: str, name: str, found: dict[str, Any]) -> str:
    """One case."""
    rows = found["rows"]
    own = rows.get("ours") or rows.get("lightning_plasticity")
    when = f" ({found['when']}, {_load(found['machine'])})" if "when" in found else ""
    lines = [f"### {name}{when}", ""]
    for target in (target for target in TARGETS if target.case == f"{task}: {name}"):
        line = judge(target, rows)
        verdict = "" if line.met is None else (": met" if line.met else ": missed")
        lines += [f"{line.what}: {line.measured}, target {line.target}{verdict}.", ""]
    lines += ["| | seconds | to ours | memory, MB | result | agrees |", "|---|---|---|---|---|---|"]
    order = sorted(rows, key=lambda key: statistics.median(rows[key].get("seconds", [float("inf")])))
    return "\n".join(lines + [_row(key, rows[key], own) for key in order])


def _load(about: str) -> str:
    """The one-minute load average out of ``machine``."""
    return "load " + about.split("(load ", 1)[1].split(",", 1)[0]


def _row(key: str, row: dict[str, Any], own: dict[str, Any] | None) -> str:
    name = NAMES.get(key, key)
    if "failed" in row:
        return f"| {name} | {row['failed']} | | | | |"
    if "seconds" not in row:
        return f"| {name} | | | {row['peak_mb'][0]:.0f} | | |"
    ratio = spread(ratios(row["seconds"], own["seconds"])) if own and "seconds" in own and row is not own else ""
    memory = f"{statistics.median(row['peak_mb']):.0f}" if row.get("peak_mb") else ""
    check = row.get("check", {})
    result = ", ".join(f"{what} {value:.6g}" for what, value in check.items())
    agreement = _agreement(check, own.get("check", {})) if own and row is not own else ""
    turns = "one turn" if len(row["seconds"]) == 1 and own and len(own.get("seconds", ())) > 1 else ""
    note = "; ".join(part for part in (agreement, row.get("note", ""), turns) if part)
    return f"| {name} | {spread(row['seconds'], '.3g')} | {ratio} | {memory} | {result} | {note} |"


def _agreement(check: dict[str, float], own: dict[str, float]) -> str:
    """Relative differences, largest."""
    common = [key for key in check if key in own]
    found = [f"{key} to {abs(check[key] - own[key]) / max(abs(own[key]), 1e-300):.0e}" for key in common]
    return ", ".join(found)
