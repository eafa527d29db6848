"""Estimate the GGN's or the NTK's spectrum by Lanczos where its Gram matrix is too large to decompose.

The quadrature is of the dual S^T J J^T S, of dimension M (its rows), which holds all nonzero eigenvalues: on the Gram
matrix itself where it can be formed cheaply, else matrix-free, by one vector-Jacobian and one Jacobian-vector product a
step. With fewer parameters than rows it is of J^T S S^T J, of dimension P. Either way the rest of the P coordinates are
exact zeros, and the intervals are those of ``lightning_plasticity.linalg.quadrature``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.budget import Budget, ended_early
from lightning_plasticity.curvature.gram.jacobian import DualOperator, OutputJacobian, PrimalOperator
from lightning_plasticity.curvature.gram.matrix import assemble, disagreements
from lightning_plasticity.curvature.gram.measure import (
    Matrix,
    gram_rows,
    measure_gram,
    scaled_roots,
)
from lightning_plasticity.curvature.gram.plan import GramPlan, plan_gram
from lightning_plasticity.curvature.hessian.costs import LEAST_STEPS
from lightning_plasticity.curvature.measured import (
    RESOLUTION,
    Measured,
    about_masks,
    dtype_name,
    finite,
    num_active,
    require_outputs,
)
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg import LanczosQuadrature, stochastic_lanczos_quadrature
from lightning_plasticity.linalg.progress import part

GramMethod = Literal["auto", "exact", "lanczos"]
METHODS = ("auto", "exact", "lanczos")
DENSE_COLUMNS = 64  # up to which the Gram matrix costs fewer backward passes than the steps of an estimate would
PATIENCE = 1.5  # times the budget's seconds after which the clock ends an estimate

Stop = Callable[[int], bool]


def gram_spectrum(
    measured: Measured,
    matrix: Matrix,
    *,
    method: GramMethod,
    max_rows: int | None,
    num_steps: int,
    budget: Budget | None = None,
    plan: GramPlan | None = None,
) -> Spectrum:
    """The GGN's or the NTK's spectrum; arguments as in ``ggn_spectrum``, and a plan made before for the same budget."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}, expected at least 1 row, or None for no bound.")
    budget = Budget() if budget is None else budget
    with part(matrix):
        if plan is None:
            insist = None if method == "auto" else method == "exact"
            plan = plan_gram(measured, matrix, measured.parameters(), max_rows, num_steps, budget, insist)
        if plan.cut:
            measured = measured.first(plan.num_samples)
        if plan.exact:
            # With no sample that fits ``max_rows`` is refused; without rows the loss has no curvature.
            rows = (plan.num_rows or None) if plan.num_samples else max_rows
            spectrum = measure_gram(measured, matrix, max_rows=rows, row_bytes=plan.row_bytes)
        else:
            spectrum = estimate_gram(measured, matrix, plan, budget)
    settings = {"budget": plan.why} if plan.why else {}
    if method == "auto":
        settings["reason"] = plan.reason
    return replace(spectrum, settings={**settings, **spectrum.settings})


def estimate_gram(measured: Measured, matrix: Matrix, plan: GramPlan, budget: Budget) -> Spectrum:
    """A quadrature on all samples."""
    started = time.perf_counter()
    parameters = measured.parameters()
    active = measured.active(parameters)
    num_params = num_active(parameters, active)
    deadline = started + PATIENCE * budget.seconds

    def stop(done: int) -> bool:
        return done >= LEAST_STEPS and time.perf_counter() > deadline

    found = None
    if plan.num_rows == 0:
        return measure_gram(measured, matrix)  # a loss without curvature
    if plan.num_rows <= min(plan.dense_rows, num_params) and plan.rows_each <= DENSE_COLUMNS:
        found = _on_the_gram_matrix(measured, matrix, parameters, plan.num_steps, stop)
    if found is None:
        with part(deadline=deadline):
            found = _matrix_free(measured, matrix, parameters, active, plan.num_steps, stop)
    settings: dict[str, Any] = {
        "dtype": dtype_name(found.dtype),
        "mode": measured.mode,
        "rows": found.num_rows,
        "route": found.route,
        "num_steps": len(found.quadrature.alpha),
    } | about_masks(active)
    if len(found.quadrature.alpha) < plan.num_steps and not found.quadrature.breakdown:
        settings["budget"] = ended_early("the clock", len(found.quadrature.alpha), plan.num_steps, plan.why)
    if found.note:
        settings["note"] = found.note
    return Spectrum.from_quadrature(
        found.quadrature,
        num_params,
        matrix=matrix,
        method="lanczos",
        num_samples=found.num_samples,
        num_products=found.num_products,
        seconds=time.perf_counter() - started,
        resolution=RESOLUTION.get(found.dtype, 1e-2) * float(abs(found.quadrature.nodes).max()),
        settings=settings,
    )


@dataclass(frozen=True)
class _Found:
    quadrature: LanczosQuadrature
    num_samples: int
    num_rows: int
    dtype: torch.dtype
    num_products: int
    route: str
    note: str


def _on_the_gram_matrix(
    measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter], num_steps: int, stop: Stop
) -> _Found | None:
    """Lanczos on the explicit Gram matrix; None where some parameters have no shortcut, whose rows would be explicit.

    The matrix is summed in the network's own precision, which its entries have anyway: half the memory to read a step.
    """
    with measured.open() as closure:
        rows = gram_rows(measured, closure, matrix, parameters, max_rows=None)
        if disagreements(rows.batches) or any(batch.general for batch in rows.batches):
            return None
        gram = assemble(rows.batches, dtype=rows.dtype)
    finite(gram.matrix.diagonal())
    kernel = gram.matrix / gram.num_samples if matrix == "ntk" else gram.matrix
    quadrature = stochastic_lanczos_quadrature(
        kernel.mv,
        len(kernel),
        num_steps,
        generator=torch.Generator().manual_seed(measured.seed),
        dtype=rows.dtype,
        device=kernel.device,
        stop=stop,
    )
    route = "lanczos on the Gram matrix"
    return _Found(quadrature, gram.num_samples, len(kernel), rows.dtype, gram.num_backward, route, rows.note)


def _matrix_free(
    measured: Measured,
    matrix: Matrix,
    parameters: Sequence[nn.Parameter],
    active: Tensor | None,
    num_steps: int,
    stop: Stop,
) -> _Found:
    """Lanczos by products with the network's Jacobian, in the smaller of both spaces."""
    with measured.open() as closure:
        evaluations = [closure(batch, index) for index, batch in enumerate(measured.batches)]
        losses = [require_outputs(evaluation) for evaluation in evaluations]
        roots = scaled_roots(losses, matrix)
        jacobian = OutputJacobian([loss.outputs for loss in losses], parameters)
        operator: DualOperator | PrimalOperator = DualOperator(jacobian, roots)
        if operator.dim > num_active(parameters, active):
            operator = PrimalOperator(jacobian, roots, active)
        quadrature = stochastic_lanczos_quadrature(
            operator.matvec,
            operator.dim,
            num_steps,
            generator=torch.Generator().manual_seed(measured.seed),
            dtype=jacobian.dtype,
            device=jacobian.device,
            stop=stop,
        )
    space = "outputs" if isinstance(operator, DualOperator) else "parameters"
    route = f"lanczos by products with the network, in the space of {space}"
    num_samples = sum(root.num_samples for root in roots)
    num_rows = sum(root.num_columns * root.num_samples for root in roots)
    num_products = 2 * len(quadrature.alpha)
    return _Found(quadrature, num_samples, num_rows, jacobian.dtype, num_products, route, evaluations[0].note)
