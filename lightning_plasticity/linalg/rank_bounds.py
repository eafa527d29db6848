"""Bounds on the effective rank of a spectrum that is only known through counts with intervals."""

from __future__ import annotations

import numpy as np
import torch

from lightning_plasticity.linalg.functionals import effective_rank_of
from lightning_plasticity.linalg.quadrature import LanczosQuadrature

DECADES = 6  # below the largest eigenvalue; what is smaller adds next to nothing to the entropy
POINTS = 24  # thresholds


def effective_rank_bounds(quadrature: LanczosQuadrature) -> tuple[float, float]:
    """Lower and upper bound of the effective rank of |lambda|, from 95 % intervals of counts at many thresholds.

    Converged pairs are exact; the rest is taken as sparse, then as dense, as the intervals allow at every threshold at
    once. That is conservative: on four networks (docs/studies/intervals.md) the bounds held in every repetition.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import stochastic_lanczos_quadrature
        >>> diagonal = torch.zeros(200, dtype=torch.float64); diagonal[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> quadrature = stochastic_lanczos_quadrature(lambda v: diagonal * v, 200, dtype=torch.float64)
        >>> lower, upper = effective_rank_bounds(quadrature)
        >>> round(lower, 4), round(upper, 4)  # exp of the entropy of (0.1, 0.2, 0.3, 0.4)
        (3.5961, 3.5961)
    """
    magnitudes = np.abs(quadrature.nodes)
    top = float(magnitudes.max())
    if top == 0:
        return 0.0, 0.0
    exact = magnitudes[quadrature.converged]
    thresholds = top * 10.0 ** (-DECADES * np.arange(1, POINTS + 1) / POINTS)
    edges = np.concatenate([[top], thresholds])
    values = np.concatenate([exact, np.sqrt(edges[1:] * edges[:-1])])
    counts = [quadrature.count_above(float(threshold)) for threshold in thresholds]
    known = np.array([(exact > threshold).sum() for threshold in thresholds])
    bounds = []
    for ends in ([count.lower for count in counts], [count.upper for count in counts]):
        beyond = np.clip(np.array(ends) - known, 0, quadrature.dim - len(exact))
        binned = np.diff(np.maximum.accumulate(beyond), prepend=0.0)
        multiplicities = np.concatenate([np.ones(len(exact)), binned])
        bounds.append(float(effective_rank_of(torch.from_numpy(values), torch.from_numpy(multiplicities))))
    return min(bounds), max(bounds)
