"""Measure the GGN's or the NTK's exact spectrum of anything that a ``LossClosure`` can evaluate, undisturbed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.closure import LossClosure
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram import Gram, GramRows, assemble, collect_rows, disagreements
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.measured import RESOLUTION, Measured, dtype_name, finite, require_outputs
from lightning_plasticity.curvature.output_loss import OutputLoss, batch_shares
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.nn.batches import clone_batch

MAX_ROWS = 1500  # rows of the Gram matrix that a default measurement allows: half a second to decompose


def measure_gram(measured: Measured, matrix: Literal["ggn", "ntk"], *, max_rows: int | None = None) -> Spectrum:
    """The GGN's or the NTK's exact spectrum; arguments as in ``ggn_spectrum``."""
    started = time.perf_counter()
    parameters = measured.parameters()
    excluded: set[nn.Parameter] = set()
    while True:
        with measured.open() as closure:
            rows = _gram_rows(measured, closure, matrix, parameters, max_rows, excluded)
            if not (torn := disagreements(rows.batches)):
                gram = assemble(rows.batches)
                break
        excluded |= torn
    finite(gram.matrix.diagonal())  # of a Gram matrix: a row that is not finite shows there
    values = torch.linalg.eigvalsh(gram.matrix) / (gram.num_samples if matrix == "ntk" else 1)
    num_params = sum(parameter.numel() for parameter in parameters)
    values = values.clamp_min(0.0)[-num_params:]
    top = float(values.max()) if len(values) else 0.0
    dtype = max((rows.dtype, *(parameter.dtype for parameter in parameters)), key=lambda dtype: torch.finfo(dtype).eps)
    return Spectrum.from_eigenvalues(
        values,
        num_params,
        matrix=matrix,
        method="gram",
        num_samples=gram.num_samples,
        num_products=gram.num_backward,
        seconds=time.perf_counter() - started,
        resolution=RESOLUTION.get(dtype, 1e-2) * top,
        settings=_gram_settings(gram, measured, dtype, rows.note),
    )


@dataclass(frozen=True)
class _Rows:
    batches: list[GramRows]
    dtype: torch.dtype
    note: str


def _gram_rows(
    measured: Measured,
    closure: LossClosure,
    matrix: Literal["ggn", "ntk"],
    parameters: Sequence[nn.Parameter],
    max_rows: int | None,
    excluded: set[nn.Parameter],
) -> _Rows:
    """Rows of the first samples that fit, those of the GGN scaled so that batches add up to the loss on all of them."""
    batches: list[GramRows] = []
    losses: list[OutputLoss] = []
    rows_each = used = 0
    dtype, note = torch.float64, ""
    for index, batch in enumerate(measured.batches):
        with LayerTaps(measured.module) as taps:
            evaluation = closure(clone_batch(batch), index)  # a step may change its batch, and this may run twice
        loss, note = require_outputs(evaluation), evaluation.note
        rows_each = max(rows_each, _columns_per_sample(loss, matrix))
        take = _affordable_samples(max_rows, rows_each, used, loss.num_samples)
        if take == 0:
            break
        losses.append(loss.first(take))
        columns = _columns(losses[-1], matrix)
        batches.append(collect_rows(loss.outputs, columns, taps, parameters, excluded))
        used, dtype = used + take, loss.outputs.dtype
        if max_rows is not None and (used + 1) * rows_each > max_rows:
            break
    if matrix == "ggn":
        shares = batch_shares(losses, [batch.num_samples for batch in batches])
        for rows, share in zip(batches, shares, strict=True):
            rows.scale(share**0.5)
    return _Rows(batches, dtype, note)


def _gram_settings(gram: Gram, measured: Measured, dtype: torch.dtype, note: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": dtype_name(dtype), "mode": measured.mode, "rows": len(gram.matrix)}
    if gram.general:
        names = {parameter: name for name, parameter in measured.module.named_parameters()}
        settings["general_route"] = [names[parameter] for parameter in gram.general]
    if note:
        settings["note"] = note
    return settings


def _columns_per_sample(loss: OutputLoss, matrix: str) -> int:
    """How many Gram rows one sample costs, at most."""
    size = loss.outputs[0].numel()
    if matrix == "ggn" and loss.name in ("cross_entropy", "nll_loss") and loss.outputs.ndim >= 2:
        return size - size // loss.outputs.shape[1]
    return size


def _columns(loss: OutputLoss, matrix: str) -> Tensor:
    """(R, N, ...) output directions: of the GGN scaled by the loss's curvature, of the NTK the unit vectors."""
    if matrix == "ggn":
        return loss.hessian_factor()
    size = loss.outputs[0].numel()
    units = torch.eye(size, dtype=torch.float64, device=loss.outputs.device)[:, None, :]
    return units.expand(size, loss.num_samples, size).reshape(size, *loss.outputs.shape).clone()


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
