"""The share of a masked weight: inner products of gradient rows over its active entries.

With g_o the gradients at output unit o and X[:, S_o] the inputs that are active there, the share is the sum over o and
over pairs of positions (p, q) of g_o[rn, p] g_o[sm, q] (X[:, S_o] X[:, S_o]^T)[np, mq]: a mask does not factorise, but
the inner products of inputs know nothing of the columns r, and few entries are active. Derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity.curvature.gram.factors import Factors
from lightning_plasticity.curvature.gram.rows import ROW_CHUNK, add_rows

INNER_CHUNK = 4 * 2**20  # elements of inner products of inputs, and of products with them, held at once
MOVED = 8.0  # multiply-adds of a matrix product in the time that an elementwise one takes


def add_masked(gram: Tensor, part: Factors) -> None:
    """Add the share of a masked dense weight and its bias, by explicit rows or unit by unit, whichever is cheaper."""
    assert part.mask is not None
    num_groups, num_columns, num_samples, size, positions = part.gradients.shape
    for group in range(num_groups):
        g, x, mask = part.gradients[group], part.inputs[group], part.mask[group]
        if part.bias is not None:
            x = torch.cat([x, x.new_ones(num_samples, 1, positions)], dim=1)
            mask = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
        live = mask.any(1)
        if not bool(live.all()):  # units without active inputs
            g, mask = g[:, :, live], mask[live]
        active = int(torch.count_nonzero(mask))
        if not active:
            continue
        num_rows, pairs = num_columns * num_samples, (num_samples * positions) ** 2
        by_rows = num_rows * positions * mask.numel() * (positions > 1) + MOVED * num_rows * active
        by_rows += num_rows**2 * active / 2
        by_units = pairs * (active + len(mask) * num_columns * (MOVED if positions == 1 else 1.0))
        by_units += num_rows**2 * len(mask) * positions
        if by_units < by_rows and pairs <= INNER_CHUNK:
            _add_by_units(gram, g, x, mask)
        else:
            _add_active_rows(gram, g, x, mask)


def _add_active_rows(gram: Tensor, g: Tensor, x: Tensor, mask: Tensor) -> None:
    """Explicit rows, the active entries of some units at a time."""
    num_columns, num_samples, size, positions = g.shape
    chunk = max(1, ROW_CHUNK // max(1, num_columns * num_samples * x.shape[1]))
    for start in range(0, size, chunk):
        units, entries = mask[start : start + chunk].nonzero(as_tuple=True)
        own = g[:, :, start : start + chunk]
        if positions == 1:
            rows = own[:, :, units, 0] * x[:, entries, 0]
        else:
            rows = torch.matmul(own, x.transpose(1, 2))[:, :, units, entries]
        add_rows(gram, rows)


def _add_by_units(gram: Tensor, g: Tensor, x: Tensor, mask: Tensor) -> None:
    """Inner products of inputs for each unit, and with them one matrix product for each sample."""
    num_columns, num_samples, size, positions = g.shape
    flat = x.transpose(1, 2).reshape(num_samples * positions, -1)
    chunk = max(1, INNER_CHUNK // (num_samples * positions) ** 2)
    for start in range(0, size, chunk):
        own = g[:, :, start : start + chunk].permute(2, 0, 1, 3).contiguous()  # (o, R, N, L)
        inner = torch.stack([_inner(flat, row) for row in mask[start : start + chunk]])
        inner = inner.view(len(own), num_samples, positions, num_samples, positions)
        for n in range(num_samples):
            left = own[:, :, n].permute(1, 0, 2).flatten(1)  # (R, o L)
            right = _weighted(own, inner[:, n]).flatten(0, 1).flatten(1)  # (o L, R N)
            gram[:, n] += (left @ right).view(num_columns, num_columns, num_samples)


def _inner(flat: Tensor, row: Tensor) -> Tensor:
    """(N L, N L) inner products of inputs over the entries of a row that are active."""
    chosen = flat[:, row]
    return chosen @ chosen.T


def _weighted(own: Tensor, inner: Tensor) -> Tensor:
    """(o, L, R, N): sum over q of inner (o, L, N, q) times gradients (o, R, N, q)."""
    if own.shape[3] == 1:
        return (own[..., 0] * inner[:, 0, :, 0][:, None])[:, None]
    return torch.matmul(inner.transpose(1, 2), own.permute(0, 2, 3, 1)).permute(0, 2, 3, 1)
