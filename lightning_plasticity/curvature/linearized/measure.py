"""How far gradient descent would get on a task if the network were its linearisation: the NTK seen from the residual.

Around its weights a network is f + J dtheta. A step of size eta on a mean squared loss then maps the residual r to
(I - eta h Gamma) r with Gamma = J J^T / N, so the NTK's eigenpairs and the first residual say where training can get in
T steps; for other losses the GGN's take their place, on a quadratic model. Whole eigenpairs where N C is small; else
Lanczos on Gamma from the residual, one VJP and one JVP a product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.jacobian import DualOperator, OutputJacobian
from lightning_plasticity.curvature.gram.matrix import assemble
from lightning_plasticity.curvature.gram.measure import collected_rows, columns_per_sample
from lightning_plasticity.curvature.hessian.measure import Method, check_method
from lightning_plasticity.curvature.linearized.result import LinearizedPrediction
from lightning_plasticity.curvature.linearized.start import KERNELS, Kernel, Start, start_of
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.measured import (
    RESOLUTION,
    Measured,
    announce_eigenvalues,
    dtype_name,
    finite,
    require_outputs,
)
from lightning_plasticity.linalg import lanczos
from lightning_plasticity.linalg.progress import part
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
    kernel: Kernel = "ntk",
    params: str | Sequence[str] | None = None,
    method: Method = "auto",
    lanczos_steps: int | None = None,
    mode: Mode = "frozen",
    seed: int = 0,
) -> LinearizedPrediction:
    """Predict the loss under full-batch gradient descent from the kernel and the residual at the present weights.

    **Squared loss** (``mse_loss``, or ``1/2 |f - y|^2`` averaged over samples): of the loss itself, exact for a model
    linear in its parameters, and the same with both kernels.

    **Any other loss,** ``kernel="ntk"``: of ``1/2 |r|^2``, the mean squared residual r = -dl/df (one-hot minus
    probabilities for cross-entropy), as if the loss were squared.

    **Any other loss,** ``kernel="ggn"``: of its quadratic model along the linearisation. With d the change of the
    parameters, g = dL/df and S S^T = H_out = d2L/df2 frozen at the start, and r_0 such that S r_0 = -g::

        q(d) = L + g^T J d + 1/2 (J d)^T H_out (J d) = L - 1/2 |r_0|^2 + 1/2 |r_0 - S^T J d|^2

    A step of gradient descent on q maps r to (I - eta S^T J J^T S) r: the NTK's place is taken by the loss-weighted
    Gram matrix, whose nonzero eigenvalues are the GGN's. ``loss_after`` is ``1/2 |r_T|^2``, what q is above its lowest
    value, and ``offset = L - 1/2 |r_0|^2`` is that value, as far as outputs can be chosen freely. For cross-entropy
    ``1/2 |r_0|^2`` is the mean of (1 - p_y) / (2 p_y): on confident mistakes the model has a far and flat minimum. So
    this form says what the loss does next, and does not rank networks by what they can learn; the plain NTK does.

    Source: Jacot et al. 2018 (arXiv 1806.07572), section 5, for the dynamics, here in discrete steps; the quadrature is
    that of Golub and Meurant 1994.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step.
        data: ``(inputs, targets)`` or an iterable of such pairs; all of it is one full batch.
        learning_rate: eta, of plain gradient descent on the mean loss (no momentum, no Adam).
        num_steps: T, the budget of steps.
        kernel: ``"ntk"`` or ``"ggn"``, as above.
        params: names or wildcards of the parameters that learn, e.g. ``"head.*"``; None for all trainable ones.
        method: ``"exact"`` decomposes the Gram matrix (N C rows; N (C - 1) for the GGN of a softmax), ``"lanczos"``
            does not form it, ``"auto"`` is exact up to 2000 rows.
        lanczos_steps: K; exact for up to K - 1 steps of gradient descent, with bounds beyond. By default T + 1, at most
            120.
        mode: ``"frozen"`` (BatchNorm and dropout off, by type), ``"as_is"`` or ``"eval"``.
        seed: of the random state during the measurement.

    Returns:
        The prediction: losses, steps to a target, the rank that a target needs.

    Raises:
        MeasurementError: when eta h lambda_max >= 2, where gradient descent diverges; when outputs cannot be told from
            the loss; when the quadratic model has no minimum (``"ggn"``); or when something is not finite.
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
    _check_arguments(learning_rate, num_steps, kernel, method, lanczos_steps)
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    return measure_linearized(measured, learning_rate, num_steps, kernel, method, lanczos_steps)


