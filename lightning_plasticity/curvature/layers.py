"""Calls of layers during a forward pass, and what the weights of each kind of layer multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import unfoldNd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_plasticity.nn.masks import parameter_of


@dataclass
class LayerCall:
    """One call of a layer during the measured forward pass."""

    module: nn.Module
    input: Tensor
    output: Tensor


class LayerTaps:
    """Context that records the calls of all layers that have a shortcut, and passes on clones of their outputs.

    The clone keeps the gradient at the layer's output reachable when the next operation works in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: dict[nn.Module, list[LayerCall]] = {}
        self._modules = [child for child in module.modules() if patches_of(child) is not None]
        self._handles: list[Any] = []

    def __enter__(self) -> LayerTaps:
        self._handles = [child.register_forward_hook(self._hook) for child in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or len(args) != 1 or not isinstance(args[0], Tensor):
            self.calls.setdefault(module, []).append(LayerCall(module, torch.empty(0), torch.empty(0)))
            return None
        self.calls.setdefault(module, []).append(LayerCall(module, args[0].detach(), output))
        return output.clone()


def linear_patches(module: nn.Linear, x: Tensor) -> Tensor:
    """(1, N, d_in, L)."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)[None]


def conv_patches(module: Any, x: Tensor) -> Tensor:
    """(groups, N, c_in / groups * kernel, L)."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    elif isinstance(padding, str):
        x, padding = F.pad(x, module._reversed_padding_repeated_twice), 0
    patches: Tensor = unfoldNd.unfoldNd(
        x, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
    )
    return patches.reshape(x.shape[0], module.groups, -1, patches.shape[-1]).transpose(0, 1)


def norm_patches(module: Any, x: Tensor) -> Tensor:
    """(1, N, features, L): the normalised input, which is what the scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        return normalised.reshape(x.shape[0], -1, module.weight.numel()).transpose(1, 2)[None]
    if isinstance(module, nn.RMSNorm):
        normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
        return normalised.reshape(x.shape[0], -1, module.weight.numel()).transpose(1, 2)[None]
    if isinstance(module, nn.GroupNorm):
        normalised = F.group_norm(x, module.num_groups, eps=module.eps)
    elif isinstance(module, _InstanceNorm) and not _uses_running_statistics(module):
        normalised = F.instance_norm(x, eps=module.eps)
    else:
        normalised = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return normalised.reshape(x.shape[0], x.shape[1], -1)[None]


def lookup_patches(module: nn.Embedding, x: Tensor) -> Tensor:
    """(1, N, 1, L): which row of the table each position takes."""
    return x.reshape(x.shape[0], 1, -1)[None]


def patches_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """The patch function of a layer that has a shortcut and parameters of its own, else None.

    Masked linear layers and convolutions have one, masked norms and embeddings have none.
    """
    weight, mask = parameter_of(module, "weight")
    if weight is None or (mask is not None and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)):
        return None
    if isinstance(module, nn.Linear):
        return linear_patches
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return conv_patches
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _InstanceNorm):
        return norm_patches
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse:
        return lookup_patches
    if isinstance(module, _BatchNorm) and _uses_running_statistics(module):
        return norm_patches
    return None


def _uses_running_statistics(module: Any) -> bool:
    """Whether a norm's statistics are constants in this pass."""
    return module.running_mean is not None and not module.training
