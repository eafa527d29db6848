"""The exact nonzero spectrum of the GGN and the NTK, through the Gram matrix of per-sample gradient rows.

With S S^T = H_out the nonzero eigenvalues of G = J^T S S^T J are those of K = S^T J J^T S, an (R N) x (R N) matrix; the
other coordinates are exactly zero. K is a sum over parameters: layers that have a shortcut add their share from inputs
and output gradients, any other parameter from explicit rows. Each shortcut is checked against autograd on every
measurement; a layer that fails (weights used elsewhere too, samples that mix) goes the general way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.layers import (
    Factors,
    LayerCall,
    LayerTaps,
    add_gram,
    add_rows,
    concatenate,
    concatenate_rows,
    contract,
    factors,
)

VMAP_ROWS = 32  # gradient rows that one vectorised backward pass computes
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass
class GramRows:
    """What one batch contributes: layer factors, and explicit rows of the parameters without a shortcut."""

    num_samples: int
    layers: dict[nn.Module, Factors]
    general: dict[nn.Parameter, Tensor]
    num_backward: int


@dataclass(frozen=True)
class Gram:
    """The (M, M) float64 Gram matrix, M = R N, and how it was made."""

    matrix: Tensor
    num_samples: int
    num_backward: int
    general: list[nn.Parameter] = field(default_factory=list)


def collect_rows(
    outputs: Tensor,
    columns: Tensor,
    taps: LayerTaps,
    parameters: Sequence[nn.Parameter],
    excluded: Collection[nn.Module] = (),
) -> GramRows:
    """Gradient rows of one batch.

    Args:
        outputs: (N', ...) outputs with their graph; N' may exceed N, then only the first N samples have rows.
        columns: (R, N, ...) directions in output space, one row of the Gram matrix for each of the R N.
        taps: the layer calls of the forward pass that made the outputs.
        parameters: the parameters that count.
        excluded: layers that must not take their shortcut.
    """
    num_samples = columns.shape[1]
    trainable: set[Tensor] = set(parameters)
    calls = [call for call in _usable(taps, trainable, outputs.shape[0]) if call.module not in excluded]
    if not len(columns):  # a loss without curvature, such as a softmax over one class
        calls = []
    gradients = _output_gradients(outputs, columns, calls)
    layers = {
        call.module: factors(call, gradient, num_samples, trainable)
        for call, gradient in zip(calls, gradients, strict=True)
    }
    covered = _verified(outputs, columns, layers)
    layers = {module: layer for module, layer in layers.items() if module in covered}
    done = {p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None}
    rest = [parameter for parameter in parameters if parameter not in done]
    general = _general_rows(outputs, columns, rest)
    return GramRows(num_samples, layers, general, num_backward=len(columns) + 1)


def assemble(batches: Sequence[GramRows]) -> Gram:
    """Sum the shares of all parameters over batches that took the same routes (no ``disagreements``)."""
    fast, general = list(batches[0].layers), list(batches[0].general)
    num_samples = sum(batch.num_samples for batch in batches)
    num_columns = _num_columns(batches)
    some = next(iter(_tensors(batches)), None)
    device = some.device if some is not None else torch.device("cpu")
    gram = torch.zeros(num_columns, num_samples, num_columns, num_samples, dtype=torch.float64, device=device)
    for module in fast:
        add_gram(gram, concatenate([batch.layers[module] for batch in batches]))
    for parameter in general:
        add_rows(gram, concatenate_rows([batch.general[parameter] for batch in batches]))
    size = num_columns * num_samples
    return Gram(gram.view(size, size), num_samples, sum(batch.num_backward for batch in batches), general)


def disagreements(batches: Sequence[GramRows]) -> set[nn.Module]:
    """Layers that took their shortcut in some batches only."""
    taken = [set(batch.layers) for batch in batches]
    every, common = set(taken[0]), set(taken[0])
    for layers in taken:
        every, common = every | layers, common & layers
    return every - common


def _tensors(batches: Sequence[GramRows]) -> list[Tensor]:
    return [layer.gradients for layer in batches[0].layers.values()] + list(batches[0].general.values())


def _num_columns(batches: Sequence[GramRows]) -> int:
    """R, of the batch that has most (sequences of several lengths)."""
    counts = [0]
    for batch in batches:
        counts += [layer.gradients.shape[1] for layer in batch.layers.values()]
        counts += [len(rows) for rows in batch.general.values()]
    return max(counts)


def _usable(taps: LayerTaps, trainable: set[Tensor], batch_size: int) -> list[LayerCall]:
    """Calls of layers that ran once on the whole batch, and whose parameters no other layer owns."""
    owners: dict[Tensor, int] = {}
    for module in taps.calls:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    usable = []
    for module, calls in taps.calls.items():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        first = calls[0]
        shared = any(owners[parameter] > 1 for parameter in own)
        wanted = any(parameter in trainable for parameter in own)
        whole = first.output.ndim >= 2 and first.output.shape[0] == first.input.shape[0] == batch_size
        if len(calls) == 1 and not shared and wanted and whole and first.output.requires_grad:
            usable.append(first)
    return usable


def _output_gradients(outputs: Tensor, columns: Tensor, calls: Sequence[LayerCall]) -> list[Tensor]:
    """(R, N', ...) gradients at each layer's output, one backward pass for each column."""
    targets = [call.output for call in calls]
    if not targets:
        return []
    found: list[list[Tensor]] = [[] for _ in targets]
    for column in columns:
        gradients = torch.autograd.grad(
            outputs, targets, _padded(column, outputs), retain_graph=True, allow_unused=True
        )
        for slot, gradient, target in zip(found, gradients, targets, strict=True):
            slot.append(torch.zeros_like(target) if gradient is None else gradient)
    return [torch.stack(slot) for slot in found]


def _padded(column: Tensor, outputs: Tensor) -> Tensor:
    """A direction for the first samples, as one for all of them (zeros beyond), in the outputs' dtype."""
    column = column.to(outputs.dtype)
    missing = outputs.shape[0] - column.shape[0]
    return torch.cat([column, column.new_zeros(missing, *column.shape[1:])]) if missing else column


def _verified(outputs: Tensor, columns: Tensor, layers: dict[nn.Module, Factors]) -> set[nn.Module]:
    """Layers whose rows, mixed with random signs over samples, give the gradient that autograd gives."""
    if not layers:
        return set()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns.shape[:2], generator=generator, dtype=torch.float64).to(outputs.device, outputs.dtype)
    shape = (*mix.shape, *[1] * (columns.ndim - 2))
    direction = (columns.to(outputs.dtype) * mix.reshape(shape)).sum(0)
    pairs = [(module, contract(layer, mix)) for module, layer in layers.items()]
    parameters = [parameter for _, found in pairs for parameter, _ in found]
    expected = torch.autograd.grad(
        outputs, parameters, _padded(direction, outputs), retain_graph=True, allow_unused=True
    )
    truth = dict(zip(parameters, expected, strict=True))
    good = set()
    for module, found in pairs:
        if all(_agrees(value, truth[parameter]) for parameter, value in found):
            good.add(module)
    return good


def _agrees(value: Tensor, truth: Tensor | None) -> bool:
    tolerance = CHECK_TOLERANCE.get(value.dtype, 1e-3)
    truth = torch.zeros_like(value) if truth is None else truth
    return bool((value - truth).norm() <= tolerance * truth.norm() + torch.finfo(value.dtype).tiny)


def _general_rows(outputs: Tensor, columns: Tensor, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """(R, N, p) explicit gradient rows of each parameter, by vectorised backward passes."""
    if not parameters:
        return {}
    num_columns, num_samples = columns.shape[:2]
    chunks: dict[nn.Parameter, list[Tensor]] = {parameter: [] for parameter in parameters}
    for start in range(0, num_columns * num_samples, VMAP_ROWS):
        directions = _one_sample_each(columns, range(start, min(start + VMAP_ROWS, num_columns * num_samples)), outputs)
        for parameter, rows in zip(parameters, _batched_grad(outputs, parameters, directions), strict=True):
            chunks[parameter].append(rows)
    return {
        parameter: torch.cat(rows).reshape(num_columns, num_samples, -1)
        if rows
        else outputs.new_zeros(num_columns, num_samples, parameter.numel())
        for parameter, rows in chunks.items()
    }


def _one_sample_each(columns: Tensor, indices: range, outputs: Tensor) -> Tensor:
    """(B, N', ...) directions; each is one column at one sample and zero elsewhere."""
    num_samples = columns.shape[1]
    directions = outputs.new_zeros(len(indices), *outputs.shape)
    for row, index in enumerate(indices):
        directions[row, index % num_samples] = columns[index // num_samples, index % num_samples].to(outputs.dtype)
    return directions


def _batched_grad(outputs: Tensor, parameters: Sequence[nn.Parameter], directions: Tensor) -> list[Tensor]:
    """(B, p) rows for each parameter; one by one where an operation cannot be vectorised."""
    try:
        found = torch.autograd.grad(
            outputs, parameters, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:
        single = [
            torch.autograd.grad(outputs, parameters, direction, retain_graph=True, allow_unused=True)
            for direction in directions
        ]
        stacked = [None if rows[0] is None else torch.stack(rows) for rows in zip(*single, strict=True)]
        found = tuple(stacked)  # type: ignore[arg-type]  # a parameter that the outputs do not use has no gradient
    return [
        directions.new_zeros(len(directions), parameter.numel()) if rows is None else rows.reshape(len(directions), -1)
        for parameter, rows in zip(parameters, found, strict=True)
    ]
