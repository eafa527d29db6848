"""Tables from raw results."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.peers.cases import TITLES
from benchmarks.peers.problems import ABOUT

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
    "lightning_plasticity": "**lightning_plasticity**",
    "pyhessian": "PyHessian, one batch (graph kept)",
    "pyhessian-loader": "PyHessian, loader of 5 batches",
    "eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops",
    "vivit": "ViViT (float32)",
    "backpack": "BackPACK SqrtGGNExact rows",
    "gemm": "the matrix products alone",
}
HEAD = """# Next to other libraries

Written by `python -m benchmarks.peers` (`--only TASK` for a part); raw numbers in `peers.json`. CPU seconds of one
thread, libraries in turns, each turn in a fresh process that has run a toy problem before. *seconds* is the median over
turns (least-most); *to ours* is the median of each turn's ratio to our time (above 1: ours is faster); *memory* is the
peak above what the process held before. *agrees* compares a result with ours, so that the same work is compared.
Dates come with the load average when a table was finished: well above 1, the machine was shared, and the numbers are
preliminary.
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


def render(results: dict[str, Any]) -> str:
    """Everything as Markdown, tasks in their order."""
    parts = [HEAD, "\n".join(f"- `{name}`: {about}" for name, about in ABOUT.items())]
    machines = sorted({found["machine"].split(" (load")[0] for found in results.values() if "machine" in found})
    libraries = sorted({found["machine"].split("; ", 1)[1] for found in results.values() if "machine" in found})
    parts += [f"Machine: {one}." for one in machines] + [f"Versions: {one}." for one in libraries]
    for task, title in TITLES.items():
        mine = {key.split(": ", 1)[1]: found for key, found in results.items() if key.split(":")[0] == task}
        if mine:
            parts += [f"## {title}", *(table(name, found) for name, found in mine.items())]
    return "\n\n".join(parts) + "\n"


def table(name: str, found: dict[str, Any]) -> str:
    """One case."""
    rows = found["rows"]
    own = rows.get("ours") or rows.get("lightning_plasticity")
    when = f" ({found['when']}, {_load(found['machine'])})" if "when" in found else ""
    lines = [f"### {name}{when}", ""]
    if summary := _summary(rows, own):
        lines += [summary, ""]
    lines += ["| | seconds | to ours | memory, MB | result | agrees |", "|---|---|---|---|---|---|"]
    order = sorted(rows, key=lambda key: statistics.median(rows[key].get("seconds", [float("inf")])))
    return "\n".join(lines + [_row(key, rows[key], own) for key in order])


def _load(about: str) -> str:
    """The one-minute load average out of ``machine``."""
    return "load " + about.split("(load ", 1)[1].split(",", 1)[0]


def _summary(rows: dict[str, Any], own: dict[str, Any] | None) -> str:
    others = {key: row["seconds"] for key, row in rows.items() if row is not own and "seconds" in row and key != "gemm"}
    if not own or "seconds" not in own or not others:
        return ""
    best = min(others, key=lambda key: statistics.median(others[key]))
    ratio = _ratios(others[best], own["seconds"])
    text = f"Best of the others: {NAMES.get(best, best)}; its time over ours: {ratio}."
    if "seconds" in rows.get("gemm", {}):
        text += f" Ours over the matrix products alone: {_ratios(own['seconds'], rows['gemm']['seconds'])}."
    return text


def _row(key: str, row: dict[str, Any], own: dict[str, Any] | None) -> str:
    name = NAMES.get(key, key)
    if "failed" in row:
        return f"| {name} | {row['failed']} | | | | |"
    ratio = _ratios(row["seconds"], own["seconds"]) if own and "seconds" in own and row is not own else ""
    memory = f"{statistics.median(row['peak_mb']):.0f}" if row.get("peak_mb") else ""
    check = row.get("check", {})
    result = ", ".join(f"{what} {value:.6g}" for what, value in check.items())
    agreement = _agreement(check, own.get("check", {})) if own and row is not own else ""
    note = "; ".join(part for part in (agreement, row.get("note", "")) if part)
    return f"| {name} | {_spread(row['seconds'])} | {ratio} | {memory} | {result} | {note} |"


def _agreement(check: dict[str, float], own: dict[str, float]) -> str:
    """Relative differences, largest."""
    common = [key for key in check if key in own]
    found = [f"{key} to {abs(check[key] - own[key]) / max(abs(own[key]), 1e-300):.0e}" for key in common]
    return ", ".join(found)


def _ratios(values: list[float], base: list[float]) -> str:
    ratios = [value / own for value, own in zip(values, base, strict=False)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _spread(seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{seconds[0]:.3g}"
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g}-{max(seconds):.3g})"
