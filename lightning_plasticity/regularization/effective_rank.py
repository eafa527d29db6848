"""Keep hidden features diverse by raising their effective rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.linalg import as_feature_matrix, effective_rank
from lightning_plasticity.regularization.base import Regularizer, check_every, check_strength

RankMode = Literal["separate", "loss"]
# Inside the logarithm, as in the public code of Prakash et al. 2026: keeps the gradient below about 18 e / sum.
LOG_OFFSET = 1e-8


class EffectiveRank(Regularizer):
    """Ascent on the mean effective rank of hidden activations: the "ER" of L2-ER.

    Source: Prakash et al. 2026 (arXiv 2509.22335); effective rank of Roy and Vetterli 2007.

    ``mode="separate"`` is the paper's: every n optimizer steps a plain gradient step on the minibatches seen since the
    last one, put together, past the optimizer, at learning rate ``strength``. ``mode="loss"`` subtracts ``strength``
    times the mean effective rank of the current minibatch from the loss.

    A layer that has collapsed to zero gets no gradient, and directions that are exactly missing are not pushed: their
    gradient is not unique, and the one that a singular value decomposition returns is rounding noise, different from
    machine to machine. What is small but there is pushed hardest. Reviving dead layers is the job of a reset.

    Args:
        strength: >= 0; learning rate of the separate step, or weight of the penalty. 1e-2 for small MLPs, 1e-4 for
            conv nets.
        layers: hidden layers by name or wildcard, an int for the last so many, None for all that are found.
        every_n_steps: n. The rank is capped by n times the minibatch, so this is a real hyperparameter.
        mode: ``"separate"`` or ``"loss"``.
        conv: convolutional features: ``"positions"`` are samples, or each sample is ``"flatten"``-ed.

    Raises:
        ValueError: for a negative strength, n below 1 or an unknown mode.
    """

    def __init__(
        self,
        strength: float = 1e-2,
        layers: list[str] | int | None = None,
        every_n_steps: int = 8,
        mode: RankMode = "separate",
        conv: Literal["positions", "flatten"] = "positions",
    ) -> None:
        self.strength = check_strength("strength", strength)
        self.layers = check_layers(layers)
        self.every_n_steps = check_every(every_n_steps)
        if mode not in ("separate", "loss"):
            raise ValueError(f"mode={mode!r}, expected 'separate' (the paper's own step) or 'loss' (a penalty).")
        if conv not in ("positions", "flatten"):
            raise ValueError(f"conv={conv!r}, expected 'positions' or 'flatten'.")
        self.mode = mode
        self.conv = conv

    @property
    def needs_features(self) -> bool:
        """In loss mode, unless switched off."""
        return self.mode == "loss" and self.strength > 0

    @property
    def adds_to_loss(self) -> bool:
        """In loss mode, unless switched off."""
        return self.needs_features

    @property
    def takes_steps(self) -> bool:
        """In the paper's mode, unless switched off."""
        return self.mode == "separate" and self.strength > 0

    @property
    def step_size(self) -> float:
        """``strength``."""
        return self.strength

    def penalty(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """``-strength * mean effective rank`` in loss mode."""
        if not self.needs_features or not features:
            return None
        return -self.strength * self.step_objective(module, features)

    def step_objective(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor:
        """Mean effective rank over layers, (), of features with their channels last."""
        matrices = [as_feature_matrix(value, conv=self.conv, channel_dim=-1) for value in features.values()]
        return torch.stack([effective_rank(matrix, log_offset=LOG_OFFSET) for matrix in matrices]).mean()


def check_layers(layers: Any) -> list[str] | int | None:
    """A choice of layers.

    Raises:
        TypeError: for one string instead of a list, or something else that is no choice.
        ValueError: for a number below 1 or an empty list.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers={layers!r} is one string, expected a list of names; write layers=[{layers!r}].")
    if isinstance(layers, list | tuple) and layers and all(isinstance(name, str) for name in layers):
        return list(layers)
    if layers is None or (isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1):
        return layers
    error = ValueError if layers == [] or type(layers) is int else TypeError
    raise error(f"layers={layers!r}, expected a list of names, a number of last layers >= 1, or None for all.")
