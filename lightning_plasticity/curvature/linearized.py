"""How far gradient descent would get on a task if the network were its linearisation: the NTK seen from the residual.

Around its weights a network is f + J dtheta. A step of size eta on a mean squared loss then maps the residual r to
(I - eta h Gamma) r with Gamma = J J^T / N, so the NTK's eigenpairs and the first residual say where training can get in
T steps. Whole eigenpairs where N C is small; else Lanczos on Gamma from the residual, one VJP and one JVP a product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature.closure import LossFunction
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.functions import as_batches
from lightning_plasticity.curvature.gram import GramRows, assemble, collect_rows, disagreements
from lightning_plasticity.curvature.hessian_measure import Method, check_method
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.linearized_result import LinearizedPrediction
from lightning_plasticity.curvature.measured import RESOLUTION, Measured, finite, require_outputs
from lightning_plasticity.curvature.ntk_operator import NtkOperator
from lightning_plasticity.curvature.output_loss import OutputLoss
from lightning_plasticity.linalg import lanczos
from lightning_plasticity.nn import Mode

EXACT_ROWS = 2000  # N C up to which "auto" decomposes the whole Gram matrix: about two seconds
LANCZOS_STEPS = 120


def linearized_trainability(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    learning_rate: float,
    num_steps: int,
    params: str | Sequence[str] | None = None,
    method: Method = "auto",
    lanczos_steps: int | None = None,
    mode: Mode = "frozen",
    seed: int = 0,
) -> LinearizedPrediction:
    """Predict the loss under full-batch gradient descent from the NTK and the residual at the present weights.

    For a squared loss (``mse_loss``, or 1/2 |f - y|^2 averaged over samples) the prediction is of the loss itself, and
    exact for a model linear in its parameters. For any other loss it is of 1/2 |r|^2, the mean squared residual
    r = -dl/df (one-hot minus probabilities for cross-entropy), as if the loss were squared: the plain NTK form. A
    curvature-weighted NTK is not offered: in an over-confident network it is near zero whatever the network can learn.

    Source: Jacot et al. 2018 (arXiv 1806.07572), section 5, for the dynamics, here in discrete steps; the quadrature is
    that of Golub and Meurant 1994.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step.
        data: ``(inputs, targets)`` or an iterable of such pairs; all of it is one full batch.
        learning_rate: eta, of plain gradient descent on the mean loss (no momentum, no Adam).
        num_steps: T, the budget of steps.
        params: names or wildcards of the parameters that learn, e.g. ``"head.*"``; None for all trainable ones.
        method: ``"exact"`` decomposes the N C x N C Gram matrix, ``"lanczos"`` does not form it, ``"auto"`` is exact up
            to 2000 rows.
        lanczos_steps: K; exact for up to K - 1 steps of gradient descent, with bounds beyond. By default T + 1, at most
            120.
        mode: ``"frozen"`` (BatchNorm and dropout off, by type), ``"as_is"`` or ``"eval"``.
        seed: of the random state during the measurement.

    Returns:
        The prediction: losses, steps to a target, the rank that a target needs.

    Raises:
        MeasurementError: when eta h lambda_max >= 2, where gradient descent diverges; when outputs cannot be told from
            the loss; or when something is not finite.
        ValueError: for unknown settings.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import linearized_trainability
        >>> inputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]])
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> loss = torch.nn.MSELoss()
        >>> found = linearized_trainability(net, loss, (inputs, targets), learning_rate=0.1, num_steps=1)
        >>> round(found.loss_after(0).value, 6), round(found.loss_after(1).value, 6)  # 5 / 2, times (1 - 0.1 * 5)^2
        (2.5, 0.625)
    """
    _check_arguments(learning_rate, num_steps, method, lanczos_steps)
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    started = time.perf_counter()
    parameters = measured.parameters()
    start = _residuals(measured)
    use_exact = method == "exact" or (method == "auto" and start.residual.numel() <= EXACT_ROWS)
    about: dict[str, Any] = {
        "learning_rate": learning_rate,
        "num_steps": num_steps,
        "num_samples": start.num_samples,
        "num_rows": start.residual.numel(),
        "curvature": start.curvature,
        "settings": {"dtype": str(start.dtype).removeprefix("torch."), "mode": mode},
    }
    if not bool(start.residual.any()):  # the network fits the data: nothing is left to learn
        about |= {"nodes": torch.zeros(1, dtype=torch.float64), "masses": torch.zeros(1, dtype=torch.float64)}
    elif use_exact:
        about |= _exact(measured, parameters, start)
    else:
        steps = min(LANCZOS_STEPS, num_steps + 1) if lanczos_steps is None else lanczos_steps
        about |= _by_lanczos(measured, parameters, start, steps)
    nodes = about["nodes"]
    about["resolution"] = RESOLUTION.get(start.dtype, 1e-2) * float(nodes.max())
    about["nodes"] = nodes.where(nodes > about["resolution"], 0.0)  # a null space that rounding would let decay
    _check_stable(learning_rate, float(nodes.max()))
    return LinearizedPrediction(**about, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Start:
    """The residual before the first step.

    Attributes:
        residual: (C, N) float64, in the order of the Gram matrix's rows.
        sizes: N_b of the batches.
        curvature: h.
        dtype: of the outputs.
    """

    residual: Tensor
    sizes: list[int]
    curvature: float
    dtype: torch.dtype

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)


def _residuals(measured: Measured) -> _Start:
    parts, sizes, curvatures = [], [], set()
    dtype = torch.float64
    with measured.open() as closure:
        for index, batch in enumerate(measured.batches):
            loss = require_outputs(closure(batch, index))
            parts.append(_residual(loss))
            sizes.append(loss.num_samples)
            curvatures.add(_curvature(loss))
            dtype = loss.outputs.dtype
    if len({len(part) for part in parts}) > 1 or len(curvatures) > 1:
        raise MeasurementError(
            "The batches differ in outputs per sample, or a summed loss is taken of batches of different sizes; pass "
            "one batch, or a loss with reduction='mean'."
        )
    return _Start(finite(torch.cat(parts, dim=1)), sizes, curvatures.pop(), dtype)


def _residual(loss: OutputLoss) -> Tensor:
    """(C, N') float64: -N' dL/df of one batch."""
    try:
        gradient = _output_gradient(loss, torch.float64)
    except RuntimeError:  # the loss holds tensors of its own, in the network's precision
        gradient = _output_gradient(loss, loss.outputs.dtype)
    return -loss.num_samples * gradient.double().reshape(loss.num_samples, -1).T


def _output_gradient(loss: OutputLoss, dtype: torch.dtype) -> Tensor:
    with torch.enable_grad():
        outputs = loss.outputs.detach().to(dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss.in_dtype(dtype).value(outputs), outputs)
    return gradient


def _curvature(loss: OutputLoss) -> float:
    """h: 2 N / (number of entries) for ``mse_loss``; 1 for the others, which are taken as 1/2 |r|^2."""
    if loss.function is not F.mse_loss or loss.options.get("weight") is not None:
        return 1.0
    entries = loss.outputs.numel() if loss.options.get("reduction", "mean") == "mean" else 1
    return 2.0 * loss.num_samples / entries


def _exact(measured: Measured, parameters: Sequence[nn.Parameter], start: _Start) -> dict[str, Any]:
    """All eigenpairs of the Gram matrix; its rows are (output, sample), like the residual's entries."""
    excluded: set[nn.Parameter] = set()
    while True:
        with measured.open() as closure:
            batches: list[GramRows] = []
            for index, batch in enumerate(measured.batches):
                with LayerTaps(measured.module) as taps:
                    loss = require_outputs(closure(batch, index))
                batches.append(collect_rows(loss.outputs, _unit_columns(loss.outputs), taps, parameters, excluded))
            if not (torn := disagreements(batches)):
                gram = assemble(batches)
                break
        excluded |= torn
    values, vectors = torch.linalg.eigh(finite(gram.matrix) / gram.num_samples)
    coefficients = vectors.T @ start.residual.to(vectors.device).flatten()
    return {
        "nodes": start.curvature * values.clamp_min(0.0).cpu(),
        "masses": coefficients.square().cpu(),
        "num_products": gram.num_backward,
    }


def _unit_columns(outputs: Tensor) -> Tensor:
    """(C, N, ...) unit vectors in output space, float64."""
    size = outputs[0].numel()
    units = torch.eye(size, dtype=torch.float64, device=outputs.device)[:, None, :]
    return units.expand(size, len(outputs), size).reshape(size, *outputs.shape).clone()


def _by_lanczos(
    measured: Measured, parameters: Sequence[nn.Parameter], start: _Start, num_steps: int
) -> dict[str, Any]:
    """A Gauss quadrature of the residual's spectral measure."""
    with measured.open() as closure:
        outputs = [require_outputs(closure(batch, index)).outputs for index, batch in enumerate(measured.batches)]
        operator = NtkOperator(outputs, parameters)
        vector = start.residual.to(operator.device, operator.dtype).flatten()
        run = lanczos(operator.matvec, vector, num_steps)
    nodes, vectors = run.ritz()
    masses = torch.from_numpy(vectors[0] ** 2) * float(start.residual.square().sum())
    return {
        "nodes": start.curvature * torch.from_numpy(nodes).clamp_min(0.0),
        "masses": masses,
        "num_products": run.num_products,
        "exact_steps": float("inf") if run.breakdown else len(nodes) - 1,
        "lanczos": run,
    }


def _check_arguments(learning_rate: float, num_steps: int, method: str, lanczos_steps: int | None) -> None:
    check_method(method)
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate}, expected a positive number.")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1 step of gradient descent.")
    if lanczos_steps is not None and lanczos_steps < 1:
        raise ValueError(f"lanczos_steps={lanczos_steps}, expected at least 1; num_steps + 1 has no quadrature error.")


def _check_stable(learning_rate: float, top: float) -> None:
    if learning_rate * top >= 2:
        raise MeasurementError(
            f"learning_rate={learning_rate:g} times the largest NTK eigenvalue {top:.4g} is {learning_rate * top:.3g}; "
            f"from 2 on gradient descent on the linearised network diverges. Pass learning_rate < {2 / top:.3g}, and "
            "more steps: below that, little but learning_rate * num_steps matters."
        )
