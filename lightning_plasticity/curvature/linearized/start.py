"""Where gradient descent on a linearised network starts: the residual, and the directions in output space it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.measure import scaled_roots
from lightning_plasticity.curvature.loss.output_loss import OutputLoss, batch_shares
from lightning_plasticity.curvature.loss.output_root import OutputRoot
from lightning_plasticity.curvature.measured import finite

Kernel = Literal["ntk", "ggn"]
KERNELS = ("ntk", "ggn")
# How much of the gradient may lie outside of the range of S, relative: rounding, by the dtype it was computed in.
RANGE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class Start:
    """The residual before the first step, on all samples as one batch.

    Attributes:
        residual: (R, N_b) float64 of each batch; ``|residual|^2 / (2 h N)`` is the loss.
        roots: S of each batch: S^T J J^T S is what the residual decays by. For ``"ntk"`` multiples of the identity.
        curvature: h, by which the operator J J^T / N has to be multiplied; 1 for ``"ggn"``.
        offset: what the loss is above ``|residual|^2 / (2 h N)``; for ``"ntk"`` 0, where another quantity is predicted.
        dtype: of the outputs.
    """

    residual: list[Tensor]
    roots: list[OutputRoot]
    curvature: float
    offset: float
    dtype: torch.dtype

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(part.shape[1] for part in self.residual)


def start_of(losses: Sequence[OutputLoss], kernel: Kernel) -> Start:
    """The start of a linearised descent, from the losses of all batches.

    Raises:
        MeasurementError: when the quadratic model has no minimum.
    """
    losses = [_with_curvature(loss) for loss in losses] if kernel == "ggn" else losses
    shares, total = batch_shares(losses), sum(loss.num_samples for loss in losses)
    gradients = [share * loss.gradient() for loss, share in zip(losses, shares, strict=True)]
    roots, dtype = scaled_roots(losses, kernel), losses[-1].outputs.dtype
    if kernel == "ntk":
        h = _curvature(losses[0], shares[0], total)
        residual = [finite(-total * gradient.flatten(1).T) for gradient in gradients]
        return Start(residual, [root.scaled(h**0.5) for root in roots], h, 0.0, dtype)
    pairs = zip(roots, gradients, strict=True)
    residual = [finite(_weighted_residual(root, gradient, dtype)) for root, gradient in pairs]
    value = sum(share * float(loss.value(loss.outputs)) for loss, share in zip(losses, shares, strict=True))
    offset = value - 0.5 * sum(float(part.square().sum()) for part in residual)
    return Start([part * total**0.5 for part in residual], roots, 1.0, offset, dtype)


def _with_curvature(loss: OutputLoss) -> OutputLoss:
    """``nll_loss`` is linear; on log-probabilities it equals the cross-entropy that its ``hessian_root`` is of."""
    return replace(loss, function=F.cross_entropy) if loss.function is F.nll_loss else loss


def _curvature(loss: OutputLoss, share: float, num_samples: int) -> float:
    """H = N d2L/df2: for ``mse_loss`` 2 N / (number of entries); 1 for the others, which are taken as ``1/2 |r|^2``."""
    if loss.function is not F.mse_loss or loss.options.get("weight") is not None:
        return 1.0
    entries = loss.outputs.numel() if loss.options.get("reduction", "mean") == "mean" else 1
    return 2.0 * num_samples * share / entries


def _weighted_residual(root: OutputRoot, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, N) r with S r = -g, sample by sample, of least norm."""
    r = -root.solve(gradient)
    missed = float((root.apply(r) + gradient).square().sum())
    if missed > (RANGE_TOLERANCE.get(dtype, 0.1)) ** 2 * float(gradient.square().sum()):
        raise MeasurementError(
            "The loss has a slope where it has no curvature in the outputs (the linear part of a Huber loss, a "
            "probability of zero), so its quadratic model has no minimum. Pass kernel='ntk'."
        )
    return r
