"""How to measure a GGN or NTK within a budget: exact or estimated, on how many samples, in how many steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_plasticity.curvature.budget import Budget, in_mib
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.matrix import MAX_ROW_BYTES, assemble
from lightning_plasticity.curvature.gram.measure import Matrix, collected_rows, columns_per_sample
from lightning_plasticity.curvature.hessian.costs import Costs, counted, ladder, timed
from lightning_plasticity.curvature.measured import Measured, on_few, require_outputs
from lightning_plasticity.curvature.memory import GraphMeter
from lightning_plasticity.curvature.samples import in_whole_batches, num_samples
from lightning_plasticity.nn.batches import batch_size
from lightning_plasticity.nn.precision import measured_in

MIN_SAMPLES = 32  # an exact spectrum of fewer samples says less than an estimate on all of them
LEAST_SAMPLES = 8
TRIALS = (4, 16)  # samples that the calibration measures on
GRAMS = 3  # times the Gram matrix: itself, and what its decomposition needs
VECTORS = 4  # of P coordinates: a snapshot, and the gradients that the shortcuts are checked by
TIMED_ROWS = 500  # size of the matrix whose decomposition is timed
SMALL_WORK = 1e9  # coordinates times rows, that no trial is made for
LEAST_ROW_BYTES = 2**18
DENSE_ROWS = 10_000  # an estimate forms the Gram matrix up to this size: a product with it then costs less


@dataclass(frozen=True)
class GramPlan:
    """What a measurement will do.

    Attributes:
        exact: whether the Gram matrix is decomposed; else Lanczos estimates.
        num_samples: N, the first samples of the probe data, as its batches count them: a sequence is one, also where
            the step gives each of its tokens to the loss as a sample of its own.
        rows_each: Gram rows of a sample, at most.
        num_steps: Lanczos steps of an estimate.
        row_bytes: what explicit gradient rows may take at a time; None for 2 GiB.
        dense_rows: rows up to which an estimate may form the Gram matrix.
        cut: whether the batches hold no other samples while it is made, either.
        reason: why it is exact, or is not.
        why: what the budget changed; empty where nothing.
    """

    exact: bool
    num_samples: int
    rows_each: int
    num_steps: int = 0
    row_bytes: int | None = None
    dense_rows: int = 0
    cut: bool = False
    reason: str = ""
    why: str = ""

    @property
    def num_rows(self) -> int:
        """M, at most."""
        return self.num_samples * self.rows_each


def plan_gram(
    measured: Measured,
    matrix: Matrix,
    parameters: Sequence[nn.Parameter],
    max_rows: int | None,
    num_steps: int,
    budget: Budget,
    exact: bool | None = None,
) -> GramPlan:
    """Choose within a budget. What is small by a count of operations and bytes is done as asked, without a trial.

    Args:
        measured: what to measure on.
        matrix: which matrix.
        parameters: the coordinates.
        max_rows: bound on the Gram matrix to decompose; None for no bound.
        num_steps: Lanczos steps of an estimate.
        budget: bounds on time and memory.
        exact: whether to insist on the exact spectrum or on an estimate; None to choose.

    Raises:
        MeasurementError: when not even a few samples fit the memory.
    """
    total, rows_each = _size(measured, matrix)
    fit = total if max_rows is None else min(total, max_rows // max(1, rows_each))
    if exact is None:
        exact = max_rows is None or fit >= min(total, MIN_SAMPLES)
    reason = _reason(exact, fit, total, max_rows)
    wanted = GramPlan(exact, fit if exact else total, rows_each, num_steps, reason=reason)
    if not wanted.num_rows:
        return wanted
    plan = _exact_plan if exact else _estimate_plan
    return plan(measured, matrix, parameters, wanted, total, budget)


def _exact_plan(
    measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter], wanted: GramPlan, total: int, budget: Budget
) -> GramPlan:
    """Halve the samples until the exact spectrum is affordable."""
    num_params, itemsize = sum(parameter.numel() for parameter in parameters), measured_in(parameters[0].dtype).itemsize
    memory, rows_each = budget.memory(parameters[0].device), wanted.rows_each
    fixed = VECTORS * num_params * itemsize
    light = counted(measured, operations=budget.max_seconds is not None)
    graph, product = light.graph / light.samples, light.product / light.samples
    factors = num_params * wanted.num_rows * itemsize + (1 + rows_each) * wanted.num_samples * graph
    known = 8 * GRAMS * wanted.num_rows**2 + fixed + (total + (1 + rows_each) * wanted.num_samples) * graph
    if budget.max_seconds is None and known + LEAST_ROW_BYTES <= memory / 2:  # explicit rows take what is left
        return wanted if memory - known >= MAX_ROW_BYTES else replace(wanted, row_bytes=int(memory - known))
    small = num_params * wanted.num_rows <= SMALL_WORK
    small = small and (3 + rows_each) * wanted.num_samples * product <= budget.seconds
    if small and 8 * GRAMS * wanted.num_rows**2 + fixed + total * graph + factors <= memory / 2:
        return wanted
    costs, divisible = _trials(measured, matrix, parameters)
    cut = divisible and measured.mode != "as_is"  # batch statistics are those of whole batches
    # A loss that the first few samples do not have, or whose step takes no others, is measured on a batch at least.
    least = LEAST_SAMPLES if divisible else batch_size(measured.batches[0])
    samples = wanted.num_samples
    while True:
        needed = fixed + costs.memory(samples, rows_each)
        if samples == wanted.num_samples or not cut:
            needed += (total - samples) * graph  # the forward pass is of all samples
        fits = needed + LEAST_ROW_BYTES <= memory
        if fits and (samples <= least or costs.seconds(samples, rows_each) <= budget.seconds):
            break
        if samples == 1:
            raise _refusal(matrix, num_params, needed + LEAST_ROW_BYTES, memory)
        samples = max(1, samples // 2)
    row_bytes = int(min(MAX_ROW_BYTES, max(LEAST_ROW_BYTES, memory - needed)))
    if samples == wanted.num_samples:
        return replace(wanted, row_bytes=row_bytes)
    why = budget.reason([f"{samples} of {total} samples"], memory)
    reason = f"{wanted.reason}; of these {samples} within the budget"
    return replace(wanted, num_samples=samples, row_bytes=row_bytes, cut=cut, why=why, reason=reason)


def _estimate_plan(
    measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter], wanted: GramPlan, total: int, budget: Budget
) -> GramPlan:
    """Fewer samples and steps until an estimate by products is affordable; they cost what the Hessian's do."""
    num_params, itemsize = sum(parameter.numel() for parameter in parameters), measured_in(parameters[0].dtype).itemsize
    memory = budget.memory(parameters[0].device)

    def needed(samples: int, steps: int) -> float:
        vector = min(num_params, samples * wanted.rows_each)
        return costs.building(costs.graph(samples)) + (steps + 4) * vector * itemsize

    def affordable(samples: int, steps: int) -> bool:
        within = costs.seconds(samples, steps, "none", None) <= budget.seconds
        return within and needed(samples, steps) <= memory

    dense = int(min(DENSE_ROWS, (memory / (2 * itemsize)) ** 0.5))
    costs = Costs([counted(measured)], num_params, itemsize)
    if affordable(total, wanted.num_steps):
        return replace(wanted, dense_rows=dense)
    trials, divisible = timed(measured, parameters, memory / max(costs.graph(1), 1.0), in_range=0)
    costs = Costs(trials, num_params, itemsize)
    fitting = None
    for samples, steps in ladder(total, wanted.num_steps):
        samples = samples if divisible else in_whole_batches(measured.batches, samples)
        if needed(samples, steps) <= memory:
            fitting = samples, steps
            if affordable(samples, steps):
                break
    if fitting is None:
        raise _refusal(matrix, num_params, needed(samples, steps), memory)
    samples, steps = fitting
    changes = [f"{samples} of {total} samples"] if samples < total else []
    changes += [f"{steps} of {wanted.num_steps} Lanczos steps"] if steps < wanted.num_steps else []
    why = budget.reason(changes, memory)
    return replace(wanted, num_samples=samples, num_steps=steps, dense_rows=dense, cut=samples < total, why=why)


