"""Error of the eps-rank at an equal number of Hessian-vector products, and the time to a given error.

Run: python -m benchmarks.peers.accuracy            (about 10 minutes; writes benchmarks/results/accuracy.md)
     python -m benchmarks.peers.accuracy --quick    (smaller networks, few repetitions; printed and not kept)

Two ways to read the same kind of Lanczos run (float64, full reorthogonalisation), against the dense Hessian in float64:

- plain quadrature, as PyHessian and others: Rademacher probe on all P coordinates, count = P times the weights beyond
  eps, averaged over probes;
- ours: one Gaussian probe on the coordinates whose rows are not zero, converged pairs counted as one.

Lanczos runs on the diagonal matrix of the true eigenvalues, from the probe in the basis of the true eigenvectors: the
same coefficients as on the Hessian itself, quicker.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch.nn import functional as F

from benchmarks.peers.digits_nets import NETWORKS, Truth, exact
from benchmarks.peers.report import machine
from benchmarks.peers.timing import cpu_seconds
from lightning_plasticity.curvature import hessian_spectrum
from lightning_plasticity.linalg import LanczosQuadrature, LanczosResult, lanczos

RHO = (1e-1, 1e-2, 1e-3, 1e-4)
STEPS = (12, 24, 30, 60, 90, 120, 160, 200, 250, 300)
PROBES = (1, 5, 20)
TABLE = (60, 120, 300)
TARGETS = (0.2, 0.1)
OUTPUT = Path(__file__).parents[1] / "results" / "accuracy.md"

Errors = dict[tuple[str, int, int], list[float]]  # (rule, probes, steps) -> error at each rho


def plain_run(truth: Truth, seed: int, num_steps: int) -> LanczosResult:
    """From a Rademacher probe on all coordinates; those with zero rows are one more eigenvector, of eigenvalue 0."""
    generator = torch.Generator().manual_seed(seed)
    probe = 2.0 * torch.randint(2, truth.live.shape, generator=generator).double() - 1.0
    zeros = float((~truth.live).sum())
    start, diagonal = truth.vectors.T @ probe[truth.live], truth.eigenvalues
    if zeros:
        start = torch.cat([start, torch.tensor([math.sqrt(zeros)]).double()])
        diagonal = torch.cat([diagonal, torch.zeros(1).double()])
    return lanczos(lambda v: diagonal * v, start, num_steps)


def plain_count(run: LanczosResult, steps: int, num_params: int, eps: float) -> float:
    alpha, beta = run.alpha[:steps], run.beta[: min(steps, len(run.alpha)) - 1]
    nodes, vectors = eigh_tridiagonal(alpha, beta)
    return float(num_params * (vectors[0] ** 2)[np.abs(nodes) > eps].sum())


def our_run(truth: Truth, seed: int, num_steps: int) -> LanczosResult:
    """From a Gaussian probe on the live coordinates, which is one in any orthonormal basis."""
    probe = torch.randn(len(truth.eigenvalues), generator=torch.Generator().manual_seed(seed)).double()
    return lanczos(lambda v: truth.eigenvalues * v, probe, num_steps)


def our_quadrature(run: LanczosResult, steps: int, dim: int) -> LanczosQuadrature:
    cut = steps < len(run.alpha)
    return LanczosQuadrature(run.alpha[:steps], run.beta[:steps], dim, run.breakdown and not cut)


def relative_error(estimates: Sequence[float], true: float) -> float:
    """Root mean square over repetitions."""
    return math.sqrt(statistics.mean((estimate - true) ** 2 for estimate in estimates)) / max(true, 1.0)


def errors(truth: Truth, seeds: int, steps: Sequence[int]) -> tuple[Errors, dict[int, list[list[float]]]]:
    """Errors of both rules; and for ours [share withheld, share of intervals that hold] at each rho."""
    found: Errors = {}
    plain = [plain_run(truth, seed, max(steps)) for seed in range(seeds)]
    ours = [our_run(truth, seed, max(steps)) for seed in range(seeds)]
    num_params, dim, honesty = len(truth.live), len(truth.eigenvalues), {}
    for m in steps:
        rows: dict[int, list[float]] = {probes: [] for probes in PROBES}
        own, honest = [], []
        quadratures = [our_quadrature(run, m, dim) for run in ours]
        for eps in (rho * truth.top for rho in RHO):
            true = truth.count_above(eps)
            counts = [plain_count(run, m, num_params, eps) for run in plain]
            for probes in PROBES:
                groups = [counts[i : i + probes] for i in range(0, len(counts) - probes + 1, probes)]
                means = [statistics.mean(group) for group in groups]
                rows[probes].append(relative_error(means, true) if means else math.nan)
            # The value behind ``count_above``, which withholds it where the interval is too wide.
            own.append(relative_error([q._interpolated_count(eps) for q in quadratures], true))
            estimates = [q.count_above(eps) for q in quadratures]
            held = statistics.mean(e.lower <= true <= e.upper for e in estimates)
            honest.append([statistics.mean(not e.resolved for e in estimates), held])
        found |= {("plain", probes, m): row for probes, row in rows.items()}
        found["ours", 1, m] = own
        honesty[m] = honest
    return found, honesty


def seconds(truth: Truth, steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """CPU seconds of whole runs on the network itself in float32: ours, and PyHessian's density."""
    model = truth.model.float()
    data = (truth.data[0].float(), truth.data[1])
    measures = {"ours": lambda m: hessian_spectrum(model, F.cross_entropy, data, method="lanczos", num_steps=m)}
    try:
        from benchmarks.peers.adapters import load
        from benchmarks.peers.problems import Problem

        problem, peer = Problem("digits", model, *data), load("pyhessian")
        measures["plain"] = lambda m: peer.hessian(problem, m)
    except ImportError as error:
        print(f"plain Lanczos is not timed: {error}", file=sys.stderr)
    found: dict[str, dict[int, float]] = {}
    for name, measure in measures.items():
        measure(3)
        found[name] = {m: statistics.median(cpu_seconds(partial(measure, m)) for _ in range(3)) for m in steps}
    return found


