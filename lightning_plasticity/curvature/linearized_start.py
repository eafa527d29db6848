"""Where gradient descent on a linearised network starts: the residual, and the directions in output space it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.measured import Measured, finite, require_outputs
from lightning_plasticity.curvature.output_loss import OutputLoss, batch_shares

Kernel = Literal["ntk", "ggn"]
KERNELS = ("ntk", "ggn")
# How much of the gradient may lie outside of the range of S, relative: rounding, by the dtype it was computed in.
RANGE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class Start:
    """The residual before the first step, on all samples as one batch.

    Attributes:
        kernel: ``"ntk"``: columns are the unit vectors, or ``"ggn"``: the columns of S with S S^T = H_out.
        residual: (R, N) float64, in the order of the Gram matrix's rows; |residual|^2 / (2 h N) is the loss.
        columns: (R, N_b, ...) float64 directions in output space, of each batch.
        curvature: h, by which the operator J J^T / N has to be multiplied; 1 for ``"ggn"``.
        scale: what the Gram matrix of the columns has to be multiplied by: h / N, or 1 for ``"ggn"``.
        offset: what the loss is above |residual|^2 / (2 h N); for ``"ntk"`` 0, where another quantity is predicted.
        dtype: of the outputs.
    """

    kernel: Kernel
    residual: Tensor
    columns: list[Tensor]
    curvature: float
    scale: float
    offset: float
    dtype: torch.dtype

    @property
    def num_samples(self) -> int:
        """N."""
        return self.residual.shape[1]


def start_of(measured: Measured, kernel: Kernel) -> Start:
    """The start of a linearised descent.

    Raises:
        MeasurementError: when batches differ in outputs per sample, or the quadratic model has no minimum.
    """
    losses = _losses(measured)
    if kernel == "ggn":
        losses = [_with_curvature(loss) for loss in losses]
    sizes = [loss.num_samples for loss in losses]
    shares = batch_shares(losses, sizes)
    gradients = [share * _output_gradient(loss) for loss, share in zip(losses, shares, strict=True)]
    dtype = losses[-1].outputs.dtype
    if kernel == "ntk":
        columns = [_unit_columns(loss.outputs) for loss in losses]
        residual = torch.cat([-sum(sizes) * gradient.flatten(1).T for gradient in gradients], dim=1)
        h = _curvature(losses[0], shares[0], sum(sizes))
        return Start(kernel, finite(residual), columns, h, h / sum(sizes), 0.0, dtype)
    columns = [share**0.5 * loss.hessian_factor() for loss, share in zip(losses, shares, strict=True)]
    parts = [
        _weighted_residual(part, gradient, _row_sizes(loss, part), dtype)
        for loss, part, gradient in zip(losses, columns, gradients, strict=True)
    ]
    residual = finite(torch.cat(parts, dim=1))
    value = sum(share * float(loss.value(loss.outputs)) for loss, share in zip(losses, shares, strict=True))
    offset = value - 0.5 * float(residual.square().sum())
    return Start(kernel, residual * sum(sizes) ** 0.5, columns, 1.0, 1.0, offset, dtype)


def _losses(measured: Measured) -> Sequence[OutputLoss]:
    """The loss of each batch, without its graph."""
    losses = []
    with measured.open() as closure:
        for index, batch in enumerate(measured.batches):
            loss = require_outputs(closure(batch, index))
            losses.append(replace(loss, outputs=loss.outputs.detach()))
    if len({loss.outputs[0].numel() for loss in losses}) > 1:
        raise MeasurementError("The batches differ in outputs per sample; pass batches of one length.")
    return losses


def _with_curvature(loss: OutputLoss) -> OutputLoss:
    """``nll_loss`` is linear; on log-probabilities it equals the cross-entropy that its ``hessian_factor`` is of."""
    return replace(loss, function=F.cross_entropy) if loss.function is F.nll_loss else loss


def _output_gradient(loss: OutputLoss) -> Tensor:
    """(N_b, ...) float64 dL/df of one batch."""
    try:
        return _gradient_in(loss, torch.float64)
    except RuntimeError:  # the loss holds tensors of its own, in the network's precision
        return _gradient_in(loss, loss.outputs.dtype).double()


def _gradient_in(loss: OutputLoss, dtype: torch.dtype) -> Tensor:
    with torch.enable_grad():
        outputs = loss.outputs.detach().to(dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss.in_dtype(dtype).value(outputs), outputs)
    return gradient


def _curvature(loss: OutputLoss, share: float, num_samples: int) -> float:
    """H = N d2L/df2: for ``mse_loss`` 2 N / (number of entries); 1 for the others, which are taken as 1/2 |r|^2."""
    if loss.function is not F.mse_loss or loss.options.get("weight") is not None:
        return 1.0
    entries = loss.outputs.numel() if loss.options.get("reduction", "mean") == "mean" else 1
    return 2.0 * num_samples * share / entries


def _unit_columns(outputs: Tensor) -> Tensor:
    """(C, N, ...) unit vectors in output space, float64."""
    size = outputs[0].numel()
    units = torch.eye(size, dtype=torch.float64, device=outputs.device)[:, None, :]
    return units.expand(size, len(outputs), size).reshape(size, *outputs.shape).clone()


def _weighted_residual(columns: Tensor, gradient: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, N) r with S r = -g, sample by sample, of least norm.

    Each row of S is divided by its entry in ``rows`` (N, O) first. That changes no solution, and a softmax's S, which
    is diag(sqrt p) Q with orthonormal columns Q, becomes as well conditioned as Q, however small a probability is.
    """
    live = rows > 0
    weights = torch.where(live, 1.0 / rows.where(live, 1.0), 1.0)[:, :, None]
    s, g = weights * columns.flatten(2).permute(1, 2, 0), weights * gradient.flatten(1)[:, :, None]  # (N, O, R or 1)
    r: Tensor = -torch.linalg.pinv(s) @ g
    missed = float((s @ r + g).square().sum())
    if missed > (RANGE_TOLERANCE.get(dtype, 0.1)) ** 2 * float(g.square().sum()):
        raise MeasurementError(
            "The loss has a slope where it has no curvature in the outputs (the linear part of a Huber loss, a "
            "probability of zero), so its quadratic model has no minimum. Pass kernel='ntk'."
        )
    return r[:, :, 0].T


def _row_sizes(loss: OutputLoss, columns: Tensor) -> Tensor:
    """(N, O) sqrt p for a softmax, whose rows of S have the norms sqrt(p (1 - p)); else the norms of the rows."""
    if loss.function is F.cross_entropy:
        root: Tensor = torch.softmax(loss.outputs.double(), dim=1).sqrt().flatten(1)
        return root
    norms: Tensor = columns.flatten(2).norm(dim=0)
    return norms
