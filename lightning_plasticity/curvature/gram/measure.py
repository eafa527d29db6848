"""Measure the GGN's or the NTK's spectrum of anything that a ``LossClosure`` can evaluate, undisturbed.

Exact through the Gram matrix of gradient rows, here; estimates are in ``estimate``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.matrix import Gram, GramRows, assemble, collect_rows, disagreements
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.loss.closure import LossClosure
from lightning_plasticity.curvature.loss.output_loss import OutputLoss, batch_shares
from lightning_plasticity.curvature.loss.output_root import DiagonalRoot, OutputRoot
from lightning_plasticity.curvature.measured import (
    RESOLUTION,
    Measured,
    about_masks,
    announce_eigenvalues,
    dtype_name,
    finite,
    num_active,
    require_outputs,
)
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg.progress import Count
from lightning_plasticity.nn.masks import plain_names

MAX_ROWS = 1500  # rows of the Gram matrix that a default measurement allows: half a second to decompose

Matrix = Literal["ggn", "ntk"]


def measure_gram(
    measured: Measured, matrix: Matrix, *, max_rows: int | None = None, row_bytes: int | None = None
) -> Spectrum:
    """The exact spectrum, of the first samples whose rows fit ``max_rows``; arguments as in ``ggn_spectrum``."""
    started = time.perf_counter()
    parameters = measured.parameters()
    with collected_rows(measured, matrix, parameters, max_rows=max_rows) as rows:
        gram = assemble(rows.batches, row_bytes=row_bytes)
    return exact_spectrum(measured, matrix, rows, gram, parameters, started)


@dataclass(frozen=True)
class Rows:
    """Gradient rows of the samples in use, batch by batch, and the dtype they were computed in.

    Attributes:
        batches: the rows.
        losses: the loss on each batch's samples in use, without its graph.
        dtype: of the outputs or the parameters, whichever is less precise.
        note: what the loss leaves out.
    """

    batches: list[GramRows]
    losses: list[OutputLoss]
    dtype: torch.dtype
    note: str


@contextmanager
def collected_rows(
    measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter], *, max_rows: int | None = None
) -> Iterator[Rows]:
    """Rows that took the same routes in all batches, while their graphs and the measured weights are there."""
    excluded: set[nn.Parameter] = set()
    while True:
        with measured.open() as closure:
            rows = gram_rows(measured, closure, matrix, parameters, max_rows, excluded)
            if not (torn := disagreements(rows.batches)):
                yield rows
                return
        excluded |= torn


def exact_spectrum(
    measured: Measured,
    matrix: Matrix,
    rows: Rows,
    gram: Gram,
    parameters: Sequence[nn.Parameter],
    started: float,
) -> Spectrum:
    """The eigenvalues of a Gram matrix, as those of the curvature matrix of its parameters."""
    finite(gram.matrix.diagonal())  # of a Gram matrix: a row that is not finite shows there
    announce_eigenvalues(len(gram.matrix))
    values = torch.linalg.eigvalsh(gram.matrix) / (gram.num_samples if matrix == "ntk" else 1)
    active = measured.active(parameters)
    num_params = num_active(parameters, active)
    values = values.clamp_min(0.0)[-num_params:]
    top = float(values.max()) if len(values) else 0.0
    dtype = rows.dtype
    settings: dict[str, Any] = {
        "dtype": dtype_name(dtype),
        "mode": measured.mode,
        "rows": len(gram.matrix),
        "route": "eigenvalues of the Gram matrix",
    } | about_masks(active)
    if gram.general:
        settings["general_route"] = parameter_names(measured.module, gram.general)
    if rows.note:
        settings["note"] = rows.note
    return Spectrum.from_eigenvalues(
        values,
        num_params,
        matrix=matrix,
        method="gram",
        num_samples=gram.num_samples,
        num_products=gram.num_backward,
        seconds=time.perf_counter() - started,
        resolution=RESOLUTION.get(dtype, 1e-2) * top,
        settings=settings,
    )


def gram_rows(
    measured: Measured,
    closure: LossClosure,
    matrix: Matrix,
    parameters: Sequence[nn.Parameter],
    max_rows: int | None,
    excluded: Collection[nn.Parameter] = (),
) -> Rows:
    """Rows of the first samples that fit, those of the GGN scaled so that batches add up to the loss on all of them."""
    batches: list[GramRows] = []
    losses: list[OutputLoss] = []
    rows_each = used = 0
    dtype, note = torch.float64, ""
    count = Count("backward passes")
    for index, batch in enumerate(measured.batches):
        with LayerTaps(measured.module) as taps:
            evaluation = closure(batch, index)
        loss, note = require_outputs(evaluation), evaluation.note
        rows_each = max(rows_each, columns_per_sample(loss, matrix))
        take = _affordable_samples(max_rows, rows_each, used, loss.num_samples)
        if take == 0:
            break
        losses.append(loss.first(take).detached())
        columns = output_root(losses[-1], matrix).columns()
        fitting = math.inf if max_rows is None else (max_rows // max(1, rows_each) - used) / loss.num_samples
        count.total = count.done + len(columns) * math.ceil(min(len(measured.batches) - index, fitting))
        batches.append(collect_rows(loss.outputs, columns, taps, parameters, excluded, count))
        used, dtype = used + take, loss.outputs.dtype
        if max_rows is not None and (used + 1) * rows_each > max_rows:
            break
    if matrix == "ggn":
        for rows, share in zip(batches, batch_shares(losses), strict=True):
            rows.scale(share**0.5)
    return Rows(batches, losses, coarsest([dtype, *(parameter.dtype for parameter in parameters)]), note)


def columns_per_sample(loss: OutputLoss, matrix: Matrix) -> int:
    """How many Gram rows one sample costs, at most."""
    size = loss.outputs[0].numel()
    if matrix == "ggn" and loss.name in ("cross_entropy", "nll_loss") and loss.outputs.ndim >= 2:
        return size - size // loss.outputs.shape[1]
    return size


def output_root(loss: OutputLoss, matrix: Matrix) -> OutputRoot:
    """Of the GGN a root of the loss's curvature, of the NTK the identity."""
    if matrix == "ggn":
        return loss.hessian_root()
    ones = torch.ones(loss.outputs.shape, dtype=torch.float64, device=loss.outputs.device)
    return DiagonalRoot(loss.outputs.shape, ones)


def scaled_roots(losses: Sequence[OutputLoss], matrix: Matrix) -> list[OutputRoot]:
    """S of each batch, scaled so that S^T J J^T S is the matrix on all of them."""
    total = sum(loss.num_samples for loss in losses)
    shares = batch_shares(losses) if matrix == "ggn" else [1 / total] * len(losses)
    return [output_root(loss, matrix).scaled(share**0.5) for loss, share in zip(losses, shares, strict=True)]


def coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The least precise of some dtypes."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def parameter_names(module: nn.Module, parameters: Collection[Tensor]) -> list[str]:
    """Names of some of a module's parameters."""
    names = plain_names(module)
    return [names[parameter] for parameter in parameters]  # type: ignore[index]


def _affordable_samples(max_rows: int | None, rows_each: int, used: int, offered: int) -> int:
    """How many of the offered samples fit beside those in use.

    Raises:
        MeasurementError: when not even one does.
    """
    if max_rows is None:
        return offered
    if rows_each > max_rows and not used:
        raise MeasurementError(
            f"One sample has {rows_each} Gram rows (one for each output that counts), more than max_rows={max_rows}. "
            f"Pass max_rows={rows_each} or more, or measure the Hessian only: quantities=('hessian',)."
        )
    return max(0, min(offered, max_rows // max(1, rows_each) - used))
