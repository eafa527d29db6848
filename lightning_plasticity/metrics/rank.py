"""Ranks of features as torchmetrics, streamed: batches and processes add up, no features are kept."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity.linalg.feature_matrix import FeatureLayout, as_feature_matrix
from lightning_plasticity.linalg.functionals import (
    check_nonnegative,
    count_above,
    effective_rank_of,
    squared_up_to_scale,
    srank_of,
    stable_rank_of,
)

# The state is a D x D matrix in float64: 2 GiB at this size, and its eigenvalues take many minutes.
_MAX_FEATURES = 16384


class _SecondMomentMetric(Metric):
    """A function of the singular values of all features seen, kept as the float64 sum of ``F^T F`` and a count.

    Squaring costs half of the digits: singular values below ``sqrt(D * eps64) * sigma_1`` (3e-7 at D = 512) are noise
    of the eigenvalues and set to zero. Summation adds less noise than that, since its errors are random in sign.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound = 0.0

    second_moment: Tensor  # (D, D), or () before the first batch
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
        # Layout errors shall come now and not after an epoch.
        as_feature_matrix(torch.zeros(1, 1), conv=conv)
        if num_features is not None:
            _check_num_features(num_features)
        # Without num_features the state is a scalar zero, which broadcasts when states are added.
        shape = () if num_features is None else (num_features, num_features)
        self.add_state("second_moment", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, activations: Tensor) -> None:
        """Add a batch.

        Args:
            activations: ``(N, D)`` or ``(N, ...)``, any floating point dtype; arranged by ``as_feature_matrix``.

        Raises:
            ValueError: If the number of features differs from that of earlier batches or is above 16384, or if the
                activations cannot be arranged as a matrix.
        """
        features = as_feature_matrix(activations.detach(), conv=self.conv, channel_dim=self.channel_dim).double()
        num_features = features.shape[1]
        if self.second_moment.ndim == 0:
            _check_num_features(num_features)
        else:
            check_same_units("features", num_features, self.second_moment.shape[0])
        # Never in place: a state made in inference mode could not be updated outside of it.
        self.second_moment = torch.addmm(self.second_moment, features.T, features)
        self.num_samples = self.num_samples + features.shape[0]

    def compute(self) -> Tensor:
        """The rank of all features seen, ``()`` in float64.

        0 if all are zero; NaN if there were none, or if one or its square is not finite.
        """
        if self.second_moment.ndim == 0 or self.num_samples == 0:
            return torch.full((), math.nan, dtype=torch.float64, device=self.second_moment.device)
        num_samples = int(self.num_samples)
        return self._rank(_singular_values(self.second_moment, num_samples), num_samples)

    @abstractmethod
    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        """The rank, (), of singular values in descending order, (min(N, D),)."""


class EffectiveRank(_SecondMomentMetric):
    r"""Effective rank of features, ``exp(-sum p log p)`` with ``p = sigma / sum sigma``.

    Roy and Vetterli 2007 (EUSIPCO); the function ``effective_rank`` of all batches joined. The state is the
    ``(D, D)`` sum of ``F^T F`` and the number of samples, both in float64, so any split of the data into batches and
    processes gives the same value. Between 1 and min(N, D), which caps it: compare at the same N.

    Args:
        conv: Activations with positions: ``"positions"`` takes every position as a sample, ``"flatten"`` every entry as
            a feature; see ``as_feature_matrix``.
        channel_dim: Dimension of the channels; by default the last of three dimensions, dimension 1 of four or five.
        num_features: D. Needed when a process may see no batch at all, since processes must agree on the shape.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = EffectiveRank()
        >>> metric.update(torch.eye(3)[:2])
        >>> metric.update(torch.eye(3)[2:])
        >>> round(metric.compute().item(), 6)
        3.0
    """

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return effective_rank_of(sigma)


class StableRank(_SecondMomentMetric):
    """Stable rank of features, ``sum sigma_i^2 / sigma_1^2``.

    Rudelson and Vershynin 2007 (arXiv math/0503442); the function ``stable_rank`` of all batches joined.

    Args:
        conv: See ``EffectiveRank``.
        channel_dim: See ``EffectiveRank``.
        num_features: See ``EffectiveRank``.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = StableRank()
        >>> metric(torch.diag(torch.tensor([2.0, 1.0])))
        tensor(1.2500, dtype=torch.float64)
    """

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return stable_rank_of(sigma)


