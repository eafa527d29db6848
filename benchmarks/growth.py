"""Time and peak memory against parameters P, samples N and Lanczos steps m, each varied alone; is anything steeper than
the theory says?

Run: python -m benchmarks.growth            (writes benchmarks/results/growth.md and docs/images/growth.png)
     python -m benchmarks.growth --quick    (a few small points, printed and not kept)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.report import machine
from benchmarks.peers.run import RESULTS, ROOT, start
from benchmarks.peers.targets import Line, save, summary

FIGURE = ROOT / "docs" / "images" / "growth.png"
TAIL = 3  # points, the largest ones, that a slope is fitted to
SLACK = 0.15  # a slope may be this much steeper than the theory's: caches end somewhere
LEAST_MB = 2.0  # below this, memory is the allocator's

NAMES = {
    "hessian": "Hessian, Lanczos",
    "ggn": "GGN, exact",
    "product": "one Hessian product",
    "sweeps": "Lanczos without products",
}
AXES = {"params": "parameters P", "samples": "samples N", "steps": "Lanczos steps m"}
FIXED = {"params": 3e5, "samples": 64, "steps": 20}


@dataclass(frozen=True)
class Series:
    """One curve, and the most that theory allows its slopes to be on log-log axes."""

    kind: str
    axis: str
    values: tuple[float, ...]
    seconds: float
    memory: float | None  # None: not looked at
    why: str


P = (1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7)
N = (32, 64, 128, 256, 512)
M = (10, 20, 40, 80, 160)
FULL = (
    Series("hessian", "params", P, 1, 1, "m N P for products, m^2 P for sweeps; basis m P"),
    Series("hessian", "samples", N, 1, 1, "m N P; activations N width"),
    Series("hessian", "steps", M, 2, 1, "m N P and m^2 P; basis m P"),
    Series("ggn", "params", P, 1, 1, "N C P for backward passes, (N C)^2 width for the Gram matrix"),
    Series("ggn", "samples", N, 3, 2, "(N C)^3 for eigenvalues, (N C)^2 width before; matrix (N C)^2"),
    Series("product", "params", P[2:], 1, None, "N P"),
    Series("product", "samples", N, 1, None, "N P"),
    Series("sweeps", "params", P[2:], 1, 1, "m^2 P; basis m P"),
    Series("sweeps", "steps", M, 2, 1, "m^2 P; basis m P"),
)
QUICK = (
    Series("hessian", "params", (1e3, 3e3, 1e4), 1, 1, "m N P, m^2 P"),
    Series("ggn", "samples", (8, 16), 3, 2, "(N C)^3"),
)


def measure(series: Sequence[Series], min_seconds: float) -> list[dict[str, Any]]:
    """Every point in a fresh process; a point that fails ends its curve."""
    found = []
    for one in series:
        points: list[dict[str, float]] = []
        failed = ""
        for value in one.values:
            settings = FIXED | {one.axis: value}
            arguments = {"kind": one.kind, "num_params": settings["params"], "samples": int(settings["samples"])}
            arguments |= {"steps": int(settings["steps"]), "min_seconds": min_seconds}
            (result,) = start([{"task": "growth", "arguments": arguments}], timeout=120)
            if "failed" in result:
                failed = f"{AXES[one.axis]} {value:g}: {result['failed']}"
                break
            at = result["params"] if one.axis == "params" else value
            points.append({"at": at, "seconds": result["seconds"], "peak_mb": result["peak_mb"]})
        print(f"{NAMES[one.kind]} against {AXES[one.axis]}: {len(points)} points", flush=True)
        found.append({"kind": one.kind, "axis": one.axis, "points": points, "failed": failed})
    return found


def slope(points: Sequence[dict[str, float]], what: str, least: float = 0.0) -> float | None:
    """Of the largest points on log-log axes."""
    kept = [point for point in points if point[what] > least][-TAIL:]
    if len(kept) < TAIL:
        return None
    return float(np.polyfit(np.log([p["at"] for p in kept]), np.log([p[what] for p in kept]), 1)[0])


def lines(series: Sequence[Series], found: Sequence[dict[str, Any]]) -> list[Line]:
    result = []
    for one, curve in zip(series, found, strict=True):
        name = f"{NAMES[one.kind]} against {AXES[one.axis]}"
        for what, bound, least in (("seconds", one.seconds, 0.0), ("peak_mb", one.memory, LEAST_MB)):
            if bound is None:
                continue
            value = slope(curve["points"], what, least)
            title = f"growth of {'time' if what == 'seconds' else 'memory'}, {name}"
            measured = "too few points" if value is None else f"slope {value:.2f}"
            measured += f"; stopped at {curve['failed']}" if curve["failed"] else ""
            met = None if value is None else value <= bound + SLACK
            result.append(Line(title, f"<= {bound:g}", measured, met if not curve["failed"] else False))
    return result


def report(series: Sequence[Series], found: dict[str, Any]) -> str:
    tables = []
    for one, curve in zip(series, found["series"], strict=True):
        rows = [f"| {p['at']:.3g} | {p['seconds']:.3g} | {p['peak_mb']:.0f} |" for p in curve["points"]]
        head = f"## {NAMES[one.kind]} against {AXES[one.axis]}\n\nTheory: {one.why}.\n\n"
        tables.append(head + "\n".join([f"| {AXES[one.axis]} | seconds | peak, MB |", "|---|---|---|", *rows]))
    fixed = ", ".join(f"{AXES[axis]} = {value:g}" for axis, value in FIXED.items())
    parts = [
        "# Growth of time and memory",
        "Written by `python -m benchmarks.growth`; every point in a fresh process, CPU seconds of one thread, peak "
        "memory above network and data.",
        f"{found['machine']}.",
        f"ReLU MLP d-d-d-10, cross-entropy; where not varied, {fixed}. Slopes on log-log axes are fitted to the {TAIL} "
        f"largest points (of memory: above {LEAST_MB:g} MB); met means no steeper than the theory's + {SLACK:g}.",
        summary(lines(series, found["series"])),
        *tables,
    ]
    return "\n\n".join(parts) + "\n"


def draw(series: Sequence[Series], found: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), sharey="row", layout="constrained")
    colours = dict(zip(NAMES, ("C0", "C1", "C2", "C3"), strict=True))
    for row, what in enumerate(("seconds", "peak_mb")):
        for column, (axis, name) in enumerate(AXES.items()):
            panel = axes[row, column]
            for one, curve in zip(series, found, strict=True):
                bound = one.seconds if what == "seconds" else one.memory
                points = [p for p in curve["points"] if p[what] > (0 if what == "seconds" else LEAST_MB)]
                if one.axis != axis or bound is None or not points:
                    continue
                at, values = np.array([p["at"] for p in points]), np.array([p[what] for p in points])
                panel.loglog(at, values, "o-", color=colours[one.kind], label=NAMES[one.kind])
                panel.loglog(
                    at, values[-1] * (at / at[-1]) ** bound, ":", color=colours[one.kind], label=f"slope {bound:g}"
                )
            panel.set_xlabel(name)
            panel.xaxis.set_minor_formatter(NullFormatter())
            if panel.lines:
                panel.legend(fontsize=7)
        axes[row, 0].set_ylabel("CPU seconds" if what == "seconds" else "peak memory, MB")
    figure.suptitle("Time and memory; dotted: the most that theory allows, through the last point")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    series = QUICK if options.quick else FULL
    found = {"series": measure(series, 0.0 if options.quick else 0.3), "machine": machine()}
    if options.quick:
        print(report(series, found))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    save(lines(series, found["series"]), options.output, "growth")
    (options.output / "growth.md").write_text(report(series, found))
    draw(series, found["series"], options.figure)


if __name__ == "__main__":
    main()
