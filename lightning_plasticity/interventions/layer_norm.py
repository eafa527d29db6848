"""Insert layer norms before the activations of hidden layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_plasticity.nn import find_wiring, undisturbed
from lightning_plasticity.nn.wiring import CONVOLUTIONS, NORMS, unit_count

M = TypeVar("M", bound=nn.Module)
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def insert_layer_norm(
    module: M, layers: Sequence[str] | None = None, example_input: Any = None, eps: float = 1e-5
) -> M:
    """Normalise the pre-activations of hidden layers, in place.

    Each hidden Linear becomes ``Sequential(linear, LayerNorm(out_features))``, each hidden convolution
    ``Sequential(conv, GroupNorm(1, out_channels))``: over channels and positions together, with a scale and an offset
    for each channel. Call it before optimizers are made; parameter names gain a ``.0``.

    Source: Lyle et al. 2024 (arXiv 2402.18762), who pair it with weight decay (``L2`` here).

    Args:
        module: the network, any module.
        layers: names of the layers. None finds them: from a forward pass on ``example_input`` where given (or on the
            module's ``example_input_array``), else every Linear or convolution of a ``Sequential`` that an activation
            follows directly. Layers that already have a norm are left alone then.
        example_input: input of ``module``; a tuple is spread over its arguments.
        eps: of the norms.

    Returns:
        The same module.

    Raises:
        ValueError: for names that are no Linear or convolution, or when no hidden layer is found.

    Example:
        >>> import torch
        >>> from lightning_plasticity import insert_layer_norm
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> insert_layer_norm(net)[0][1].normalized_shape
        (3,)
    """
    example = getattr(module, "example_input_array", None) if example_input is None else example_input
    if layers is not None:
        names = list(layers)
    elif example is not None:
        names = _hidden(module, example)
    else:
        names = [name for name, norm in _in_sequentials(module) if not norm]
    modules = dict(module.named_modules())
    wrong = [name for name in names if not isinstance(modules.get(name), (nn.Linear, *CONVOLUTIONS))]
    if wrong or not names:
        known = [name for name, child in modules.items() if isinstance(child, (nn.Linear, *CONVOLUTIONS))]
        problem = f"{wrong} are no Linear or convolution" if wrong else "found no hidden layer that lacks a norm"
        raise ValueError(
            f"insert_layer_norm: {problem}. Name them with layers=[...] (there are {', '.join(known) or 'none'}), or "
            "pass example_input."
        )
    for name in names:
        parent, _, key = name.rpartition(".")
        layer = modules[name]
        setattr(module.get_submodule(parent), key, nn.Sequential(layer, _norm(layer, eps)))
    return module


def _norm(layer: nn.Module, eps: float) -> nn.Module:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    options: dict[str, Any] = {"eps": eps, "device": weight.device, "dtype": weight.dtype}
    size = unit_count(layer)
    return nn.LayerNorm(size, **options) if isinstance(layer, nn.Linear) else nn.GroupNorm(1, size, **options)


def _hidden(module: nn.Module, example: Any) -> list[str]:
    """Layers whose activations a later weight reads and no norm touches."""
    with undisturbed(module):
        wiring = find_wiring(module, lambda: module(*example) if isinstance(example, tuple) else module(example))
    return [name for name, layer in wiring.layers.items() if not layer.norms]


def _in_sequentials(module: nn.Module) -> list[tuple[str, bool]]:
    """Weights that an activation follows in a Sequential, and whether a norm lies between."""
    found = []
    for name, parent in module.named_modules():
        if not isinstance(parent, nn.Sequential):
            continue
        last, norm = "", False
        for key, child in parent.named_children():
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)):
                last, norm = f"{name}.{key}".lstrip("."), False
            elif isinstance(child, NORMS):
                norm = True
            elif is_activation(child):
                if last:
                    found.append((last, norm))
                last = ""
            elif not isinstance(child, _SHAPES):
                last = ""
    return found


def is_activation(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's activation functions, or ``CReLU``."""
    own = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)
    return own or type(module).__name__ == "CReLU"