def percent(values: Sequence[float]) -> str:
    """Median over networks (worst)."""
    return f"{100 * statistics.median(values):.0f} ({100 * max(values):.0f})"


def error_table(by_net: dict[str, Errors], table: Sequence[int]) -> list[str]:
    lines = ["| products | rule | " + " | ".join(f"rho {rho:g}" for rho in RHO) + " |", "|---" * (2 + len(RHO)) + "|"]
    for products in table:
        rows = [(f"plain, {k} x {products // k}", ("plain", k, products // k)) for k in PROBES]
        rows.append(("**ours**", ("ours", 1, products)))
        for name, key in rows:
            if all(key in found for found in by_net.values()):
                cells = [percent([found[key][i] for found in by_net.values()]) for i in range(len(RHO))]
                lines.append(f"| {products} | {name} | " + " | ".join(cells) + " |")
    return lines


def time_table(by_net: dict[str, Errors], clock: dict[str, dict[int, float]]) -> list[str]:
    lines = ["| median error | rule | " + " | ".join(f"rho {rho:g}" for rho in RHO) + " |"]
    lines.append("|---" * (2 + len(RHO)) + "|")
    keys = list(next(iter(by_net.values())))
    for target in TARGETS:
        for rule in ("plain", "ours"):
            cells = []
            for i in range(len(RHO)):
                medians = {k: statistics.median(found[k][i] for found in by_net.values()) for k in keys if k[0] == rule}
                enough = [key for key, median in medians.items() if median <= target]
                costs = [(key[1] * clock[rule][key[2]], key) for key in enough if rule in clock]
                best = min(costs, default=None)
                cells.append("not reached" if best is None else f"{best[0]:.2g} s ({best[1][1]} x {best[1][2]})")
            lines.append(f"| {100 * target:.0f} % | {rule} | " + " | ".join(cells) + " |")
    return lines


def honesty_table(by_net: dict[str, dict[int, list[list[float]]]], table: Sequence[int]) -> list[str]:
    lines = ["| steps | " + " | ".join(f"rho {rho:g}" for rho in RHO) + " |", "|---" * (1 + len(RHO)) + "|"]
    for m in table:
        cells = []
        for i in range(len(RHO)):
            withheld = statistics.mean(found[m][i][0] for found in by_net.values())
            held = [found[m][i][1] for found in by_net.values()]
            cells.append(f"{100 * withheld:.0f}, {100 * statistics.mean(held):.0f} ({100 * min(held):.0f})")
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return lines


def report(width: int, seeds: int, steps: Sequence[int], table: Sequence[int], names: Sequence[str]) -> str:
    by_net, honesty, truths = {}, {}, []
    for name in names:
        truth = exact(name, width)
        by_net[name], honesty[name] = errors(truth, seeds, steps)
        counts = ", ".join(f"{truth.count_above(rho * truth.top):.0f}" for rho in RHO)
        truths.append(f"| {name} | {len(truth.live)} | {len(truth.eigenvalues)} | {counts} |")
    clock = seconds(truth, steps)
    cost = [f"{rule}: " + ", ".join(f"m={m} {clock[rule][m]:.2g} s" for m in steps) for rule in clock]
    parts = [
        "# Error of the eps-rank at an equal number of products",
        "Written by `python -m benchmarks.peers.accuracy`, whose first lines say what is compared.",
        f"{machine()}.",
        f"Digits MLP 64-{width}-{width}-10, N=300, cross-entropy; eps = rho times the largest |eigenvalue|.",
        "\n".join(["| network | P | live | true counts, rho 1e-1 to 1e-4 |", "|---|---|---|---|", *truths]),
        f"## Error in percent of the true count\n\nRoot mean square over {seeds} repetitions (over groups of probes "
        "where they are averaged); median over the networks (worst). Ours is the value before it is withheld.",
        "\n".join(error_table(by_net, table)),
        "## CPU time to a median error\n\nThe cheapest of the runs measured (probes x steps); seconds of the whole "
        "call on the last network in float32, PyHessian's for plain.",
        "\n".join(time_table(by_net, clock)),
        "\n".join(f"- {line}" for line in cost),
        "## Our intervals\n\nPercent of the values withheld because the interval is all that is known, and percent of "
        "95 % intervals that hold the truth (worst network).",
        "\n".join(honesty_table(honesty, table)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().quick:
        print(report(8, 5, (12, 24, 60), (12, 60), ["fresh", "60 % dead"]))
        return
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(report(32, 40, STEPS, TABLE, list(NETWORKS)))


if __name__ == "__main__":
    main()
