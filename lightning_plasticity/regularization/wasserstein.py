"""Regularisation of the weights' distribution towards that of the initial weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_plasticity.regularization.base import in_full_precision
from lightning_plasticity.regularization.l2_init import L2Init


class Wasserstein(L2Init):
    """Add ``strength * sum_l ||sort(theta_l) - sort(theta_init,l)||^2`` to the loss, l over parameter tensors.

    The squared 2-Wasserstein distance (times the number of entries) between the entries of a tensor now and at the
    start: weights may move and change places, their distribution may not. A cheaper cousin of ``L2Init``, never larger.

    Source: Lewandowski et al. 2023 (arXiv 2312.00246). The initial weights are kept as in ``L2Init``; sorting costs
    O(P log P) in each step.

    Args:
        strength: >= 0; 1e-2 to 1e-5.
        params: names or wildcards of the parameters to hold; None for all trainable ones.

    Raises:
        ValueError: as ``L2Init``.

    Example:
        >>> import torch
        >>> from lightning_plasticity import Wasserstein
        >>> from lightning_plasticity.regularization import RegularizationEngine
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> engine = RegularizationEngine([Wasserstein(0.5)])
        >>> engine.hold_initial_weights(net)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(net.weight.flip(1))  # the same values elsewhere
        >>> engine.penalty(net).item()
        0.0
    """

    def reference(self, parameter: Tensor) -> Tensor:
        """The entries in ascending order, in the parameter's shape."""
        return parameter.flatten().sort().values.view(parameter.shape)

    def drift(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        """The penalty, (); its gradient goes to the entries by their rank."""
        parts = [
            (in_full_precision(now).flatten().sort().values - in_full_precision(then).flatten()).square().sum()
            for now, then in pairs
        ]
        return self.strength * torch.stack(parts).sum() if parts else None
