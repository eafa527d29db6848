"""Functionals of a nonnegative spectrum: singular values of features, or ``|eigenvalues|`` with multiplicities.

Multiplicities may be fractional, so quadratures are served as well. Conventions: float64; all zero gives 0; anything
not finite gives NaN, never an exception, because a diverged network must not end a training run.
"""

import math

import torch
from torch import Tensor

# Relative slack for "reaches (1 - delta) of the total": without it, ties such as 99 of 100 equal values would be
# decided by the rounding of a sum and change with the scale of the matrix.
_TIE_SLACK = 1e-12


def effective_rank_of(values: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Exponential of the entropy of the normalised values.

    ``exp(-sum_i c_i q_i log q_i)`` with ``q_i = v_i / sum_j c_j v_j``; Roy and Vetterli 2007 (EUSIPCO) with singular
    values and ``c_i = 1``. Between 1 and the number of values; 0 if all values are 0.

    Args:
        values: Nonnegative, ``(..., K)``.
        counts: Nonnegative multiplicities that broadcast with ``values``, not necessarily whole; 1 by default.

    Returns:
        ``(...)`` in float64.

    Raises:
        ValueError: If there are no values, or a value or count is negative.

    Example:
        >>> import torch
        >>> round(effective_rank_of(torch.tensor([2.0, 2.0, 0.0])).item(), 6)
        2.0
        >>> round(effective_rank_of(torch.tensor([2.0, 0.0]), counts=torch.tensor([7.5, 3.0])).item(), 6)
        7.5
    """
    values, counts, invalid = _prepare(values, counts)
    total = (counts * values).sum(-1, keepdim=True)
    q = values / total.where(total > 0, 1.0)
    entropy = -(counts * torch.xlogy(q, q)).sum(-1)
    return _finish(entropy.exp(), values, invalid)


def stable_rank_of(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sum of squares over the largest square.

    ``sum_i c_i v_i^2 / max_i v_i^2``; Rudelson and Vershynin 2007 (arXiv math/0503442) with singular values.

    Args:
        values: Nonnegative, ``(..., K)``.
        counts: Nonnegative multiplicities that broadcast with ``values``, not necessarily whole; 1 by default.

    Returns:
        ``(...)`` in float64; 0 if all values are 0.

    Raises:
        ValueError: If there are no values, or a value or count is negative.

    Example:
        >>> import torch
        >>> stable_rank_of(torch.tensor([2.0, 1.0]))
        tensor(1.2500, dtype=torch.float64)
    """
    values, counts, invalid = _prepare(values, counts)
    return _finish((counts * values.square()).sum(-1), values, invalid)  # the largest value is 1 here


def srank_of(values: Tensor, counts: Tensor | None = None, delta: float = 0.01) -> Tensor:
    """Least number of largest values whose sum reaches the share ``1 - delta`` of the total.

    ``min {k : sum_{i<=k} v_i >= (1 - delta) sum_i v_i}``; Kumar et al. 2021 (arXiv 2010.14498) with singular
    values and delta 0.01. With multiplicities, the value at which the sum crosses is taken in part and the resulting
    count rounded up.

    Args:
        values: Nonnegative, ``(..., K)``, in any order.
        counts: Nonnegative multiplicities that broadcast with ``values``, not necessarily whole; 1 by default.
        delta: Share of the sum that may be left out, in (0, 1).

    Returns:
        ``(...)`` whole numbers in float64; 0 if all values are 0.

    Raises:
        ValueError: If ``delta`` is not in (0, 1), there are no values, or a value or count is negative.

    Example:
        >>> import torch
        >>> srank_of(torch.tensor([50.0, 49.5, 0.5]))
        tensor(2., dtype=torch.float64)
    """
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta={delta} is not in (0, 1); it is the share of the sum left out, 0.01 by custom.")
    values, counts, invalid = _prepare(values, counts)
    values, order = values.sort(dim=-1, descending=True)
    counts = counts.gather(-1, order)
    mass, number = (counts * values).cumsum(-1), counts.cumsum(-1)
    target = (1.0 - delta) * mass[..., -1:] * (1.0 - _TIE_SLACK)
    crossing = (mass < target).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)

    value, count = values.gather(-1, crossing), counts.gather(-1, crossing)
    missing = target - (mass.gather(-1, crossing) - count * value)
    # Rounding may push the part outside of the node when the node is tiny beside the total, hence the bounds.
    part = (missing / value.where(value > 0, 1.0)).clamp(min=0.0).minimum(count)
    rank = (number.gather(-1, crossing) - count + part).ceil().squeeze(-1)
    return _finish(rank, values, invalid)


