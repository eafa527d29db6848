"""What a regulariser is: it adds to the loss, to the gradient, or takes a step of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


class Regularizer:
    """Base of all regularisers; override the one method that says where it acts.

    Features are hidden activations by layer name, ``(N, ..., C)``: samples first, channels last.

    Attributes:
        layers: names or wildcards of the hidden layers it wants, an int for the last so many, None for all found.
        every_n_steps: it acts on every n-th optimizer step.
    """

    layers: list[str] | int | None = None
    every_n_steps: int = 1

    def penalty(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar to add to the training loss, or None."""
        return None

    def add_gradient(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add to ``.grad`` before the optimizer reads it."""

    def step_objective(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar that a separate gradient step on past minibatches increases, or None."""
        return None

    @property
    def step_size(self) -> float:
        """Learning rate of that separate step."""
        return 0.0

    @property
    def needs_features(self) -> bool:
        """Whether the penalty is computed from hidden activations."""
        return False

    @property
    def takes_steps(self) -> bool:
        """Whether it takes separate steps."""
        return False


def check_strength(name: str, value: Any) -> float:
    """A regularisation strength as a float.

    Raises:
        ValueError: when it is negative or not finite.
        TypeError: when it is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}, expected a number >= 0; 0 switches it off.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r}, expected a finite number >= 0; 0 switches it off.")
    return float(value)


def check_every(value: Any) -> int:
    """``every_n_steps`` as an int.

    Raises:
        ValueError: when it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"every_n_steps={value!r}, expected a whole number >= 1.")
    return value