class SRank(_SecondMomentMetric):
    """Least number of singular values that make up the share ``1 - delta`` of their sum.

    Kumar et al. 2021 (arXiv 2010.14498); the function ``srank`` of all batches joined.

    Args:
        delta: Share of the sum that may be left out, in (0, 1); 0.01 in the paper.
        kwargs: ``conv``, ``channel_dim`` and ``num_features`` as in ``EffectiveRank``; the rest for
            ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``delta`` is not in (0, 1), ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = SRank()
        >>> metric(torch.diag(torch.tensor([50.0, 49.5, 0.4])))
        tensor(2., dtype=torch.float64)
    """

    def __init__(self, delta: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        srank_of(torch.ones(1), delta=delta)  # refuses a bad delta now
        self.delta = delta

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return srank_of(sigma, delta=self.delta)


class ApproximateRank(SRank):
    """Least number of *squared* singular values that make up the share ``1 - delta`` of their sum.

    Yang et al. 2020 (arXiv 1909.12255); the function ``approximate_rank`` of all batches joined.

    Args:
        delta: Share of the sum that may be left out, in (0, 1); 0.01 in the paper.
        kwargs: See ``SRank``.

    Raises:
        ValueError: If ``delta`` is not in (0, 1), ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = ApproximateRank()
        >>> metric(torch.diag(torch.tensor([10.0, 0.5])))
        tensor(1., dtype=torch.float64)
    """

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return srank_of(squared_up_to_scale(sigma), delta=self.delta)


class FeatureRank(_SecondMomentMetric):
    """Number of singular values of ``F / sqrt(N)`` above ``eps``; depends on the scale of the features, on purpose.

    Lyle et al. 2022 (arXiv 2204.09560); the function ``feature_rank`` of all batches joined.

    Args:
        eps: Threshold, not negative; 0.01 in the paper.
        kwargs: See ``SRank``.

    Raises:
        ValueError: If ``eps`` is negative, ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = FeatureRank()
        >>> metric(torch.tensor([[1.0, 0.0], [0.0, 1e-3]]))
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, eps: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_nonnegative("eps", eps)
        self.eps = eps

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return count_above(sigma / math.sqrt(num_samples), self.eps)


class NumericalRank(_SecondMomentMetric):
    """Number of singular values above the rounding noise of float32 features, by NumPy's rule.

    ``#{sigma_i > max(N, D) * eps32 * sigma_1}``; the function ``numerical_rank`` of all batches joined, taken as
    float32 whatever their dtype, because a second moment cannot resolve the rule of float64. The threshold grows with
    N, so keep N fixed: at a million samples it is a tenth of ``sigma_1``.

    Args:
        conv: See ``EffectiveRank``.
        channel_dim: See ``EffectiveRank``.
        num_features: See ``EffectiveRank``.
        kwargs: For ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = NumericalRank()
        >>> metric(torch.ones(5, 3))
        tensor(1., dtype=torch.float64)
    """

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        size = max(num_samples, self.second_moment.shape[0])
        return count_above(sigma, size * torch.finfo(torch.float32).eps * sigma[0])


class SingularValues(_SecondMomentMetric):
    """Singular values of all features seen, descending, ``(min(N, D),)`` in float64: the spectrum behind the ranks.

    Args:
        kwargs: See ``EffectiveRank``.

    Raises:
        ValueError: If ``conv`` is unknown or ``num_features`` is not in 1..16384.

    Example:
        >>> import torch
        >>> metric = SingularValues()
        >>> metric(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """

    higher_is_better = None

    def _rank(self, sigma: Tensor, num_samples: int) -> Tensor:
        return sigma


def check_same_units(noun: str, received: int, expected: int) -> None:
    """Refuse a batch whose number of features or units is not that of the batches before.

    Args:
        noun: What is counted, for the message.
        received: Their number in this batch.
        expected: Their number before.

    Raises:
        ValueError: If the numbers differ.

    Example:
        >>> check_same_units("features", 3, 3)
    """
    if received != expected:
        raise ValueError(
            f"Received activations with {received} {noun}; expected {expected} as before. Use one metric per layer, "
            "and conv='positions' if the number of positions varies."
        )


def _check_num_features(num_features: int) -> None:
    if not 1 <= num_features <= _MAX_FEATURES:
        raise ValueError(
            f"Received {num_features} features; expected 1 to {_MAX_FEATURES}, since the state is a matrix of features "
            "by features in float64. Use conv='positions', or a random subset of the features."
        )


def _singular_values(second_moment: Tensor, num_samples: int) -> Tensor:
    """Singular values of F, descending, (min(N, D),), from F^T F, (D, D); all NaN if an entry is not finite."""
    size = second_moment.shape[0]
    scale = second_moment.diagonal().max()  # the largest entry of a positive semi-definite matrix is on its diagonal
    if not torch.isfinite(second_moment).all():
        return second_moment.new_full((min(num_samples, size),), math.nan)
    if scale == 0:
        return second_moment.new_zeros(min(num_samples, size))
    eigenvalues = torch.linalg.eigvalsh(second_moment / scale).flip(0)[:num_samples]  # flip: descending
    noise = size * torch.finfo(torch.float64).eps * eigenvalues[0]
    sigma: Tensor = eigenvalues.where(eigenvalues > noise, 0.0).sqrt()
    return sigma * scale.sqrt()
