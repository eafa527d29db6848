"""Shares of dormant and dead units as torchmetrics, streamed: batches and processes add up, no features are kept."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity.linalg.feature_matrix import FeatureLayout, as_feature_matrix
from lightning_plasticity.linalg.functionals import check_nonnegative
from lightning_plasticity.linalg.units import scores_from_means
from lightning_plasticity.metrics.rank import check_same_units


class _UnitMetric(Metric):
    """A share of units, from the float64 sums of absolute activations and a count."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    absolute_sum: Tensor  # (D,), or () before the first batch
    num_samples: Tensor  # ()

    def __init__(
        self,
        *,
        conv: FeatureLayout = "positions",
        channel_dim: int | None = None,
        num_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.conv: FeatureLayout = conv
        self.channel_dim = channel_dim
        as_feature_matrix(torch.zeros(1, 1), conv=conv)  # refuses an unknown layout now
        if num_features is not None and num_features < 1:
            raise ValueError(f"num_features={num_features}; expected the number of units, at least 1, or None.")
        # Without num_features the state is a scalar zero, which broadcasts when states are added.
        shape = () if num_features is None else (num_features,)
        self.add_state("absolute_sum", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, activations: Tensor) -> None:
        """Add a batch.

        Args:
            activations: ``(N, D)`` or ``(N, ...)``, any floating point dtype, behind the nonlinearity; arranged by
                ``as_feature_matrix``.

        Raises:
            ValueError: If the number of units differs from that of earlier batches, or if the activations cannot be
                arranged as a matrix.
        """
        features = as_feature_matrix(activations.detach(), conv=self.conv, channel_dim=self.channel_dim)
        if self.absolute_sum.ndim > 0:
            check_same_units("units", features.shape[1], self.absolute_sum.shape[0])
        self.absolute_sum = self.absolute_sum + features.double().abs().sum(0)
        self.num_samples = self.num_samples + features.shape[0]

    def compute(self) -> Tensor:
        """The share of units, ``()`` in float64; NaN if there were no samples or one was not finite."""
        # A unit that is not finite has no verdict; a share of the others would hide the failure.
        if self.absolute_sum.ndim == 0 or self.num_samples == 0 or not torch.isfinite(self.absolute_sum).all():
            return torch.full((), math.nan, dtype=torch.float64, device=self.absolute_sum.device)
        return self._units(self.absolute_sum).double().mean()

    @abstractmethod
    def _units(self, absolute_sum: Tensor) -> Tensor:
        """Which units to count, (D,) of bool."""


class DormantUnitRatio(_UnitMetric):
    """Share of tau-dormant units, those with ``E|h_j| <= tau * (1/D) sum_k E|h_k|``.

    Sokar et al. 2023 (arXiv 2302.12902, definition 3.1); the mean of the function ``dormant_units`` of all batches
    joined. In convolutions a unit is a channel, averaged over positions. 1 for a wholly dead layer.

    Args:
        tau: Threshold, not negative; the paper uses 0.025 and 0.1.
        kwargs: ``conv``, ``channel_dim`` and ``num_features`` as in ``EffectiveRank``; the rest for
            ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``tau`` is negative, ``conv`` is unknown or ``num_features`` is not positive.

    Example:
        >>> import torch
        >>> metric = DormantUnitRatio()
        >>> metric.update(torch.tensor([[1.0, 0.01], [3.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, tau: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_nonnegative("tau", tau)
        self.tau = tau

    def _units(self, absolute_sum: Tensor) -> Tensor:
        return scores_from_means(absolute_sum) <= self.tau


class DeadUnitRatio(_UnitMetric):
    """Share of units that were exactly 0 on every sample.

    The usual definition for ReLU (Dohare et al. 2024, doi 10.1038/s41586-024-07711-7); the mean of the function
    ``dead_units`` of all batches joined. In convolutions a unit is a channel and must be 0 at every position.

    Args:
        conv: See ``EffectiveRank``.
        channel_dim: See ``EffectiveRank``.
        num_features: See ``EffectiveRank``.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``conv`` is unknown or ``num_features`` is not positive.

    Example:
        >>> import torch
        >>> metric = DeadUnitRatio()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def _units(self, absolute_sum: Tensor) -> Tensor:
        return absolute_sum == 0
