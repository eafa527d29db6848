"""How to measure a GGN or NTK within a budget: exact or estimated, on how many samples, in how many steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_plasticity.curvature.budget import Budget, in_mib
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram import MAX_ROW_BYTES
from lightning_plasticity.curvature.gram_costs import (
    GRAMS,
    LEAST_ROW_BYTES,
    VECTORS,
    Costs,
    DenseLanczosCosts,
    FreeLanczosCosts,
    Problem,
    free_costs,
    matrix_costs,
    problem_of,
    sweep_seconds,
)
from lightning_plasticity.curvature.gram_measure import Matrix
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.samples import num_samples

LANCZOS_STEPS = 120
MIN_SAMPLES = 32  # an exact spectrum of fewer samples says less than an estimate on all of them
LEAST_SAMPLES, LEAST_STEPS = 8, 20
SMALL_WORK = 1e9  # coordinates times rows, that no trial is made for
SMALL_PRODUCTS = 1e10  # coordinates times samples times steps, that no trial is made for


@dataclass(frozen=True)
class GramPlan:
    """What a measurement will do.

    Attributes:
        exact: whether the Gram matrix is decomposed; else Lanczos estimates.
        num_samples: N, the first samples of the probe data.
        rows_each: Gram rows of a sample, at most.
        row_bytes: what explicit gradient rows may take at a time; None for 2 GiB.
        reason: why it is exact, or is not.
        why: what the budget changed; empty where nothing.
        num_steps: the most Lanczos steps; None for as many as asked for.
        dense: whether Lanczos may run on the Gram matrix.
        cut: how many samples of the probe data an estimate takes, where the loss may count them otherwise (each
            position of a sequence, say); None for all.
    """

    exact: bool
    num_samples: int
    rows_each: int
    row_bytes: int | None = None
    reason: str = ""
    why: str = ""
    num_steps: int | None = None
    dense: bool = False
    cut: int | None = None

    @property
    def num_rows(self) -> int:
        """M, at most."""
        return self.num_samples * self.rows_each


def plan_gram(
    measured: Measured,
    matrix: Matrix,
    parameters: Sequence[nn.Parameter],
    max_rows: int | None,
    budget: Budget,
    exact: bool | None = None,
    num_steps: int = LANCZOS_STEPS,
) -> GramPlan:
    """Choose within a budget, from trials on few samples; small problems are not tried, and done as asked.

    Given up first are samples, down to 32, then Lanczos steps, down to 20, then samples again. Where the data cannot
    be cut, all of it is measured.

    Args:
        measured: what to measure on.
        matrix: which matrix.
        parameters: the coordinates.
        max_rows: bound on the Gram matrix to decompose; None for no bound.
        budget: bounds on time and memory.
        exact: whether to insist on the exact spectrum or on an estimate; None to choose.
        num_steps: Lanczos steps that are wanted.

    Raises:
        MeasurementError: when not even a few samples fit the memory.
    """
    problem = problem_of(measured, matrix, parameters)
    total = problem.samples
    fit = total if max_rows is None else min(total, max_rows // max(1, problem.rows_each))
    if exact is None:
        exact = max_rows is None or fit >= min(total, MIN_SAMPLES)
    reason = _reason(exact, fit, total, max_rows)
    dense = not exact and problem.dense(total)
    wanted = GramPlan(exact, fit if exact else total, problem.rows_each, reason=reason, dense=dense)
    if not wanted.num_rows:
        return wanted  # no sample fits, which the measurement refuses; or the loss has no curvature
    memory = budget.memory(parameters[0].device)
    if _matrix_is_small(problem, wanted.num_rows, memory) and (exact or dense):
        return wanted
    if exact:
        costs = matrix_costs(problem, measured, matrix, parameters)
        routes: list[Costs] = [] if costs is None else [costs]
    elif _products_are_few(problem, num_steps, memory):
        return wanted
    else:
        routes = _estimates(problem, measured, matrix, parameters, budget)
    return _within(wanted, problem, routes, measured, 0 if exact else num_steps, budget, memory)


def _matrix_is_small(problem: Problem, num_rows: int, memory: float) -> bool:
    """Whether a Gram matrix, even of explicit rows, is too small to make trials for."""
    rows = problem.num_params * problem.itemsize * (num_rows + VECTORS)
    return problem.num_params * num_rows <= SMALL_WORK and 8 * GRAMS * num_rows**2 + rows <= memory / 2


def _products_are_few(problem: Problem, num_steps: int, memory: float) -> bool:
    """Whether Lanczos by products is too small to make trials for."""
    small = problem.num_params * problem.samples * num_steps <= SMALL_PRODUCTS
    return small and FreeLanczosCosts(problem).memory(problem.samples, num_steps) <= memory / 2


def _estimates(
    problem: Problem, measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter], budget: Budget
) -> list[Costs]:
    """The routes to an estimate, the better one first; without a bound on time the second is weighed, not timed."""
    routes: list[Costs] = []
    worth_it = problem.dense(problem.samples if budget.max_seconds is None else MIN_SAMPLES)
    if worth_it and (costs := matrix_costs(problem, measured, matrix, parameters)) is not None:
        routes.append(DenseLanczosCosts(costs, sweep_seconds(parameters[0])))
    untimed = FreeLanczosCosts(problem)
    free = untimed if budget.max_seconds is None else free_costs(problem, measured, matrix, parameters)
    return routes if free is None else [*routes, free]


def _within(
    wanted: GramPlan,
    problem: Problem,
    routes: Sequence[Costs],
    measured: Measured,
    num_steps: int,
    budget: Budget,
    memory: float,
) -> GramPlan:
    """The plan with the most samples and steps by any of the routes; without a route, or a cut, what is wanted.

    Raises:
        MeasurementError: when not even one sample fits the memory.
    """
    found = _most(routes, wanted.num_samples, num_steps, budget.seconds, memory)
    if routes and found is None and _evaluates(measured.first(1)):
        needed = min(costs.memory(1, min(num_steps, LEAST_STEPS)) for costs in routes)
        raise MeasurementError(
            f"A spectrum over {problem.num_params} parameters takes {in_mib(needed)} on one sample, and "
            f"{in_mib(memory)} are allowed. Raise max_memory, or choose params=...."
        )
    if found is None:
        return wanted
    costs, samples, steps = found
    plan = replace(wanted, num_samples=samples)
    if wanted.exact:
        left = memory - costs.memory(samples, 0) + LEAST_ROW_BYTES
        plan = replace(plan, row_bytes=int(min(MAX_ROW_BYTES, left)))
    else:
        cut = max(1, samples * num_samples(measured.batches) // problem.samples)
        if samples < problem.samples and not _evaluates(measured.first(cut)):
            return wanted
        plan = replace(plan, dense=isinstance(costs, DenseLanczosCosts))
        plan = replace(plan, cut=cut) if samples < problem.samples else plan
        plan = replace(plan, num_steps=steps) if steps < num_steps else plan
    return replace(plan, why=_why(wanted, plan, problem.samples, num_steps, budget, memory))


def _most(
    routes: Sequence[Costs], samples: int, num_steps: int, seconds: float, memory: float
) -> tuple[Costs, int, int] | None:
    """The first route, samples and steps within the bounds; of the least samples only memory is asked."""
    for fewer, steps in _ladder(samples, num_steps):
        for costs in routes:
            fits = costs.memory(fewer, steps) <= memory
            if fits and (costs.seconds(fewer, steps) <= seconds or fewer <= LEAST_SAMPLES):
                return costs, fewer, steps
    return None


def _ladder(samples: int, steps: int) -> Iterator[tuple[int, int]]:
    """Samples and steps, from what is wanted to the least."""
    yield samples, steps
    while samples > MIN_SAMPLES:
        samples //= 2
        yield samples, steps
    while steps > LEAST_STEPS:
        steps = max(LEAST_STEPS, steps // 2)
        yield samples, steps
    while samples > 1:
        samples //= 2
        yield samples, steps


def _evaluates(measured: Measured) -> bool:
    """Whether there is a loss on part of the data: a step may want batches of its own size."""
    try:
        with measured.open() as closure:
            for index, batch in enumerate(measured.batches):
                closure(batch, index)
    except Exception:
        return False
    return True


def _why(wanted: GramPlan, plan: GramPlan, total: int, num_steps: int, budget: Budget, memory: float) -> str:
    """What the budget changed, and for what; empty where nothing."""
    changes = [f"{plan.num_samples} of {total} samples"] if plan.num_samples < wanted.num_samples else []
    if plan.num_steps is not None:
        changes.append(f"{plan.num_steps} of {num_steps} Lanczos steps")
    if not changes:
        return ""
    bounds = in_mib(memory) if budget.seconds == math.inf else f"{budget.seconds:g} s and {in_mib(memory)}"
    return f"{', '.join(changes)}, to stay within {bounds}"


def _reason(exact: bool, fit: int, total: int, max_rows: int | None) -> str:
    """Why the spectrum is exact, or is not."""
    if max_rows is None:
        return "exact: max_rows sets no bound" if exact else "lanczos: asked for"
    which = "all" if fit == total else f"the first {fit} of"
    if exact:
        return f"exact: the rows of {which} {total} samples fit max_rows={max_rows}"
    return f"lanczos: the rows of only {fit} of {total} samples fit max_rows={max_rows}"
