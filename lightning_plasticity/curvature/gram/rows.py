"""Explicit gradient rows, summed into a Gram matrix."""

from __future__ import annotations

from torch import Tensor

ROW_CHUNK = 64 * 2**20  # elements of per-sample gradient rows held at once


def add_rows(gram: Tensor, rows: Tensor) -> None:
    """Add J J^T for explicit gradient rows (R, N, p); of (R, N, R, N) blocks [r, :, s], those with s >= r."""
    num_columns, num_samples, size = rows.shape
    for r in range(num_columns):
        block = rows[r] @ rows[r:].reshape(-1, size).T
        gram[r, :, r:] += block.view(num_samples, num_columns - r, num_samples)
