"""Bounds on functionals of a spectrum that is only known through counts with intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_plasticity.linalg.functionals import effective_rank_of
from lightning_plasticity.linalg.quadrature import LanczosQuadrature

DECADES = 6  # below the largest eigenvalue; what is smaller adds next to nothing to a sum
POINTS = 48  # thresholds
LEVELS = 33  # plateaus of the spectra with a light tail


def extreme_spectra(quadrature: LanczosQuadrature) -> tuple[Tensor, Tensor]:
    """The spectra of ``|lambda|`` at the edge of what 95 % intervals of counts allow: (K,) values, (S, K) counts.

    Converged pairs are exact. Of the rest, each spectrum has as few eigenvalues as allowed above some threshold and as
    many as allowed below it (a heavy tail), or as many as allowed up to some number, and then no more than needed (a
    light tail). The sparse and the dense one are among them, and those where srank is extreme: whether the k largest
    hold a share of the sum is the sign of an integral over thresholds of a convex function of the count, so that the
    ends of its intervals, or k itself, are extreme. Within a bin eigenvalues may be anywhere.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import stochastic_lanczos_quadrature
        >>> diagonal = torch.zeros(200, dtype=torch.float64); diagonal[:2] = torch.tensor([1.0, 2.0])
        >>> values, counts = extreme_spectra(
        ...     stochastic_lanczos_quadrature(lambda v: diagonal * v, 200, dtype=torch.float64)
        ... )
        >>> bool(((counts * values).sum(1) - 3.0).abs().max() < 1e-9)
        True
    """
    magnitudes = np.abs(quadrature.nodes)
    top = float(magnitudes.max())
    exact = magnitudes[quadrature.converged]
    thresholds = top * 10.0 ** (-DECADES * np.arange(1, POINTS + 1) / POINTS)
    edges = np.concatenate([[top], thresholds])
    counts = [quadrature.count_above(float(threshold)) for threshold in thresholds]
    known = np.array([(exact > threshold).sum() for threshold in thresholds])
    few, many = (
        np.maximum.accumulate(np.clip(np.array(ends) - known, 0, quadrature.dim - len(exact)))
        for ends in ([count.lower for count in counts], [count.upper for count in counts])
    )
    # Cumulative counts at the edges: each bin all at its lower edge, or all at its upper one.
    few, many = np.append(0.0, few), np.append(many, many[-1])
    heavy = [np.concatenate([few[:at], many[at:]]) for at in range(len(edges) + 1)]
    levels = np.concatenate([few, many, np.linspace(0.0, many[-1], LEVELS)])
    light = [np.minimum(np.maximum(level, few), many) for level in levels]
    binned = np.diff(np.stack(heavy + light), prepend=0.0, axis=1)
    multiplicities = np.concatenate([np.ones((len(binned), len(exact))), binned], axis=1)
    return torch.from_numpy(np.concatenate([exact, edges])), torch.from_numpy(multiplicities)


def functional_bounds(
    quadrature: LanczosQuadrature, functional: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Lower and upper bound of ``functional(values, counts)`` of ``|lambda|``, over ``extreme_spectra``.

    That is conservative: on four networks (docs/studies/intervals.md) the bounds of the effective rank and of srank
    held in every repetition.

    Args:
        quadrature: what is known of the spectrum.
        functional: of (K,) values and (S, K) counts, e.g. ``srank_of``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import effective_rank_of, stochastic_lanczos_quadrature
        >>> diagonal = torch.zeros(200, dtype=torch.float64); diagonal[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> quadrature = stochastic_lanczos_quadrature(lambda v: diagonal * v, 200, dtype=torch.float64)
        >>> lower, upper = functional_bounds(quadrature, effective_rank_of)
        >>> round(lower, 4), round(upper, 4)  # exp of the entropy of (0.1, 0.2, 0.3, 0.4)
        (3.5961, 3.5961)
    """
    found = functional(*extreme_spectra(quadrature))
    return float(found.min()), float(found.max())


def effective_rank_bounds(quadrature: LanczosQuadrature) -> tuple[float, float]:
    """``functional_bounds`` of the effective rank."""
    return functional_bounds(quadrature, effective_rank_of)
