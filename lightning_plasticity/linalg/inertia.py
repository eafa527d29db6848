"""How many eigenvalues of a symmetric matrix exceed a threshold, without the eigenvalues.

Sylvester's law of inertia: A - t I = L D L^T has as many positive eigenvalues as D, whose blocks are 1 x 1 or 2 x 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count_above(matrix: Tensor, thresholds: Sequence[float]) -> list[int]:
    """The number of eigenvalues above each threshold.

    One factorisation a threshold, a third of the time of ``torch.linalg.eigvalsh`` for all eigenvalues: worth it for
    one or two thresholds. A threshold within rounding (``n eps |A|``) of an eigenvalue may count it or not.

    Source: Sylvester 1852; Bunch and Kaufman 1977 (doi 10.1090/S0025-5718-1977-0428694-0) for the pivots. Each of their
    2 x 2 blocks has a negative determinant, so one eigenvalue of either sign: the diagonal alone miscounts.

    Args:
        matrix: (n, n) symmetric; only its lower triangle is read.
        thresholds: in the units of the eigenvalues.

    Returns:
        One count for each threshold.

    Raises:
        ValueError: for a matrix that is not square, or anything that is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import count_above
        >>> count_above(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), [-2.0, 0.0, 1.5])  # eigenvalues -1 and 1
        [2, 1, 0]
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (n, n): a symmetric matrix.")
    if not bool(torch.isfinite(matrix).all()) or not all(abs(t) < float("inf") for t in thresholds):
        raise ValueError("The matrix or a threshold holds NaN or inf; look for them in what it was computed from.")
    return [_count_positive(matrix, threshold) for threshold in thresholds]


def _count_positive(matrix: Tensor, shift: float) -> int:
    """Positive eigenvalues of A - shift I."""
    if not len(matrix):
        return 0
    shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)  # an exactly singular matrix is no error here
    single = pivots > 0  # LAPACK marks both rows of a 2 x 2 block by a negative pivot
    positive = int((factors.diagonal()[single] > 0).sum())
    return positive + int((~single).sum()) // 2
