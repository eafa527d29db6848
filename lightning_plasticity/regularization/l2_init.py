"""Regularisation towards the initial weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_plasticity.regularization.base import Regularizer, check_params, check_strength, in_full_precision


class L2Init(Regularizer):
    """Add ``strength * ||theta - theta_init||^2`` to the loss: regenerative regularisation.

    Source: Kumar et al. 2023 (arXiv 2308.11958), there "L2 Init". The gradient is 2 * strength * (theta - theta_init);
    ``L2(c)`` adds c * theta, so L2 of the same pull has c = 2 * strength.

    The initial weights are those at the start of the first fit (in a loop of one's own, of the first ``penalty``). They
    are kept over fits and Trainers, and in checkpoints.

    Args:
        strength: >= 0; 1e-2 in the demo, 1e-2 to 1e-5 in the paper.
        params: names or wildcards of the parameters to hold, e.g. ``["net.*"]``; None for all trainable ones.

    Raises:
        ValueError: for a negative strength; when a fit starts, for names that match nothing and for parameters that
            have changed shape since.

    Example:
        >>> import torch
        >>> from lightning_plasticity import L2Init
        >>> from lightning_plasticity.regularization import RegularizationEngine
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> engine = RegularizationEngine([L2Init(0.5)])
        >>> engine.hold_initial_weights(net)
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(2.0)
        >>> round(engine.penalty(net).item(), 5)
        2.0
    """

    def __init__(self, strength: float = 1e-2, params: Sequence[str] | None = None) -> None:
        self.strength = check_strength("strength", strength)
        self.params = check_params(params)

    @property
    def needs_references(self) -> bool:
        """Unless switched off."""
        return self.strength > 0

    def drift(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        """The penalty, ()."""
        parts = [(in_full_precision(now) - in_full_precision(then)).square().sum() for now, then in pairs]
        return self.strength * torch.stack(parts).sum() if parts else None
