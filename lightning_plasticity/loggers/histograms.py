"""Which eigenvalues a histogram shows, and its bins: the same at every task, so that tasks can be compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plasticity.curvature import Spectrum

BINS_PER_DECADE = 8
DECADES_BELOW = 8  # of the largest magnitude that a histogram or a figure shows


def shown_magnitudes(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """The magnitudes of a spectrum that can be told from zero, and how many eigenvalues there are of each.

    Eigenvalues within the resolution are rounding noise. A Lanczos quadrature puts what it cannot resolve into a few
    heavy nodes near zero, at other places at each task: they would be the highest peaks of all. So an estimate gives
    the differences of its count, ``epsilon_rank``, from the largest magnitude down to where that has no value.

    Returns:
        Magnitudes (K,), and counts (K,).
    """
    largest = spectrum.max_abs
    if spectrum.exact or spectrum.quadrature is None or largest == 0:
        magnitudes = spectrum.eigenvalues.abs()
        seen = magnitudes > spectrum.resolution
        return magnitudes[seen], spectrum.counts[seen]
    top = math.ceil(math.log10(largest) * BINS_PER_DECADE)
    lowest = math.log10(max(spectrum.resolution, largest * 10.0**-DECADES_BELOW)) * BINS_PER_DECADE
    centres, counts, above = [], [], 0.0
    for edge in range(top, math.floor(lowest), -1):
        count = spectrum.quadrature.count_above(10.0 ** (edge / BINS_PER_DECADE)).value
        if math.isnan(count):
            break
        if count > above:
            centres.append(10.0 ** ((edge + 0.5) / BINS_PER_DECADE))
            counts.append(count - above)
            above = count
    return torch.tensor(centres, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


def binned(logs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (B + 1,) on the common grid, and the weight in each bin (B,); a bin holds its left edge."""
    indices = (logs * BINS_PER_DECADE).floor().long()
    first = int(indices.min())
    num_bins = int(indices.max()) - first + 1
    edges = torch.arange(first, first + num_bins + 1, dtype=torch.float64) / BINS_PER_DECADE
    return edges, torch.zeros(num_bins, dtype=torch.float64).index_add_(0, indices - first, weights)
