"""Measure the Hessian's spectrum of anything that a ``LossClosure`` can evaluate, undisturbed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lightning_plasticity.curvature.closure import Evaluation, LossClosure
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.hessian import MAX_ASYMMETRY, HessianOperator
from lightning_plasticity.curvature.measured import RESOLUTION, Measured, dtype_name, finite
from lightning_plasticity.curvature.output_loss import batch_shares
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg import stochastic_lanczos_quadrature

Method = Literal["auto", "exact", "lanczos"]
METHODS = ("auto", "exact", "lanczos")
EXACT_LIMIT = 1000  # live coordinates up to which "auto" forms the whole Hessian
LANCZOS_STEPS = 120
MAX_BASIS_BYTES = 2**31  # what the Lanczos basis of a measurement may take; with more parameters there are fewer steps
ROUNDING_MARGIN = 10.0  # products this many times as large as rounding have to be symmetric


def measure_hessian(
    measured: Measured,
    *,
    method: Method = "auto",
    num_steps: int = LANCZOS_STEPS,
    exact_limit: int = EXACT_LIMIT,
    check_symmetry: bool = True,
) -> Spectrum:
    """The Hessian's spectrum; arguments as in ``hessian_spectrum``."""
    check_method(method)
    started = time.perf_counter()
    parameters = measured.parameters()
    generator = torch.Generator().manual_seed(measured.seed)
    with measured.open() as closure:
        evaluations = _evaluate_all(measured, closure)
        total = sum(evaluation.num_samples for evaluation in evaluations)
        shares = batch_shares(
            [evaluation.output_loss for evaluation in evaluations],
            [evaluation.num_samples for evaluation in evaluations],
        )
        operator = HessianOperator([evaluation.loss for evaluation in evaluations], shares, parameters)
        if check_symmetry:
            _check_symmetry(operator, evaluations, generator)
        live = operator.live_coordinates(generator)
        num_live = int(live.sum())
        about: dict[str, Any] = {"matrix": "hessian", "num_samples": total}
        steps = _affordable_steps(num_steps, operator)
        exact = method == "exact" or (method == "auto" and num_live <= exact_limit) or num_live == 0
        if exact:
            quadrature = None
            values = torch.linalg.eigvalsh(finite(operator.dense(live)))
        else:
            quadrature = stochastic_lanczos_quadrature(
                operator.matvec,
                operator.num_params,
                steps,
                generator=generator,
                mask=live,
                dtype=operator.dtype,
                device=operator.device,
            )
            values = torch.tensor(quadrature.nodes)
    top = float(values.abs().max()) if len(values) else 0.0
    about |= {
        "method": "exact" if exact else "lanczos",
        "num_products": operator.num_products,
        "seconds": time.perf_counter() - started,
        "resolution": RESOLUTION.get(operator.dtype, 1e-2) * top,
        "settings": {"dtype": dtype_name(operator.dtype), "mode": measured.mode, "live_coordinates": num_live},
    }
    if note := evaluations[0].loss_note:
        about["settings"]["note"] = note
    if quadrature is None:
        return Spectrum.from_eigenvalues(values, operator.num_params, **about)
    about["settings"]["num_steps"] = len(values)
    if steps < num_steps:
        about["settings"]["num_steps_wanted"] = num_steps  # the basis had no room for them
    return Spectrum.from_quadrature(quadrature, operator.num_params, **about)


def _affordable_steps(num_steps: int, operator: HessianOperator) -> int:
    """As many of the steps as the basis has room for, and at least two; the record says how many."""
    room = MAX_BASIS_BYTES // (operator.num_params * operator.dtype.itemsize)
    return min(num_steps, max(room, 2))


def _evaluate_all(measured: Measured, closure: LossClosure) -> list[Evaluation]:
    return [closure(batch, index) for index, batch in enumerate(measured.batches)]


def _check_symmetry(operator: HessianOperator, evaluations: Sequence[Evaluation], generator: torch.Generator) -> None:
    asymmetry, size = operator.asymmetry(generator)
    if asymmetry > MAX_ASYMMETRY and size > ROUNDING_MARGIN * _rounding(operator, evaluations):
        raise MeasurementError(
            f"The Hessian-vector product is not symmetric (relative asymmetry {asymmetry:.2g}): a layer's double "
            "backward is wrong (a custom autograd.Function with once_differentiable, say) or the step changes weights. "
            "Define curvature_loss(batch) without it."
        )


def _rounding(operator: HessianOperator, evaluations: Sequence[Evaluation]) -> float:
    """What rounding in the loss's second derivatives makes of a product: eps |J|^2 / N, from one random row of J^T.

    On an over-confident network that fits its data the Hessian is nothing else.
    """
    total = 0.0
    for evaluation in evaluations:
        if evaluation.output_loss is None:
            return 0.0
        outputs = evaluation.output_loss.outputs
        rows = torch.autograd.grad(
            outputs, operator.parameters, torch.randn_like(outputs), retain_graph=True, allow_unused=True
        )
        total += sum(float(row.square().sum()) for row in rows if row is not None)
    return torch.finfo(operator.dtype).eps * total / sum(evaluation.num_samples for evaluation in evaluations)


def check_method(method: str) -> None:
    """Refuse an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}.")