@part("linearized")
def measure_linearized(
    measured: Measured,
    learning_rate: float,
    num_steps: int,
    kernel: Kernel = "ntk",
    method: Method = "auto",
    lanczos_steps: int | None = None,
) -> LinearizedPrediction:
    """The same for what is already prepared."""
    started = time.perf_counter()
    num_rows = _num_rows(measured, kernel)
    if method == "exact" or (method == "auto" and num_rows <= EXACT_ROWS):
        start, about = _exact(measured, kernel)
    else:
        steps = min(LANCZOS_STEPS, num_steps + 1) if lanczos_steps is None else lanczos_steps
        start, about = _by_lanczos(measured, kernel, steps)
    nodes = about["nodes"]
    resolution = RESOLUTION.get(start.dtype, 1e-2) * float(nodes.max())
    about["nodes"] = nodes.where(nodes > resolution, 0.0)  # a null space that rounding would let decay
    _check_stable(learning_rate, float(nodes.max()), kernel)
    return LinearizedPrediction(
        **about,
        learning_rate=learning_rate,
        num_steps=num_steps,
        num_samples=start.num_samples,
        num_rows=num_rows,
        curvature=start.curvature,
        kernel=kernel,
        offset=start.offset,
        resolution=resolution,
        seconds=time.perf_counter() - started,
        settings={"dtype": dtype_name(start.dtype), "mode": measured.mode},
    )


def _num_rows(measured: Measured, kernel: Kernel) -> int:
    """Rows of the Gram matrix of all samples.

    Raises:
        MeasurementError: when batches differ in outputs per sample.
    """
    with measured.open() as closure:
        losses = [require_outputs(closure(batch, i)).detached() for i, batch in enumerate(measured.batches)]
    if len({loss.outputs[0].numel() for loss in losses}) > 1:
        raise MeasurementError("The batches differ in outputs per sample; pass batches of one length.")
    return sum(loss.num_samples * columns_per_sample(loss, kernel) for loss in losses)


def _exact(measured: Measured, kernel: Kernel) -> tuple[Start, dict[str, Any]]:
    """All eigenpairs of the Gram matrix; its rows are (column, sample), those of all batches side by side."""
    with collected_rows(measured, kernel, measured.parameters()) as rows:
        start = start_of(rows.losses, kernel)
        residual = torch.cat(start.residual, dim=1).flatten()
        if not bool(residual.any()):
            return start, _nothing_left()
        gram = assemble(rows.batches)
    scale = start.curvature / start.num_samples if kernel == "ntk" else 1.0
    announce_eigenvalues(len(gram.matrix))
    values, vectors = torch.linalg.eigh(finite(gram.matrix) * scale)
    coefficients = vectors.T @ residual.to(vectors.device)
    found = {"nodes": values.clamp_min(0.0).cpu(), "masses": coefficients.square().cpu()}
    return start, found | {"num_products": gram.num_backward}


def _by_lanczos(measured: Measured, kernel: Kernel, num_steps: int) -> tuple[Start, dict[str, Any]]:
    """A Gauss quadrature of the residual's spectral measure."""
    with measured.open() as closure:
        losses = [require_outputs(closure(batch, index)) for index, batch in enumerate(measured.batches)]
        start = start_of([loss.detached() for loss in losses], kernel)
        residual = torch.cat([part.flatten() for part in start.residual])
        if not bool(residual.any()):
            return start, _nothing_left()
        jacobian = OutputJacobian([loss.outputs for loss in losses], measured.parameters())
        operator = DualOperator(jacobian, start.roots)
        run = lanczos(operator.matvec, residual.to(jacobian.device, jacobian.dtype), num_steps)
    nodes, vectors = run.ritz()
    return start, {
        "nodes": torch.from_numpy(nodes).clamp_min(0.0),
        "masses": torch.from_numpy(vectors[0] ** 2) * float(residual.square().sum()),
        "num_products": run.num_products,
        "exact_steps": float("inf") if run.breakdown else len(nodes) - 1,
        "lanczos": run,
    }


def _nothing_left() -> dict[str, Any]:
    """The network fits the data, and nothing is left to learn."""
    return {"nodes": torch.zeros(1, dtype=torch.float64), "masses": torch.zeros(1, dtype=torch.float64)}


def _check_arguments(learning_rate: float, num_steps: int, kernel: str, method: str, lanczos_steps: int | None) -> None:
    check_method(method)
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}, expected one of {KERNELS}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate}, expected a positive number.")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1 step of gradient descent.")
    if lanczos_steps is not None and lanczos_steps < 1:
        raise ValueError(f"lanczos_steps={lanczos_steps}, expected at least 1; num_steps + 1 has no quadrature error.")


def _check_stable(learning_rate: float, top: float, kernel: str) -> None:
    if learning_rate * top >= 2:
        raise MeasurementError(
            f"learning_rate={learning_rate:g} times the largest {kernel.upper()} eigenvalue {top:.4g} is "
            f"{learning_rate * top:.3g}; from 2 on gradient descent on the linearised network diverges. Pass "
            f"learning_rate < {2 / top:.3g}, and more steps: below that, little but learning_rate * num_steps matters."
        )
