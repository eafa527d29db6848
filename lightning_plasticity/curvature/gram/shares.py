"""Shares of a Gram matrix: inner products of factored gradient rows, each by the cheaper of its routes.

``gram`` is (R, N, R, N). Only its blocks [r, :, s] with s >= r are filled; ``mirror`` fills the others, once for all
shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity.curvature.gram.factors import Factors, Share
from lightning_plasticity.curvature.gram.masked import add_masked
from lightning_plasticity.curvature.gram.rows import ROW_CHUNK, add_rows


def add_share(gram: Tensor, share: Share) -> None:
    """Add the share of some parameters: each kind of use with itself, and a tied embedding's uses with each other."""
    for part in share:
        if part.kind == "lookup":
            _add_lookup(gram, part)
        elif part.kind == "diagonal":
            _add_diagonal(gram, part)
        elif part.mask is not None and part.weight is not None:
            add_masked(gram, part)
        else:
            _add_dense(gram, part)
    if len(share) == 2:
        _add_tied(gram, *share)


def mirror(gram: Tensor) -> None:
    """Fill the blocks [s, :, r], s > r, from those that the shares were added to."""
    for r in range(len(gram)):
        for s in range(r + 1, len(gram)):
            gram[s, :, r] = gram[r, :, s].T


def _add_dense(gram: Tensor, part: Factors) -> None:
    num_groups, num_columns, num_samples, size, positions = part.gradients.shape
    num_rows, num_inputs = num_columns * num_samples, part.inputs.shape[2]
    for group in range(num_groups):
        g, x = part.gradients[group], part.inputs[group]
        if part.bias is not None:
            ones = g.new_ones(num_samples, 1, positions)
            x = ones if part.weight is None else torch.cat([x, ones], dim=1)
        if positions == 1:
            _add_vectors(gram, g[..., 0], x[..., 0])
            continue
        by_rows = num_rows * size * num_inputs * positions + num_rows**2 * size * num_inputs
        by_pairs = (num_rows * positions) ** 2 * size + (num_samples * positions) ** 2 * num_inputs
        if by_pairs < by_rows and (num_samples * positions) ** 2 <= ROW_CHUNK:
            _add_pairs(gram, g, x)
        else:
            _add_rows(gram, g, x)


def _add_vectors(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """One position: <g_rn, g_sm> <x_n, x_m>."""
    num_columns, num_samples, size = g.shape
    inputs = (x @ x.T)[:, None]
    for r in range(num_columns):
        outer = g[r] @ g[r:].reshape(-1, size).T
        # In place and with both factors in their own dtype: no float64 copy of either is made.
        gram[r, :, r:].addcmul_(outer.view(num_samples, num_columns - r, num_samples), inputs)


def _add_rows(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """Explicit rows, a chunk of output channels at a time."""
    num_columns, num_samples, size, _ = g.shape
    chunk = max(1, ROW_CHUNK // max(1, num_columns * num_samples * x.shape[1]))
    for start in range(0, size, chunk):
        rows = torch.matmul(g[:, :, start : start + chunk], x.transpose(1, 2))  # (R, N, o, k)
        add_rows(gram, rows.reshape(num_columns, num_samples, -1))


def _add_pairs(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """Sum over position pairs of <g_rn[p], g_sm[q]> <x_n[p], x_m[q]>."""
    num_columns, num_samples, size, positions = g.shape
    flat_x = x.transpose(1, 2).reshape(-1, x.shape[1])
    inputs = flat_x @ flat_x.T
    flat_g = g.transpose(2, 3).reshape(num_columns, num_samples * positions, size)
    for r in range(num_columns):
        for s in range(r, num_columns):
            product = (flat_g[r] @ flat_g[s].T).mul_(inputs)
            block = product.view(num_samples, positions, num_samples, positions)
            gram[r, :, s] += block.sum(dim=(1, 3), dtype=gram.dtype)


def _add_diagonal(gram: Tensor, part: Factors) -> None:
    g = part.gradients[0]
    if part.weight is not None:
        add_rows(gram, torch.einsum("rnol,nol->rno", g, part.inputs[0]))
    if part.bias is not None:
        add_rows(gram, g.sum(dim=3))


def _add_lookup(gram: Tensor, part: Factors) -> None:
    """Sum over pairs of positions that take the same row of the table, one table row at a time."""
    g, rows = part.gradients[0], part.inputs[0, :, 0]  # (R, N, O, L), (N, L)
    num_columns, num_samples, size, _ = g.shape
    pairs = rows * num_samples + torch.arange(num_samples, device=rows.device)[:, None]
    pairs, positions = torch.unique(pairs, return_inverse=True)  # (table row, sample), sorted
    sums = g.new_zeros(len(pairs), num_columns, size)
    sums.index_add_(0, positions.flatten(), g.permute(1, 3, 0, 2).reshape(-1, num_columns, size))
    lengths = torch.unique_consecutive(pairs // num_samples, return_counts=True)[1].tolist()
    flat = gram.view(num_columns * num_samples, -1)
    first = num_samples * torch.arange(num_columns, device=rows.device)
    parts = zip(torch.split(pairs % num_samples, lengths), torch.split(sums, lengths), strict=True)
    for samples, own in parts:
        own = own.flatten(0, 1)
        index = (samples[:, None] + first).flatten()
        flat[index[:, None], index] += (own @ own.T).to(gram.dtype)


def _add_tied(gram: Tensor, dense: Factors, lookup: Factors) -> None:
    """A table that is also a linear layer's weight (an output head): what each use has in common with the other.

    The linear row of a column is sum_p g[p] x[p]^T over the head's positions, the lookup row sum_q e_t(q) h[q]^T over
    those of the embedding, with t(q) its token: their product is sum_pq g[t(q), p] <x[p], h[q]>.
    """
    g, x = dense.gradients[0], dense.inputs[0].transpose(1, 2)  # (R, N, V, L), (N, L, D)
    h, tokens = lookup.gradients[0], lookup.inputs[0, :, 0]  # (R, N, D, T), (N, T)
    num_columns, num_samples = h.shape[:2]
    chunk = max(1, ROW_CHUNK // max(1, num_columns * x.shape[1] * tokens.numel()))  # samples of the head at a time
    for start in range(0, num_samples, chunk):
        part = slice(start, start + chunk)
        picked = g[:, part][:, :, tokens.flatten()]  # (R, n, N T, L)
        for s in range(num_columns):
            inner = torch.einsum("nld,mdt->nmtl", x[part], h[s]).flatten(1, 2)  # (n, N T, L)
            product = torch.einsum("rnql,nql->rnq", picked, inner)
            block = product.view(num_columns, -1, num_samples, tokens.shape[1]).sum(3, dtype=gram.dtype)
            # Of rows (r, n) of the head with (s, m) of the table, and the other way round.
            gram[: s + 1, part, s] += block[: s + 1]
            gram[s, :, s:, part] += block[s:].permute(2, 0, 1)
