"""What is to be reached over the best of the other libraries, and whether it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Everything that writes lines, in the order of the summary.
SOURCES = ("peers", "accuracy", "growth")


@dataclass(frozen=True)
class Line:
    """One line of the summary."""

    what: str
    target: str
    measured: str
    met: bool | None  # None: no target, or nothing to compare with


@dataclass(frozen=True)
class Target:
    """A bound on a ratio in one case: the time of the best of ``against`` over that of ``own`` (or the other way).

    Attributes:
        what: the line in words.
        case: key of the case, e.g. ``"ggn: mlp-500"``.
        bound: what the ratio has to reach; 0 only reports it.
        own: our row.
        against: rows of the others; empty for all that are not ours.
        slower: the ratio is ours over theirs, and must stay below ``bound`` (a distance from a limit).
    """

    what: str
    case: str
    bound: float
    own: str = "ours"
    against: tuple[str, ...] = ()
    slower: bool = False


RESNET = "ggn: resnet18-64"
OURS = ("ours", "ours-dual", "lightning_plasticity")
LANCZOS = ("pyhessian", "curvlinops", "eigenthings")
REORTHOGONALISE = ("pyhessian", "eigenthings")
PENALTY = {"own": "lightning_plasticity"}

TARGETS = (
    Target("exact GGN spectrum, MLP, N=500", "ggn: mlp-500", 1.5),
    Target("exact GGN spectrum, MLP, N=250", "ggn: mlp-250", 0),
    Target("exact GGN spectrum, MLP, N=100", "ggn: mlp-100", 0),
    Target("exact GGN spectrum, small MLP, N=500", "ggn: small-500", 0),
    Target("exact GGN spectrum, CNN, N=50", "ggn: cnn-50", 0),
    Target("exact GGN spectrum, ResNet-18, N=64", RESNET, 0),
    Target("exact GGN spectrum, transformer, N=32", "ggn: transformer-32", 0),
    Target("GGN counts or density, MLP, N=500, over the best exact", "counts: mlp-500", 4, "ours-dual", ("vivit",)),
    Target("GGN counts or density, MLP, N=250, over the best exact", "counts: mlp-250", 0, "ours-dual", ("vivit",)),
    Target("GGN density, MLP, N=500, over the best m=100 Lanczos run", "counts: mlp-500", 10, "ours-dual", LANCZOS),
    Target("Hessian m=100, MLP, N=500", "hessian: mlp-500, m=100", 1.25),
    Target("the same, over those that reorthogonalise", "hessian: mlp-500, m=100", 0, "ours", REORTHOGONALISE),
    Target("Hessian m=100, MLP, N=100 = width/10", "hessian: mlp-100, m=100", 5),
    Target("the same, over those that reorthogonalise", "hessian: mlp-100, m=100", 0, "ours", REORTHOGONALISE),
    Target("Hessian m=10, ResNet-18, N=64", "hessian: resnet18-64, m=10", 1.0),
    Target("Hessian m=100, tiny MLP, N=40", "hessian: tiny-40, m=100", 4),
    Target("Hessian m=100, small MLP, N=500", "hessian: small-500, m=100", 4),
    Target("Hessian m=100, CNN, N=50", "hessian: cnn-50, m=100", 0),
    Target("Hessian m=100, transformer, N=32", "hessian: transformer-32, m=100", 0),
    Target(
        "Hessian product over the matrix products alone, MLP, N=500", "product: mlp-500", 1.1, "ours", ("gemm",), True
    ),
    Target("effective-rank penalty 100 x 256", "penalty: 100x256", 1.1, **PENALTY),
    Target("effective-rank penalty 100 x 1000", "penalty: 100x1000", 1.2, **PENALTY),
    Target("effective-rank penalty 500 x 1000", "penalty: 500x1000", 0, **PENALTY),
    Target("effective-rank penalty 1200 x 512", "penalty: 1200x512", 0, **PENALTY),
    Target("streaming effective rank 10000 x 512", "streaming: 10000x512", 0.9, **PENALTY),
    Target("streaming effective rank 2000 x 1000", "streaming: 2000x1000", 0.9, **PENALTY),
)


def lines(results: dict[str, Any]) -> list[Line]:
    """Every target of a case that was measured, and what cases say of themselves (``lines`` in a result)."""
    found = [judge(target, results[target.case]["rows"]) for target in TARGETS if target.case in results]
    if RESNET in results:
        found.append(feasible("the same, where BackPACK's rows are not possible", results[RESNET]["rows"], "backpack"))
    for result in results.values():
        found += [Line(**line) for line in result.get("lines", [])]
    return found


def judge(target: Target, rows: dict[str, Any]) -> Line:
    sign = "<=" if target.slower else ">="
    wanted = f"{sign} {target.bound:g}x" if target.bound else "-"
    others = {key: row for key, row in rows.items() if key in target.against or not (target.against or key in OURS)}
    others = {key: row for key, row in others.items() if "seconds" in row and (target.against or key != "gemm")}
    if "seconds" not in rows.get(target.own, {}):
        return Line(target.what, wanted, f"ours: {rows.get(target.own, {}).get('failed', 'not measured')}", False)
    if not others:
        return Line(target.what, wanted, "nobody else could", None)
    best = min(others, key=lambda key: statistics.median(others[key]["seconds"]))
    own, theirs = rows[target.own]["seconds"], others[best]["seconds"]
    found = ratios(own, theirs) if target.slower else ratios(theirs, own)
    middle = statistics.median(found)
    met = (middle <= target.bound if target.slower else middle >= target.bound) if target.bound else None
    return Line(target.what, wanted, f"{spread(found)}x ({best})", met)


def feasible(what: str, rows: dict[str, Any], other: str) -> Line:
    own, theirs = rows.get("ours", {}), rows.get(other, {})
    text = f"{statistics.median(own['seconds']):.3g} s" if "seconds" in own else own.get("failed", "not measured")
    return Line(what, "possible", f"{text}; theirs: {theirs.get('failed', 'possible')}", "seconds" in own)


def ratios(values: list[float], base: list[float]) -> list[float]:
    """Turn by turn; what took fewer turns is compared with the turns it took part in."""
    return [value / own for value, own in zip(values, base, strict=False)]


def spread(values: list[float], form: str = ".2f") -> str:
    """Median (least-most)."""
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{form}}-{max(values):{form}})"


def summary(found: list[Line]) -> str:
    """A table."""
    words = {True: "met", False: "**missed**", None: ""}
    rows = [f"| {line.what} | {line.target} | {line.measured} | {words[line.met]} |" for line in found]
    return "\n".join(["| line | target | measured | |", "|---|---|---|---|", *rows])


def save(found: list[Line], folder: Path, source: str) -> None:
    """For the summary of all, ``everything``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(line) for line in found], indent=1)
    (folder / f"{source}.lines.json").write_text(text + "\n")


def everything(folder: Path) -> list[Line]:
    """The lines that all measurements have left in a folder."""
    found = []
    for source in SOURCES:
        path = folder / f"{source}.lines.json"
        found += [Line(**line) for line in json.loads(path.read_text())] if path.exists() else []
    return found


def at_most(what: str, bound: float, value: float, form: Callable[[float], str] = "{:.2f}".format) -> Line:
    """A line whose value must not exceed a bound."""
    return Line(what, f"<= {form(bound)}", form(value), value <= bound)
