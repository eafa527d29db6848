"""Networks with masked weights, held in both ways, and their curvature on the active coordinates by brute force."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_plasticity.nn.masks import Mask, find_masks

Hold = Callable[[nn.Module, Tensor], object]


def as_parametrization(layer: nn.Module, mask: Tensor, role: str = "weight") -> None:
    parametrize.register_parametrization(layer, role, Mask(mask))


def as_pruning(layer: nn.Module, mask: Tensor, role: str = "weight") -> None:
    prune.custom_from_mask(layer, role, mask)


HOLDS: Mapping[str, Hold] = {"parametrize": as_parametrization, "prune": as_pruning}


def mask_weights(net: nn.Module, density: float, hold: Hold = as_parametrization, seed: int = 0) -> nn.Module:
    """Random masks on the weights of all linear layers and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    for layer in list(net.modules()):
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            hold(layer, torch.rand(layer.weight.shape, generator=generator) < density)
    return net


def fill_masked(net: nn.Module) -> None:
    """Values under the masks, which must not matter."""
    masks = find_masks(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in masks:
                parameter[~masks[name]] = 7.0


def plain_twin(net: nn.Module, twin: nn.Module) -> nn.Module:
    """A network without masks at the same effective weights."""
    layers = dict(net.named_modules())
    with torch.no_grad():
        for name, layer in twin.named_modules():
            for role in layer._parameters:
                if layer._parameters[role] is not None:
                    layer._parameters[role].copy_(getattr(layers[name], role))
    return twin


def active_of(net: nn.Module, twin: nn.Module) -> Tensor:
    """(P,) bool in the order of the twin's parameters, by what masks the layers' weights hold."""
    layers, parts = dict(net.named_modules()), []
    for name, parameter in twin.named_parameters():
        owner, _, role = name.rpartition(".")
        layer = layers[owner]
        if parametrize.is_parametrized(layer, role):
            parts.append(layer.parametrizations[role][0].mask.flatten())
        elif hasattr(layer, f"{role}_mask"):
            parts.append(getattr(layer, f"{role}_mask").bool().flatten())
        else:
            parts.append(torch.ones(parameter.numel(), dtype=torch.bool))
    return torch.cat(parts)
