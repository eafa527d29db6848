"""Ranks of feature matrices. The effective rank, which has a gradient, is in ``effective_rank.py``."""

import math

import torch
from torch import Tensor

from lightning_plasticity.linalg.feature_matrix import check_feature_matrix
from lightning_plasticity.linalg.functionals import (
    check_nonnegative,
    count_above,
    participation_ratio_of,
    squared_up_to_scale,
    srank_of,
    stable_rank_of,
)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, computed in float64; not differentiable.

    The matrix is scaled by its largest entry first, so that scales such as 1e-20 or 1e18 are exact too.

    Args:
        matrix: ``(N, D)`` of any floating point dtype.

    Returns:
        ``(min(N, D),)`` in float64; all NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    check_feature_matrix(matrix)
    matrix = matrix.detach().double()
    scale = matrix.abs().max()
    if scale == 0 or not torch.isfinite(scale):
        fill = 0.0 if scale == 0 else math.nan
        return torch.full((min(matrix.shape),), fill, dtype=torch.float64, device=matrix.device)
    sigma: Tensor = torch.linalg.svdvals(matrix / scale)
    return sigma * scale


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm, ``sum sigma_i^2 / sigma_1^2``.

    Rudelson and Vershynin 2007 (arXiv math/0503442). Plots called "stable rank" in the code of Dohare et al. 2024 show
    what is here called ``srank``.

    Args:
        matrix: ``(N, D)``.

    Returns:
        ``()`` in float64; 0 for an all-zero matrix, NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
        tensor(1.2500, dtype=torch.float64)
    """
    return stable_rank_of(singular_values(matrix))


def srank(matrix: Tensor, delta: float = 0.01) -> Tensor:
    """Least number of singular values whose sum reaches the share ``1 - delta`` of the total.

    Kumar et al. 2021 (arXiv 2010.14498), see ``srank_of``.

    Args:
        matrix: ``(N, D)``.
        delta: Share of the sum that may be left out, in (0, 1); 0.01 in the paper.

    Returns:
        ``()`` in float64; 0 for an all-zero matrix, NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty, or ``delta`` is not in (0, 1).

    Example:
        >>> import torch
        >>> srank(torch.diag(torch.tensor([50.0, 49.5, 0.5])))
        tensor(2., dtype=torch.float64)
    """
    return srank_of(singular_values(matrix), delta=delta)


def approximate_rank(matrix: Tensor, delta: float = 0.01) -> Tensor:
    """Least number of *squared* singular values whose sum reaches the share ``1 - delta`` of the total.

    Yang et al. 2020 (arXiv 1909.12255). With ``srank`` the sum is over the singular values themselves.

    Args:
        matrix: ``(N, D)``.
        delta: Share of the sum that may be left out, in (0, 1); 0.01 in the paper.

    Returns:
        ``()`` in float64; 0 for an all-zero matrix, NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty, or ``delta`` is not in (0, 1).

    Example:
        >>> import torch
        >>> approximate_rank(torch.diag(torch.tensor([10.0, 0.5])))
        tensor(1., dtype=torch.float64)
    """
    return srank_of(squared_up_to_scale(singular_values(matrix)), delta=delta)


def feature_rank(matrix: Tensor, eps: float = 0.01) -> Tensor:
    """Number of singular values of ``F / sqrt(N)`` above ``eps``.

    Lyle et al. 2022 (arXiv 2204.09560). Depends on the scale of the features, on purpose.

    Args:
        matrix: F, ``(N, D)``.
        eps: Threshold, not negative; 0.01 in the paper. With 0, rounding noise counts as rank.

    Returns:
        ``()`` in float64; NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty, or ``eps`` is negative.

    Example:
        >>> import torch
        >>> feature_rank(torch.tensor([[1.0, 0.0], [0.0, 1e-3]]))
        tensor(1., dtype=torch.float64)
    """
    check_nonnegative("eps", eps)
    sigma = singular_values(matrix)
    return count_above(sigma / math.sqrt(matrix.shape[0]), eps)


def numerical_rank(matrix: Tensor) -> Tensor:
    """Number of singular values above the rounding noise of the dtype, by NumPy's rule.

    ``#{sigma_i > max(N, D) * eps_mach * sigma_1}`` with the machine epsilon of the input; half precision counts as
    float32, since at its own epsilon the threshold would exceed ``sigma_1`` from about a thousand rows on.

    Args:
        matrix: ``(N, D)``.

    Returns:
        ``()`` in float64; 0 for an all-zero matrix, NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> numerical_rank(torch.ones(5, 3))
        tensor(1., dtype=torch.float64)
    """
    sigma = singular_values(matrix)
    precision = torch.finfo(torch.float64 if matrix.dtype == torch.float64 else torch.float32).eps
    return count_above(sigma, max(matrix.shape) * precision * sigma[0])


def participation_ratio(matrix: Tensor) -> Tensor:
    """Participation ratio of the uncentred covariance, ``(sum sigma_i^2)^2 / sum sigma_i^4``.

    See ``participation_ratio_of``.

    Args:
        matrix: ``(N, D)``.

    Returns:
        ``()`` in float64; 0 for an all-zero matrix, NaN if an entry is not finite.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> participation_ratio(torch.eye(4)[:, :3])
        tensor(3., dtype=torch.float64)
    """
    return participation_ratio_of(squared_up_to_scale(singular_values(matrix)))
