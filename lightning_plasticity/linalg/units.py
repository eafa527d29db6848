"""Dormant and dead units of a layer, from its feature matrix (see ``as_feature_matrix`` for convolutions)."""

import math

import torch
from torch import Tensor

from lightning_plasticity.linalg.feature_matrix import check_feature_matrix
from lightning_plasticity.linalg.functionals import check_nonnegative


def dormancy_scores(features: Tensor) -> Tensor:
    """Mean absolute activation of each unit relative to that of its layer.

    ``s_j = E|h_j| / ((1/D) sum_k E|h_k|)``; Sokar et al. 2023 (arXiv 2302.12902, equation 1). Their code adds 1e-9 to
    the denominator, we do not, so the scores do not depend on the scale. They average to 1.

    Args:
        features: h, ``(N, D)``, activations behind the nonlinearity.

    Returns:
        ``(D,)`` in float64. A wholly dead layer scores 0 everywhere. If an entry is not finite, so is the mean of the
        layer, and all scores are NaN.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``features`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> dormancy_scores(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([2., 0.], dtype=torch.float64)
    """
    check_feature_matrix(features)
    return scores_from_means(features.detach().double().abs().mean(0))


def scores_from_means(means: Tensor) -> Tensor:
    """Dormancy scores from the mean absolute activations; a common factor does not matter, so sums do as well.

    Args:
        means: ``E|h_j|``, ``(D,)``.

    Returns:
        ``(D,)``, see ``dormancy_scores``.

    Example:
        >>> import torch
        >>> scores_from_means(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """
    layer = means.mean()
    scores = means / layer.where(layer > 0, 1.0)
    # A finite mean over an infinite one would pass for dormant.
    return scores.where(torch.isfinite(layer), math.nan)


def dormant_units(features: Tensor, tau: float = 0.025) -> Tensor:
    """Units whose dormancy score is at most tau.

    Sokar et al. 2023 (arXiv 2302.12902, definition 3.1), who use 0.025 and 0.1. With 0, dormant means dead.

    Args:
        features: ``(N, D)``, activations behind the nonlinearity.
        tau: Threshold, not negative.

    Returns:
        ``(D,)`` of bool; all true for a wholly dead layer. If an entry is not finite, no unit is called dormant,
        because the mean of the layer is unknown.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``features`` is not a matrix or is empty, or ``tau`` is negative.

    Example:
        >>> import torch
        >>> dormant_units(torch.tensor([[1.0, 0.01], [3.0, 0.0]]))
        tensor([False,  True])
    """
    check_nonnegative("tau", tau)
    return dormancy_scores(features) <= tau


def dead_units(features: Tensor) -> Tensor:
    """Units that are exactly 0 on every sample.

    The usual definition for ReLU (Dohare et al. 2024, doi 10.1038/s41586-024-07711-7). The answer depends on N: a unit
    dead on 256 samples may be alive on 2000. Units that saturate elsewhere than at 0 are not found.

    Args:
        features: ``(N, D)``, activations behind the nonlinearity.

    Returns:
        ``(D,)`` of bool. A unit with an entry that is not finite is not dead; the others are judged as usual.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``features`` is not a matrix or is empty.

    Example:
        >>> import torch
        >>> dead_units(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([False,  True])
    """
    check_feature_matrix(features)
    return (features == 0).all(0)
