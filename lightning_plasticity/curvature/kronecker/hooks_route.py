"""Kronecker factors of linear layers and convolutions in any network, by forward hooks and autograd.

A is the mean over samples and positions of abar abar^T, abar the layer's input (the unfolded patch) with a 1 appended
for the bias. B = sum_r sum_n g_rn g_rn^T with g_rn the gradient at the layer's output, summed over positions, of column
r of an exact square root of the loss's Hessian in the outputs: the KFLR form of Botev et al. 2017 (arXiv 1706.03662).
These are BackPACK's factors, except that BackPACK sums A over positions. With A averaged the bias's block is exact, and
so is that of any layer whose positions all see the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.backward import pulled_back
from lightning_plasticity.curvature.gram.matrix import CHECK_TOLERANCE
from lightning_plasticity.curvature.kronecker.layers import ChosenLayer, FactorSums, usable_calls
from lightning_plasticity.curvature.layers import LayerCall, LayerTaps, patches_of
from lightning_plasticity.curvature.measured import Measured, require_outputs
from lightning_plasticity.linalg.progress import Count

PATCH_CHUNK = 4 * 2**20  # float64 entries of patches held at once


def hook_factors(measured: Measured, layers: Sequence[ChosenLayer]) -> FactorSums:
    """Factors of all layers that ran once on whole batches, each checked against autograd."""
    sums, count = FactorSums(), Count("backward passes")
    for index, batch in enumerate(measured.batches):
        with measured.open() as closure, LayerTaps(measured.module) as taps:
            loss = require_outputs(closure(batch, index))
            calls, skipped = usable_calls(taps, layers, loss.num_samples)
            used = [layer for layer in layers if layer.name in calls]
            columns = loss.hessian_root().columns().to(loss.outputs.dtype)  # (R, N, ...)
            skipped |= _check(loss.outputs, columns, used, calls)
            used = [layer for layer in used if layer.name not in skipped]
            count.total = count.done + len(columns) * (len(measured.batches) - index)
            outputs = _output_factors(loss.outputs, columns, used, calls, count)
            sums.begin(loss)
            for layer in used:
                call = calls[layer.name]
                inputs = input_factor(layer, call.input)
                sums.add(layer.name, inputs, outputs[layer.name], num_positions(layer, call.output))
            sums.skipped |= skipped
            sums.dtype = loss.outputs.dtype
    return sums


def input_factor(layer: ChosenLayer, x: Tensor) -> Tensor:
    """A, (G, D, D) float64, of a layer's input (N, ...), a few samples at a time."""
    if not layer.weight:
        return torch.ones(layer.groups, 1, 1, dtype=torch.float64, device=x.device)
    patches = patches_of(layer.module)
    assert patches is not None
    num_entries = patches(layer.module, x[:1]).numel()
    chunk = max(1, PATCH_CHUNK // max(1, num_entries))
    total, count = torch.zeros((), dtype=torch.float64, device=x.device), 0
    for start in range(0, len(x), chunk):
        rows = patches(layer.module, x[start : start + chunk]).double()  # (G, n, D, T)
        if layer.bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1, rows.shape[3])], dim=2)
        flat = rows.transpose(2, 3).flatten(1, 2)  # (G, n T, D)
        total = total + flat.transpose(1, 2) @ flat
        count += flat.shape[1]
    return total / max(1, count)


def num_positions(layer: ChosenLayer, output: Tensor) -> int:
    """T, positions per sample at the layer's output."""
    return output[0].numel() // int(_num_outputs(layer.module))


def _num_outputs(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def _summed_positions(layer: ChosenLayer, gradient: Tensor) -> Tensor:
    """(G, N, O) float64 from a gradient at the layer's output."""
    size = _num_outputs(layer.module)
    if isinstance(layer.module, nn.Linear):
        summed = gradient.double().reshape(len(gradient), -1, size).sum(1)
    else:
        summed = gradient.double().reshape(len(gradient), size, -1).sum(2)
    return summed.reshape(len(gradient), layer.groups, -1).transpose(0, 1)


def _output_factors(
    outputs: Tensor, columns: Tensor, layers: Sequence[ChosenLayer], calls: Mapping[str, LayerCall], count: Count
) -> dict[str, Tensor]:
    """B, (G, O, O) float64, of each layer; one backward pass for each column."""
    found = {}
    for layer in layers:
        size = _num_outputs(layer.module) // layer.groups
        found[layer.name] = torch.zeros(layer.groups, size, size, dtype=torch.float64, device=outputs.device)
    for column in columns:
        for layer, gradient in zip(layers, _gradients(outputs, column, layers, calls), strict=True):
            g = _summed_positions(layer, gradient)
            found[layer.name] += g.transpose(1, 2) @ g
        count.add()
    return found


def _gradients(
    outputs: Tensor, direction: Tensor, layers: Sequence[ChosenLayer], calls: Mapping[str, LayerCall]
) -> list[Tensor]:
    """Gradients at the layers' outputs; zeros where the outputs do not depend on one."""
    return pulled_back(outputs, [calls[layer.name].output for layer in layers], direction)


def _check(
    outputs: Tensor, columns: Tensor, layers: Sequence[ChosenLayer], calls: Mapping[str, LayerCall]
) -> dict[str, str]:
    """Reasons not to trust a layer: samples mix, or its parameters do something else too.

    A random sign for each sample, put on the outputs, must come out as the same sign on each sample's gradient at the
    layer; and the layer, run on its own from that gradient, must give the parameters the gradient that they have.
    """
    if not len(columns) or not layers:
        return {}
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(len(columns), generator=generator, dtype=torch.float64).to(columns)
    signs = torch.randint(0, 2, (columns.shape[1],), generator=generator).to(columns) * 2 - 1
    direction = torch.einsum("r,rn...->n...", mix, columns)
    plain = _gradients(outputs, direction, layers, calls)
    signed_direction = _scaled(direction, signs)
    signed = _gradients(outputs, signed_direction, layers, calls)
    reasons = {}
    for layer, before, after in zip(layers, plain, signed, strict=True):
        if not _agree(_scaled(before, signs), after):
            reasons[layer.name] = "samples mix on the way from it to the outputs (BatchNorm in training mode, say)."
        elif not _agree(*_parameter_gradients(layer, calls[layer.name], outputs, signed_direction, after)):
            reasons[layer.name] = "its parameters are used in another way too, or its output is changed in place."
    return reasons


def _parameter_gradients(
    layer: ChosenLayer, call: LayerCall, outputs: Tensor, direction: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The parameters' gradient from the layer alone, and from the whole network; both flat."""
    parameters = layer.tensors()
    again = type(layer.module).forward(layer.module, call.input)
    alone = torch.autograd.grad(
        again, parameters, gradient, retain_graph=True
    )  # a pruned weight is part of both graphs
    true = pulled_back(outputs, parameters, direction)
    return torch.cat([g.flatten() for g in alone]), torch.cat([g.flatten() for g in true])


def _scaled(tensor: Tensor, signs: Tensor) -> Tensor:
    return tensor * signs.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))


def _agree(value: Tensor, truth: Tensor) -> bool:
    tolerance = CHECK_TOLERANCE.get(value.dtype, 1e-2)
    return bool((value - truth).norm() <= tolerance * truth.norm() + torch.finfo(value.dtype).tiny)
