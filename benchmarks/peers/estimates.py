"""Two readings of a Lanczos run (float64, full reorthogonalisation), against the dense Hessian in float64.

- plain quadrature: a Rademacher probe on all P coordinates, a node counts P times its weight, averaged over probes; the
  effective rank is exp(log(P S1) - S2/S1) with S1 = E|x|, S2 = E[|x| log|x|] over probes together, the best that a user
  of the other libraries could do (none of them offers it).
- ours: one Gaussian probe on the coordinates whose rows are not zero, converged pairs counted as one.

Lanczos runs on the diagonal matrix of the true eigenvalues, from the probe in the basis of the true eigenvectors: the
same coefficients as on the Hessian itself, quicker. PyHessian's basis is not quite of unit length and curvlinops does
not reorthogonalise; neither is held against them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from benchmarks.peers.digits_nets import Truth, exact
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.linalg import LanczosQuadrature, LanczosResult, effective_rank_of, lanczos, srank_of

RHO = (1e-1, 1e-2, 1e-3, 1e-4)
QUANTITIES = (*(f"rho {rho:g}" for rho in RHO), "effective rank")  # whose errors are compared
INTERVALS = (*QUANTITIES, "srank", "trace")  # whose intervals are checked
GROUPS = 400  # averages over probes that an error is taken over
FEW = 40  # repetitions that show how often a value is withheld, where nothing else is asked
Array = NDArray[np.float64]


def study(name: str, width: int, seeds: int, steps: Sequence[int], probes: Sequence[int], table: Sequence[int]) -> Any:
    """Everything about one network, plain numbers: errors by rule, steps and probes; what is withheld; what holds."""
    torch.set_num_threads(1)
    truth = exact(name, width)
    true = true_values(truth)
    plain = [plain_run(truth, seed, max(steps)) for seed in range(seeds)]
    ours = [our_run(truth, seed, max(steps)) for seed in range(seeds)]
    found: dict[str, Any] = {"name": name, "params": len(truth.live), "live": len(truth.eigenvalues), "true": true}
    found |= {"plain": {}, "ours": {}, "withheld": {}, "held": {}}
    for m in steps:
        shares = np.array([plain_shares(run, m, truth) for run in plain])
        for k in probes:
            found["plain"][f"{k} x {m}"] = plain_errors(shares, k, len(truth.live), true[: len(QUANTITIES)])
        spectra = [our_spectrum(run, m, truth) for run in ours]
        values = np.array([our_values(spectrum, truth) for spectrum in spectra])
        found["ours"][f"1 x {m}"] = relative_errors(values, true[: len(QUANTITIES)])
        asked = spectra if m in table else spectra[:FEW]
        found["withheld"][f"1 x {m}"] = withheld(asked, truth)
        if m in table:
            found["held"][str(m)] = held(spectra, truth, true)
    return found


def true_values(truth: Truth) -> list[float]:
    """In the order of ``INTERVALS``."""
    counts = [truth.count_above(rho * truth.top) for rho in RHO]
    magnitudes = truth.eigenvalues.abs()
    ranks = [float(rank(magnitudes, torch.ones_like(magnitudes))) for rank in (effective_rank_of, srank_of)]
    return [*counts, *ranks, float(truth.eigenvalues.sum())]


def relative_errors(values: Array, true: Sequence[float]) -> list[float]:
    """Root mean square over repetitions (the first axis), over the true value."""
    errors = np.sqrt(((values - np.array(true)) ** 2).mean(axis=0)) / np.maximum(np.abs(true), 1.0)
    return [float(error) for error in errors]


# The others.


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


def plain_shares(run: LanczosResult, steps: int, truth: Truth) -> list[float]:
    """Weight beyond each eps, S1 and S2: what averages over probes."""
    alpha, beta = run.alpha[:steps], run.beta[: min(steps, len(run.alpha)) - 1]
    nodes, vectors = eigh_tridiagonal(alpha, beta)
    sizes, weights = np.abs(nodes), vectors[0] ** 2
    logs = np.log(np.maximum(sizes, 1e-300))
    beyond = [float(weights[sizes > rho * truth.top].sum()) for rho in RHO]
    return [*beyond, float(weights @ sizes), float(weights @ (sizes * logs))]


def plain_errors(shares: Array, probes: int, num_params: int, true: Sequence[float]) -> list[float]:
    """Of averages over ``probes`` runs, drawn anew from all runs."""
    drawn = np.random.default_rng(0).integers(len(shares), size=(GROUPS, probes))
    means = shares[drawn].mean(axis=1)
    s1, s2 = means[:, -2], means[:, -1]
    ranks = np.exp(np.log(num_params * s1) - s2 / s1)
    return relative_errors(np.column_stack([num_params * means[:, :-2], ranks]), true)


# Ours.


def our_run(truth: Truth, seed: int, num_steps: int) -> LanczosResult:
    """From a Gaussian probe on the live coordinates, which is one in any orthonormal basis."""
    probe = torch.randn(len(truth.eigenvalues), generator=torch.Generator().manual_seed(seed)).double()
    return lanczos(lambda v: truth.eigenvalues * v, probe, num_steps)


def our_spectrum(run: LanczosResult, steps: int, truth: Truth) -> Spectrum:
    dim, cut = len(truth.eigenvalues), steps < len(run.alpha)
    quadrature = LanczosQuadrature(run.alpha[:steps], run.beta[:steps], dim, run.breakdown and not cut)
    return Spectrum.from_quadrature(quadrature, len(truth.live))


def our_values(spectrum: Spectrum, truth: Truth) -> list[float]:
    """The values themselves, also where the library would withhold them."""
    quadrature = spectrum.quadrature
    assert quadrature is not None
    counts = [quadrature._interpolated_count(rho * truth.top) for rho in RHO]
    return [*counts, float(effective_rank_of(spectrum.eigenvalues.abs(), spectrum.counts))]


def withheld(spectra: Sequence[Spectrum], truth: Truth) -> list[float]:
    """Share of the counts that are not given, because only their interval is known."""
    return [float(np.mean([math.isnan(s.epsilon_rank(rho * truth.top).value) for s in spectra])) for rho in RHO]


def held(spectra: Sequence[Spectrum], truth: Truth, true: Sequence[float]) -> list[float]:
    """Share of the intervals that hold the truth, in the order of ``INTERVALS``."""
    rows = []
    for spectrum in spectra:
        estimates = [spectrum.epsilon_rank(rho * truth.top) for rho in RHO]
        estimates += [spectrum.effective_rank(), spectrum.srank(), spectrum.trace()]
        # Rounding, where an interval is a point.
        slack = [1e-9 * max(abs(value), 1.0) for value in true]
        rows.append([e.lower - s <= t <= e.upper + s for e, t, s in zip(estimates, true, slack, strict=True)])
    return [float(share) for share in np.mean(rows, axis=0)]
