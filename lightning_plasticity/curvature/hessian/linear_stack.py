"""Recognise a network that, on one batch, is a stack of linear layers with elementwise activations between them.

Only values are compared here, so the answer is a guess: whoever uses it has to prove it by a product with the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature.layers import LayerCall, LayerTaps

Activation = Callable[[Tensor], Tensor]

# Where several fit the values (relu is the identity on positive ones), so do their derivatives, except at exactly 0.
ACTIVATIONS: tuple[Activation, ...] = (
    F.relu,
    lambda z: z,
    torch.tanh,
    F.gelu,
    partial(F.gelu, approximate="tanh"),
    F.silu,
    torch.sigmoid,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.softplus,
    F.mish,
)
ULPS = 4  # by how many units in the last place one activation, written in two ways, may differ


@dataclass(frozen=True)
class StackLayer:
    """One linear layer of the stack, as it ran.

    Attributes:
        weight: (d_out, d_in), detached.
        inputs: (N, d_in).
        outputs: (N, d_out), with their graph.
        parameters: the chosen parameters, weight first; none when the layer only passes derivatives on.
        slope: (N, d_in) first derivative of the activation that made the inputs; None in the first layer.
        bend: (N, d_in) its second derivative; None where it is zero.
    """

    weight: Tensor
    inputs: Tensor
    outputs: Tensor
    parameters: tuple[nn.Parameter, ...]
    slope: Tensor | None = None
    bend: Tensor | None = None

    def live_inputs(self) -> Tensor:
        """Indices of the inputs that have a value or a derivative; the units before the others might be left out."""
        if self.slope is None:
            return torch.arange(self.inputs.shape[1], device=self.inputs.device)
        live = (self.inputs != 0).any(0) | (self.slope != 0).any(0)
        return (live if self.bend is None else live | (self.bend != 0).any(0)).nonzero()[:, 0]


def linear_stack(taps: LayerTaps, parameters: Sequence[nn.Parameter]) -> list[StackLayer] | None:
    """The layers from the first chosen one on, or None when the calls on record do not look like a stack.

    Args:
        taps: the layer calls of one evaluation of the loss.
        parameters: the parameters that count; all of them have to be weights and biases of the stack.
    """
    calls = _chain(taps)
    chosen = set(parameters)
    owned = [_chosen_of(call.module, chosen) for call in calls]
    covered = [parameter for own in owned if own is not None for parameter in own]
    if not chosen or None in owned or len(covered) != len(chosen) or set(covered) != chosen:
        return None
    first = next(index for index, own in enumerate(owned) if own)
    layers: list[StackLayer] = []
    for call, own in zip(calls[first:], owned[first:], strict=True):
        derivatives: tuple[Tensor | None, Tensor | None] | None = (None, None)
        if layers:
            derivatives = _activation_derivatives(layers[-1].outputs.detach(), call.input)
        if derivatives is None:
            return None
        module: Any = call.module
        layers.append(StackLayer(module.weight.detach(), call.input, call.output, own or (), *derivatives))
    return layers if _uniform(layers) else None


def shapes(taps: LayerTaps, parameters: Sequence[nn.Parameter]) -> list[tuple[int, int, int]]:
    """(N, d_in with the bias, d_out) of the linear calls from the first chosen one on; values are not looked at."""
    chosen: set[Tensor] = set(parameters)
    found: list[tuple[int, int, int]] = []
    for call in _chain(taps):
        if found or call.module.weight in chosen:
            found.append((len(call.input), call.input.shape[1] + (call.module.bias is not None), call.output.shape[1]))
    return found


def _chain(taps: LayerTaps) -> list[LayerCall]:
    """The calls of all linear layers in the order of their first; none if one ran twice or not on (N, d) inputs."""
    calls = [found for module, found in taps.calls.items() if isinstance(module, nn.Linear)]
    if any(len(found) != 1 or found[0].input.ndim != 2 or found[0].output.ndim != 2 for found in calls):
        return []
    return [found[0] for found in calls]


def _chosen_of(module: nn.Module, chosen: set[nn.Parameter]) -> tuple[nn.Parameter, ...] | None:
    """All parameters of a linear layer or none of them; None where some are chosen, which is not handled."""
    own = [module._parameters[name] for name in ("weight", "bias") if module._parameters.get(name) is not None]
    wanted = tuple(parameter for parameter in own if parameter is not None and parameter in chosen)
    return wanted if len(wanted) in (0, len(own)) else None


def _uniform(layers: Sequence[StackLayer]) -> bool:
    """Whether everything is of one dtype that has a float64 basis, and finite."""
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.inputs, layer.outputs)]
    dtype = tensors[0].dtype
    usual = dtype in (torch.float32, torch.float64)
    return usual and all(tensor.dtype == dtype and bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _activation_derivatives(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """First and second derivatives (N, d) of the activation that maps ``before`` to ``after``; None if none does."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return None
    for activation in ACTIVATIONS:
        if _same_values(activation(before), after):
            with torch.enable_grad():
                z = before.clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(activation(z).sum(), z, create_graph=True)
                bend = None
                if slope.requires_grad:
                    (bend,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
            return slope.detach(), bend if bend is not None and bool(bend.any()) else None
    return None


def _same_values(left: Tensor, right: Tensor) -> bool:
    if torch.equal(left, right):
        return True
    slack = ULPS * torch.finfo(right.dtype).eps
    # Relative to the largest too: the tail of a gelu is a difference of numbers of that size.
    return torch.allclose(left, right, rtol=slack, atol=slack * float(right.abs().max()) if right.numel() else 0.0)