def _refusal(matrix: Matrix, num_params: int, needed: float, memory: float) -> MeasurementError:
    return MeasurementError(
        f"The {matrix} of {num_params} parameters takes {in_mib(needed)} at least, and {in_mib(memory)} are allowed. "
        "Raise max_memory, or choose params=...."
    )


@dataclass(frozen=True)
class _Costs:
    """Bytes and seconds: of factors in proportion to samples, of the Gram matrix to their square, then its cube."""

    factor_bytes: float  # per sample
    linear: float  # seconds per sample
    square: float  # seconds per squared sample
    decomposition: float  # seconds per cubed row

    def memory(self, samples: int, rows_each: int) -> float:
        return samples * self.factor_bytes + 8 * GRAMS * (samples * rows_each) ** 2

    def seconds(self, samples: int, rows_each: int) -> float:
        building = self.linear * samples + self.square * samples**2
        return building + self.decomposition * (samples * rows_each) ** 3


def _trials(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> tuple[_Costs, bool]:
    """From two sizes, or from the whole first batch where data cannot be cut."""
    few, more = (min(size, num_samples(measured.batches)) for size in TRIALS)
    # The first one is for what happens once only.
    found, divisible = on_few(measured, (few, few, more), lambda part: _trial(part, matrix, parameters))
    (first, _, few), (second, factor_bytes, more) = found[max(0, len(found) - 2)], found[-1]
    # t = a n + b n^2 through both, neither of them negative.
    square = max(0.0, (second / more - first / few) / (more - few)) if more > few else 0.0
    linear = max(0.0, second / more - square * more)
    rows = torch.arange(TIMED_ROWS, dtype=torch.float64, device=parameters[0].device)
    kernel = torch.exp(-(rows[:, None] - rows).abs())
    decomposition = _seconds(lambda: torch.linalg.eigvalsh(kernel)) / TIMED_ROWS**3
    return _Costs(factor_bytes / more, linear, square, decomposition), divisible


def _trial(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> tuple[float, float, int]:
    """Seconds, bytes of graphs and factors, and samples."""
    started = time.perf_counter()
    kept = list(measured.module.parameters())
    with GraphMeter(kept) as meter, collected_rows(measured, matrix, parameters) as rows:
        factors = sum(batch.num_bytes for batch in rows.batches)
        assemble(rows.batches)
    return time.perf_counter() - started, factors + meter.num_bytes, num_samples(measured.batches)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _size(measured: Measured, matrix: Matrix) -> tuple[int, int]:
    """Samples in all batches, and the most Gram rows that one of them has: of all its tokens, where it has many."""
    total = rows_each = 0
    with measured.open() as closure:
        for index, batch in enumerate(measured.batches):
            loss = require_outputs(closure(batch, index))
            size = batch_size(batch)
            total += size
            rows_each = max(rows_each, math.ceil(columns_per_sample(loss, matrix) * loss.num_samples / size))
    return total, rows_each


def _reason(exact: bool, fit: int, total: int, max_rows: int | None) -> str:
    """Why the spectrum is exact, or is not."""
    if max_rows is None:
        return "exact: max_rows sets no bound" if exact else "lanczos: asked for"
    which = "all" if fit == total else f"the first {fit} of"
    if exact:
        return f"exact: the rows of {which} {total} samples fit max_rows={max_rows}"
    return f"lanczos: the rows of only {fit} of {total} samples fit max_rows={max_rows}"