def participation_ratio_of(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Square of the sum over the sum of squares.

    ``(sum_i c_i x_i)^2 / sum_i c_i x_i^2``. Of features, the values are the *squared* singular values, that is the
    eigenvalues of the uncentred covariance; Gao et al. 2017 (doi 10.1101/214262) centre it, we do not.

    Args:
        values: Nonnegative, ``(..., K)``.
        counts: Nonnegative multiplicities that broadcast with ``values``, not necessarily whole; 1 by default.

    Returns:
        ``(...)`` in float64; 0 if all values are 0.

    Raises:
        ValueError: If there are no values, or a value or count is negative.

    Example:
        >>> import torch
        >>> participation_ratio_of(torch.tensor([3.0, 1.0]))
        tensor(1.6000, dtype=torch.float64)
    """
    values, counts, invalid = _prepare(values, counts)
    squares = (counts * values.square()).sum(-1)
    ratio = (counts * values).sum(-1).square() / squares.where(squares > 0, 1.0)
    return _finish(ratio, values, invalid)


def count_above(values: Tensor, threshold: float | Tensor) -> Tensor:
    """Number of values above a threshold, NaN if a value is not finite.

    Args:
        values: ``(..., K)``.
        threshold: A number, or a tensor that broadcasts with ``values``.

    Returns:
        ``(...)`` in float64.

    Example:
        >>> import torch
        >>> count_above(torch.tensor([3.0, 1.0, 0.5]), 0.5)
        tensor(2., dtype=torch.float64)
    """
    count = (values > threshold).sum(-1).double()
    return count.where(torch.isfinite(values).all(-1), math.nan)


def squared_up_to_scale(values: Tensor) -> Tensor:
    """Squares of nonnegative values divided by the largest square, so that nothing under- or overflows.

    Args:
        values: ``(..., K)``.

    Returns:
        ``(..., K)``; zeros stay zeros.

    Example:
        >>> import torch
        >>> squared_up_to_scale(torch.tensor([2e-200, 1e-200], dtype=torch.float64))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    largest = values.amax(-1, keepdim=True)
    return (values / largest.where(largest != 0, 1.0)).square()


def check_nonnegative(name: str, value: float) -> None:
    """Refuse a threshold that is negative or not a finite number.

    Args:
        name: Name of the argument, for the message.
        value: Its value.

    Raises:
        ValueError: If the value is negative, infinite or NaN.

    Example:
        >>> check_nonnegative("tau", 0.1)
    """
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value} is not a threshold; expected a finite number of at least 0.")


def _prepare(values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values over their largest, and counts, both (..., K) in float64; and where the result must be NaN, (...)."""
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"Received values of shape {tuple(values.shape)}; expected (..., K) with at least one value.")
    values = values.detach().double()
    ones = torch.ones_like(values)
    counts = ones if counts is None else ones * counts.detach().to(values)
    values = values.expand_as(counts)
    if bool((values < 0).any()) or bool((counts < 0).any()):
        raise ValueError(
            "Received negative values or counts; expected a nonnegative spectrum. "
            "Pass singular values, or the absolute values of eigenvalues."
        )
    invalid = ~(torch.isfinite(values) & torch.isfinite(counts)).all(-1)
    values = values.where(counts > 0, 0.0)  # what is counted zero times must not be the largest either
    largest = values.amax(-1, keepdim=True)
    return values / largest.where(largest > 0, 1.0), counts, invalid


def _finish(result: Tensor, values: Tensor, invalid: Tensor) -> Tensor:
    """Apply the conventions: 0 for an all-zero spectrum, NaN for one that is not finite."""
    return result.where((values > 0).any(-1), 0.0).where(~invalid, math.nan)
