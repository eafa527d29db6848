"""Coupled L2 regularisation (weight decay that the optimizer sees)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_plasticity.regularization.base import Regularizer, check_strength


class L2(Regularizer):
    """Add ``strength * theta`` to the gradient, before the optimizer: the gradient of strength / 2 * ||theta||^2.

    Coupled, on all parameters, biases and norm scales included, as in Prakash et al. 2026 (arXiv 2509.22335) and Dohare
    et al. 2024. Under a Trainer it is added once for each optimizer step, after unscaling and before gradient clipping.
    For Adam this is not the decoupled decay of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Args:
        strength: >= 0; 1e-4 to 1e-3 are usual.

    Raises:
        ValueError: for a negative strength.

    Example:
        >>> import torch
        >>> from lightning_plasticity import L2
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> weight.grad = torch.zeros(1)
        >>> L2(0.5).add_gradient([weight])
        >>> weight.grad
        tensor([1.])
    """

    def __init__(self, strength: float = 1e-4) -> None:
        self.strength = check_strength("strength", strength)

    def add_gradient(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add to the gradients that exist; a parameter without one is not updated, so it does not decay either."""
        if not self.strength:
            return
        pairs: list[tuple[Tensor, Tensor]] = [
            (p.grad, p) for p in parameters if p.grad is not None and not p.grad.is_sparse
        ]
        if pairs:
            with torch.no_grad():
                torch._foreach_add_([grad for grad, _ in pairs], [value for _, value in pairs], alpha=self.strength)
