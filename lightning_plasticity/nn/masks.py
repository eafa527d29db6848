"""Weights under a mask: how a mask is held, and where a module has masked weights."""

from __future__ import annotations

import copy
import re

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


class Mask(nn.Module):
    """Parametrization that multiplies a weight by a mask; register it with ``torch.nn.utils.parametrize``.

    The weight's parameter is then ``parametrizations.weight.original``, its mask a buffer beside it, and the gradient
    of masked entries is zero.

    Args:
        mask: bool, of the weight's shape; True where an entry is active.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where masked, whatever is kept there."""
        return weight.masked_fill(~self.mask, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is kept of a weight that is assigned."""
        return weight.masked_fill(~self.mask, 0.0)


def find_masks(module: nn.Module) -> dict[str, Tensor]:
    """Active entries of all masked parameters: bool tensors by the parameter's name in ``named_parameters``.

    Knows ``Mask`` and ``torch.nn.utils.prune``. Parameters without a mask are left out, and so are those with a further
    parametrization, whose entries are not the weight's entries.
    """
    masks: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(child):
            for name, chain in child.parametrizations.items():
                if len(chain) == 1 and isinstance(chain[0], Mask):
                    masks[f"{dot}parametrizations.{name}.original"] = chain[0].mask
        buffers = dict(child.named_buffers(recurse=False))
        for name, _ in child.named_parameters(recurse=False):
            mask = buffers.get(f"{name.removesuffix('_orig')}_mask")
            if name.endswith("_orig") and mask is not None:
                masks[f"{dot}{name}"] = mask.bool()
    return masks


def parameter_of(module: nn.Module, role: str) -> tuple[nn.Parameter | None, Tensor | None]:
    """The parameter that a layer's ``weight`` or ``bias`` (the role) comes from, and its mask.

    Returns:
        The parameter and its bool mask; no mask where there is none, and no parameter where the layer has none or
        makes the tensor in a further way.
    """
    own = module._parameters.get(role)
    if own is not None:
        return own, None
    if parametrize.is_parametrized(module, role):
        chain: nn.ModuleList = module.parametrizations[role]  # type: ignore[index,assignment]
        if len(chain) == 1 and isinstance(chain[0], Mask):
            return chain.original, chain[0].mask  # type: ignore[return-value]
    own, mask = module._parameters.get(f"{role}_orig"), module._buffers.get(f"{role}_mask")
    return (own, mask.bool()) if own is not None and mask is not None else (None, None)


def active_entries(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Active entries by parameter: those that any of its owners uses; parameters that one uses whole are left out."""
    masks = find_masks(module)
    uses: dict[nn.Parameter, list[str]] = {}
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(prefix, recurse=False):
            uses.setdefault(parameter, []).append(name)
    active = {}
    for parameter, names in uses.items():
        if all(name in masks for name in names):
            active[parameter] = masks[names[0]]
            for name in names[1:]:
                active[parameter] = active[parameter] | masks[name]
    return active


def plain_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Names of all parameters, those of masked and parametrized weights as they were before: ``net.0.weight``."""
    masks = find_masks(module)
    names = {}
    for name, parameter in module.named_parameters():
        plain = name.removesuffix("_orig") if name in masks else name
        names[parameter] = re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", plain)
    return names


def copy_with_plain_weights(module: nn.Module) -> nn.Module:
    """A copy whose masked weights are plain parameters, with zeros where the masks were."""
    made = [value for child in module.modules() for value in vars(child).values() if isinstance(value, Tensor)]
    twin = copy.deepcopy(module, {id(value): value.detach().clone() for value in made})  # pruned weights have a graph
    for child in list(twin.modules()):
        for role in ("weight", "bias"):
            parameter, mask = parameter_of(child, role)
            if parameter is None or mask is None:
                continue
            if parametrize.is_parametrized(child, role):
                _unmask(child, role, parameter, mask)
            else:
                prune.remove(child, role)  # type: ignore[no-untyped-call]
    return twin


def _unmask(layer: nn.Module, role: str, parameter: nn.Parameter, mask: Tensor) -> None:
    """By hand: a copy shares its class with the original, which ``parametrize.remove_parametrizations`` changes."""
    chains: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
    if len(chains) > 1:
        return  # the class is needed for the others
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    plain = nn.Parameter(parameter.detach().masked_fill(~mask, 0.0), requires_grad=parameter.requires_grad)
    layer.register_parameter(role, plain)
