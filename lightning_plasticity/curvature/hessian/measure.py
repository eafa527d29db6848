"""Measure the Hessian's spectrum of anything that a ``LossClosure`` can evaluate, undisturbed."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plasticity.curvature.budget import Budget, ended_early, in_mib
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.hessian.costs import GRAMS, LEAST_STEPS
from lightning_plasticity.curvature.hessian.plan import HessianPlan, plan_hessian
from lightning_plasticity.curvature.hessian.problem import HessianProblem, opened
from lightning_plasticity.curvature.measured import (
    RESOLUTION,
    Measured,
    about_masks,
    announce_eigenvalues,
    dtype_name,
    finite,
    num_active,
)
from lightning_plasticity.curvature.samples import num_samples
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg import LanczosQuadrature, lanczos
from lightning_plasticity.linalg.progress import part

Method = Literal["auto", "exact", "lanczos"]
METHODS = ("auto", "exact", "lanczos")
LANCZOS_STEPS = 120
COPIES = 2e-5  # relative distance of copies of an eigenvalue in a run without reorthogonalisation, in float32


@part("hessian")
def measure_hessian(
    measured: Measured,
    *,
    method: Method = "auto",
    num_steps: int = LANCZOS_STEPS,
    budget: Budget | None = None,
    plan: HessianPlan | None = None,
) -> Spectrum:
    """The Hessian's spectrum; arguments as in ``hessian_spectrum``, and a plan made before for the same budget."""
    check_method(method)
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1; 60 is a quick look, 120 the usual choice.")
    budget = Budget() if budget is None else budget
    started = time.perf_counter()
    parameters = measured.parameters()
    if method == "exact":
        plan = HessianPlan(num_samples(measured.batches), 0)
    elif plan is None:
        plan = plan_hessian(measured, parameters, num_steps, budget)
    measured = measured.first(plan.num_samples)
    generator = torch.Generator().manual_seed(measured.seed)
    in_range = num_steps if method != "exact" else 0
    limit = plan.exact_limit if method == "auto" else 0
    with opened(measured, parameters, generator, chunk=plan.chunk, in_range=in_range, exact_limit=limit) as problem:
        operator, live = problem.operator, problem.num_live
        exact = method == "exact" or (method == "auto" and live <= plan.exact_limit) or not live
        quadrature: LanczosQuadrature | None = None
        settings = plan.settings
        if exact:
            _check_room(live, budget.memory(operator.device))
            values = _all_eigenvalues(problem, plan.at_once)
        else:
            deadline = started + plan.patience * budget.seconds
            quadrature, about_run = _quadrature(problem, plan, deadline)
            settings |= about_run
            values = torch.tensor(quadrature.nodes)
        num_products = operator.num_products + (problem.reduced.num_products if problem.reduced else 0)
    top = float(values.abs().max()) if len(values) else 0.0
    about: dict[str, Any] = {
        "matrix": "hessian",
        "method": "exact" if exact else "lanczos",
        "num_samples": problem.num_samples,
        "num_products": num_products,
        "seconds": time.perf_counter() - started,
        "resolution": RESOLUTION.get(operator.dtype, 1e-2) * top,
        "settings": {"dtype": dtype_name(operator.dtype), "mode": measured.mode, "live_coordinates": live} | settings,
    }
    about["settings"] |= about_masks(operator.active)
    if problem.note:
        about["settings"]["note"] = problem.note
    num_params = num_active(parameters, operator.active)
    if quadrature is None:
        return Spectrum.from_eigenvalues(values, num_params, **about)
    return Spectrum.from_quadrature(quadrature, num_params, **about)


def _check_room(live: int, memory: float) -> None:
    """Refuse a matrix that does not fit: only where the exact spectrum is insisted on."""
    if (needed := 8 * GRAMS * live**2) > memory:
        raise MeasurementError(
            f"The Hessian on {live} coordinates with a nonzero row takes {in_mib(needed)} to decompose, and "
            f"{in_mib(memory)} are allowed. Use method='lanczos', choose params=..., or raise max_memory."
        )


def _all_eigenvalues(problem: HessianProblem, at_once: int) -> Tensor:
    """(d,) of the dense Hessian on the live coordinates."""
    rows = finite(problem.operator.dense(problem.live, at_once))
    problem.check_symmetry(float((rows - rows.T).norm()) / max(float(rows.norm()), 1e-300))
    announce_eigenvalues(len(rows))
    values: Tensor = torch.linalg.eigvalsh(0.5 * (rows + rows.T))
    return values


def _quadrature(
    problem: HessianProblem, plan: HessianPlan, deadline: float
) -> tuple[LanczosQuadrature, dict[str, Any]]:
    """One Lanczos run from the probe, and what a record says of it.

    In parameter space the probe's product is there already, and coordinates with zero rows are left out of the vectors.
    """
    reduced = problem.reduced
    if reduced is None:
        matvec, start, first = problem.on_live()
        dim = problem.num_live
    else:
        matvec, start, first = reduced.matvec, reduced.restrict(problem.probe), None
        dim = reduced.dim
    storage = torch.float16 if plan.basis == "float16" and start.dtype.itemsize > 2 else None
    room = int(min(plan.basis_bytes / (len(start) * (storage or start.dtype).itemsize), plan.num_steps))
    num_steps = min(max(room, 2), dim)
    problem.forget_vectors()
    with part(deadline=deadline):
        run = lanczos(
            matvec,
            start,
            num_steps,
            first_product=first,
            storage=storage,
            reorthogonalise=plan.basis != "none",
            stop=lambda done: done >= LEAST_STEPS and time.perf_counter() > deadline,
        )
    problem.check_symmetry(run.asymmetry)
    complete = run.breakdown or run.num_products >= dim
    settings: dict[str, Any] = {"num_steps": run.num_products}
    if run.num_products < plan.num_steps and not complete:
        cause = "the clock" if run.num_products < num_steps else "the memory"
        settings["budget"] = ended_early(cause, run.num_products, plan.num_steps, plan.why)
    if reduced is not None:
        settings["range_dimensions"] = reduced.dim
    merge = COPIES if plan.basis == "none" else 0.0
    return LanczosQuadrature(run.alpha, run.beta, dim, complete, merge), settings


def check_method(method: str) -> None:
    """Refuse an unknown method."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}.")
