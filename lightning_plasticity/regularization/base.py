"""What a regulariser is: it adds to the loss, to the gradient, or takes a step of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plasticity.nn.masks import find_masks


class Regularizer:
    """Base of all regularisers; override the one method that says where it acts.

    Features are hidden activations by layer name, ``(N, ..., C)``: samples first, channels last.

    Attributes:
        layers: names or wildcards of the hidden layers it wants, an int for the last so many, None for all found.
        params: names or wildcards of the parameters it wants, where it acts on weights; None for all.
        every_n_steps: it acts on every n-th optimizer step.
    """

    layers: list[str] | int | None = None
    params: list[str] | None = None
    every_n_steps: int = 1

    def penalty(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar to add to the training loss, or None."""
        return None

    def add_gradient(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add to ``.grad`` before the optimizer reads it."""

    def step_objective(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar that a separate gradient step on past minibatches increases, or None."""
        return None

    def reference(self, parameter: Tensor) -> Tensor:
        """What ``drift`` will compare a parameter with; called once, on the detached initial value; the same shape."""
        return parameter.clone()

    def drift(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        """A scalar to add to the training loss, from pairs of a parameter and its ``reference``; None for nothing."""
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
    def needs_references(self) -> bool:
        """Whether it compares the weights with initial ones, which the engine then keeps for it."""
        return False

    @property
    def adds_to_loss(self) -> bool:
        """Whether the training loss gets a penalty from it."""
        return self.needs_features or self.needs_references or type(self).penalty is not Regularizer.penalty

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


def check_params(params: Any) -> list[str] | None:
    """A choice of parameters by name or wildcard.

    Raises:
        TypeError: for what is not a list of names.
        ValueError: for an empty list.
    """
    if params is None:
        return None
    if not isinstance(params, list | tuple) or not all(isinstance(name, str) for name in params):
        raise TypeError(f"params={params!r}, expected a list of names or wildcards, e.g. ['net.*'], or None for all.")
    if not params:
        raise ValueError("params is empty; name some, e.g. ['net.*'], or pass None for all parameters.")
    return list(params)


def chosen_parameters(module: nn.Module, params: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters that exist by now, by name, each once; of a compiled module under its own names.

    Those under a mask are masked, so that no gradient reaches entries that the network does not use.
    """
    masks = find_masks(module)
    for full_name, parameter in module.named_parameters():
        name = full_name.replace("_orig_mod.", "")
        if parameter.requires_grad and not is_lazy(parameter) and (params is None or _matches(name, params)):
            mask = masks.get(full_name)
            yield name, parameter if mask is None else parameter.masked_fill(~mask, 0.0)


def check_names(module: nn.Module, params: Sequence[str] | None) -> None:
    """Refuse names and wildcards of parameters that match none.

    Raises:
        ValueError: naming the parameters that exist.
    """
    names = [name.replace("_orig_mod.", "") for name, _ in module.named_parameters()]
    unknown = [pattern for pattern in params or () if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        raise ValueError(f"params={unknown} match no parameter; those that exist: {', '.join(names)}.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def in_full_precision(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_every(value: Any) -> int:
    """``every_n_steps`` as an int.

    Raises:
        ValueError: when it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"every_n_steps={value!r}, expected a whole number >= 1.")
    return value
