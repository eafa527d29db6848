"""The Gram matrix of per-sample gradient rows, whose eigenvalues are the nonzero ones of the GGN or the NTK.

With S S^T = H_out the nonzero eigenvalues of G = J^T S S^T J are those of K = S^T J J^T S, an (R N) x (R N) matrix; the
other coordinates are exactly zero. K is a sum over parameters: those that layers with a shortcut own add their share
from inputs and output gradients (over all calls of all layers that share them), any other parameter from explicit rows.
Each share is checked against autograd on every measurement; a parameter whose share fails (it is used elsewhere too,
samples mix) goes the general way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.backward import pulled_back
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.factors import (
    Key,
    Share,
    concatenate,
    contract,
    restricted,
    shares_by_parameter,
)
from lightning_plasticity.curvature.gram.rows import add_rows
from lightning_plasticity.curvature.gram.shares import add_share, mirror
from lightning_plasticity.curvature.layers import LayerCall, LayerTaps
from lightning_plasticity.linalg.progress import Count, counted
from lightning_plasticity.nn.masks import parameter_of

VMAP_ROWS = 32  # gradient rows that one vectorised backward pass computes
MAX_ROW_BYTES = 2**31  # explicit gradient rows held at once; more coordinates take more backward passes
MAX_PASSES = 32  # times that the backward passes are repeated for that; beyond, the measurement is refused
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
ROUNDING = 16.0  # a gradient may be off by this many times the rounding of its largest possible sum


@dataclass
class GramRows:
    """What one batch contributes.

    Attributes:
        num_samples: N.
        columns: (R, N, ...) directions in output space.
        shares: factors of the parameters that took a shortcut.
        general: the other parameters, whose explicit rows ``assemble`` computes.
        outputs: (N', ...) outputs with their graph, from which it does; None when there are no others.
        num_backward: backward passes spent.
    """

    num_samples: int
    columns: Tensor
    shares: dict[Key, Share]
    general: list[nn.Parameter]
    outputs: Tensor | None
    num_backward: int

    @property
    def num_bytes(self) -> int:
        """Of the factors and the columns."""
        parts = [part for share in self.shares.values() for part in share]
        factors = [tensor for part in parts for tensor in (part.inputs, part.gradients)]
        sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in (*factors, self.columns)}
        return sum(sizes.values())

    def scale(self, factor: float) -> None:
        """Multiply all rows."""
        self.columns = self.columns * factor
        # A weight and a bias without the same calls can hold the same gradients: each tensor is scaled once.
        gradients = {id(part.gradients): part.gradients for share in self.shares.values() for part in share}
        for gradient in gradients.values():
            gradient.mul_(factor)


@dataclass(frozen=True)
class Gram:
    """The (M, M) Gram matrix, M = R N, and how it was made."""

    matrix: Tensor
    num_samples: int
    num_backward: int
    general: list[nn.Parameter] = field(default_factory=list)


def collect_rows(
    outputs: Tensor,
    columns: Tensor,
    taps: LayerTaps,
    parameters: Sequence[nn.Parameter],
    excluded: Collection[nn.Parameter],
    count: Count,
) -> GramRows:
    """Gradient rows of one batch; ``assemble`` them before the module's weights are touched.

    Args:
        outputs: (N', ...) outputs with their graph; N' may exceed N, then only the first N samples have rows.
        columns: (R, N, ...) directions in output space, one row of the Gram matrix for each of the R N.
        taps: the layer calls of the forward pass that made the outputs.
        parameters: the parameters that count.
        excluded: those of them that must not take a shortcut.
        count: of the backward passes.
    """
    trainable: set[Tensor] = {parameter for parameter in parameters if parameter not in excluded}
    # Without columns the loss has no curvature, such as a softmax over one class.
    calls = _usable(taps, trainable, outputs.shape[0]) if len(columns) else []
    gradients = _output_gradients(outputs, columns, calls, count)
    shares = _verified(outputs, columns, shares_by_parameter(calls, gradients, trainable))
    done = {parameter for key in shares for parameter in key}
    rest = [parameter for parameter in parameters if parameter not in done]
    return GramRows(columns.shape[1], columns, shares, rest, outputs if rest else None, num_backward=len(columns) + 1)


def assemble(
    batches: Sequence[GramRows],
    only: Collection[nn.Parameter] | None = None,
    dtype: torch.dtype = torch.float64,
    row_bytes: int | None = None,
) -> Gram:
    """Sum the shares of all parameters over batches that took the same routes (no ``disagreements``).

    Args:
        batches: rows of all batches.
        only: the parameters to sum over, for a diagonal block of the curvature matrix; None for all.
        dtype: of the sum.
        row_bytes: what explicit gradient rows may take at a time, ``MAX_ROW_BYTES`` for None; less takes more backward
            passes.

    Raises:
        MeasurementError: when the parameters without a shortcut have too many explicit rows.
    """
    num_samples = sum(batch.num_samples for batch in batches)
    num_columns = max(len(batch.columns) for batch in batches)  # sequences of several lengths differ in R
    shape = (num_columns, num_samples, num_columns, num_samples)
    gram = torch.zeros(shape, dtype=dtype, device=batches[0].columns.device)
    for key in counted(batches[0].shares, "layers of the Gram matrix"):
        share = [batch.shares[key] for batch in batches]
        if only is not None:
            share = [restricted(part, set(only)) for part in share]
        if share[0]:
            add_share(gram, concatenate(share))
    general = [parameter for parameter in batches[0].general if only is None or parameter in only]
    size = num_columns * num_samples
    blocks = list(_blocks(general, size, MAX_ROW_BYTES if row_bytes is None else row_bytes))
    count = Count("gradient rows", len(blocks) * size)
    for block in blocks:
        add_rows(gram, _explicit_rows(batches, block, num_columns, count))
    mirror(gram)
    return Gram(gram.view(size, size), num_samples, sum(batch.num_backward for batch in batches), general)


def disagreements(batches: Sequence[GramRows]) -> set[nn.Parameter]:
    """Parameters that took their shortcut in some batches only, or not in the same way."""
    taken = [{(key, tuple(part.kind for part in share)) for key, share in batch.shares.items()} for batch in batches]
    torn = {route for routes in taken for route in routes if any(route not in others for others in taken)}
    return {parameter for key, _ in torn for parameter in key}


def _usable(taps: LayerTaps, trainable: set[Tensor], batch_size: int) -> list[LayerCall]:
    """Calls on the whole batch of layers that own a parameter which counts."""
    usable = []
    for module, calls in taps.calls.items():
        if any(parameter_of(module, role)[0] in trainable for role in ("weight", "bias")):
            usable += [call for call in calls if _is_whole(call, batch_size)]
    return usable


def _is_whole(call: LayerCall, batch_size: int) -> bool:
    """Whether a call has the samples first; its share is verified all the same."""
    whole = call.output.ndim >= 2 and call.output.shape[0] == call.input.shape[0] == batch_size
    return whole and call.output.requires_grad


def _output_gradients(outputs: Tensor, columns: Tensor, calls: Sequence[LayerCall], count: Count) -> list[Tensor]:
    """(R, N, ...) gradients at each layer's output for the first N samples, one backward pass for each column."""
    targets = [call.output for call in calls]
    if not targets:
        return []
    found = [target.new_zeros(*columns.shape[:2], *target.shape[1:]) for target in targets]
    for index, column in enumerate(columns):
        gradients = pulled_back(outputs, targets, _padded(column, outputs))
        for slot, gradient in zip(found, gradients, strict=True):
            slot[index] = gradient[: columns.shape[1]]
        count.add()
    return found


def _padded(column: Tensor, outputs: Tensor) -> Tensor:
    """A direction for the first samples, as one for all of them (zeros beyond), in the outputs' dtype."""
    column = column.to(outputs.dtype)
    missing = outputs.shape[0] - column.shape[0]
    return torch.cat([column, column.new_zeros(missing, *column.shape[1:])]) if missing else column


def _verified(outputs: Tensor, columns: Tensor, shares: dict[Key, Share]) -> dict[Key, Share]:
    """Shares whose rows, mixed with random signs over samples, give the gradient that autograd gives."""
    if not shares:
        return {}
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns.shape[:2], generator=generator, dtype=torch.float64).to(outputs.device, outputs.dtype)
    shape = (*mix.shape, *[1] * (columns.ndim - 2))
    direction = (columns.to(outputs.dtype) * mix.reshape(shape)).sum(0)
    parameters = [parameter for key in shares for parameter in key]
    expected = pulled_back(outputs, parameters, _padded(direction, outputs))
    truth = dict(zip(parameters, expected, strict=True))
    return {key: share for key, share in shares.items() if _agrees(share, mix, [truth[p] for p in key])}


def _agrees(share: Share, mix: Tensor, truth: Sequence[Tensor]) -> bool:
    """Whether the factors give the true gradients up to rounding of their terms (a bias before a norm sums to zero)."""
    found = contract(share, mix)
    eps = torch.finfo(found[0].dtype).eps
    tolerance = CHECK_TOLERANCE.get(found[0].dtype, 1e-3)
    errors = [float((value - true).norm()) for value, true in zip(found, truth, strict=True)]
    if all(error <= tolerance * float(true.norm()) for error, true in zip(errors, truth, strict=True)):
        return True
    terms = contract(tuple(part.absolute() for part in share), mix.abs())
    slack = [ROUNDING * eps * float(value.norm()) + torch.finfo(value.dtype).tiny for value in terms]
    return all(
        error <= tolerance * float(true.norm()) + extra for error, true, extra in zip(errors, truth, slack, strict=True)
    )


@dataclass(frozen=True)
class _Slice:
    """Some coordinates of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    stop: int


def _blocks(parameters: Sequence[nn.Parameter], num_rows: int, row_bytes: int) -> Iterator[list[_Slice]]:
    """The coordinates of all parameters, cut so that the explicit rows of a block take ``row_bytes``."""
    if not parameters or not num_rows:
        return
    itemsize = max(parameter.dtype.itemsize for parameter in parameters)
    total = sum(parameter.numel() for parameter in parameters)
    room = max(1, row_bytes // (num_rows * itemsize))
    if math.ceil(total / room) > MAX_PASSES:
        raise MeasurementError(
            f"{num_rows} explicit gradient rows of {total} parameters without a shortcut take "
            f"{num_rows * total * itemsize / 2**30:.3g} GiB; "
            f"the limit is {MAX_PASSES * row_bytes / 2**30:.3g} GiB, in turns. "
            "Lower max_rows or probe_samples, choose params=..., or measure the Hessian only: "
            "quantities=('hessian',)."
        )
    block: list[_Slice] = []
    left = room
    for parameter in parameters:
        start = 0
        while start < parameter.numel():
            stop = min(start + left, parameter.numel())
            block.append(_Slice(parameter, start, stop))
            left -= stop - start
            start = stop
            if not left:
                yield block
                block, left = [], room
    if block:
        yield block


def _explicit_rows(batches: Sequence[GramRows], block: Sequence[_Slice], num_columns: int, count: Count) -> Tensor:
    """(R, N, p) gradient rows of a block of coordinates, by vectorised backward passes; zeros for missing columns."""
    parameters = [part.parameter for part in block]
    num_samples = sum(batch.num_samples for batch in batches)
    width = sum(part.stop - part.start for part in block)
    dtype = max((parameter.dtype for parameter in parameters), key=lambda dtype: torch.finfo(dtype).bits)
    rows = torch.zeros(num_columns, num_samples, width, dtype=dtype, device=parameters[0].device)
    offset = 0
    for batch in batches:
        assert batch.outputs is not None
        for start in range(0, len(batch.columns) * batch.num_samples, VMAP_ROWS):
            indices = range(start, min(start + VMAP_ROWS, len(batch.columns) * batch.num_samples))
            directions = _one_sample_each(batch.columns, indices, batch.outputs)
            found = _batched_grad(batch.outputs, parameters, directions)
            flat = torch.cat([row[:, part.start : part.stop] for row, part in zip(found, block, strict=True)], dim=1)
            place = torch.tensor(indices, device=rows.device)
            rows[place // batch.num_samples, offset + place % batch.num_samples] = flat.to(dtype)
            count.add(len(indices))
        offset += batch.num_samples
    return rows


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
