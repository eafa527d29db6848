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
from lightning_plasticity.curvature.gram import MAX_ROW_BYTES, assemble
from lightning_plasticity.curvature.gram_measure import Matrix, collected_rows, columns_per_sample
from lightning_plasticity.curvature.measured import Measured, require_outputs
from lightning_plasticity.curvature.memory import GraphMeter

MIN_SAMPLES = 32  # an exact spectrum of fewer samples says less than an estimate on all of them
LEAST_SAMPLES = 8
TRIALS = (4, 16)  # samples that the calibration measures on
GRAMS = 3  # times the Gram matrix: itself, and what its decomposition needs
VECTORS = 4  # of P coordinates: a snapshot, and the gradients that the shortcuts are checked by
TIMED_ROWS = 500  # size of the matrix whose decomposition is timed
SMALL_WORK = 1e9  # coordinates times rows, that no trial is made for
LEAST_ROW_BYTES = 2**22


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
    """

    exact: bool
    num_samples: int
    rows_each: int
    row_bytes: int | None = None
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
    budget: Budget,
    exact: bool | None = None,
) -> GramPlan:
    """Choose within a budget, from two trials on few samples; small problems are not tried, and done as asked.

    Args:
        measured: what to measure on.
        matrix: which matrix.
        parameters: the coordinates.
        max_rows: bound on the Gram matrix to decompose; None for no bound.
        budget: bounds on time and memory.
        exact: whether to insist on the exact spectrum or on an estimate; None to choose.

    Raises:
        MeasurementError: when not even a few samples fit the memory.
    """
    total, rows_each = _size(measured, matrix)
    fit = total if max_rows is None else min(total, max_rows // max(1, rows_each))
    if exact is None:
        exact = max_rows is None or fit >= min(total, MIN_SAMPLES)
    wanted = GramPlan(exact, fit if exact else total, rows_each, reason=_reason(exact, fit, total, max_rows))
    num_params = sum(parameter.numel() for parameter in parameters)
    memory = budget.memory(parameters[0].device)
    fixed = VECTORS * num_params * parameters[0].dtype.itemsize
    rows_bytes = num_params * wanted.num_rows * parameters[0].dtype.itemsize
    small = num_params * wanted.num_rows <= SMALL_WORK
    roomy = 8 * GRAMS * wanted.num_rows**2 + fixed + rows_bytes <= memory / 2
    if not exact or fit < 1 or (small and roomy):
        return wanted  # a matrix-free estimate takes what a Lanczos run takes, and no matrix
    costs = _trials(measured, matrix, parameters)
    if costs is None:
        return wanted
    samples = wanted.num_samples
    while True:
        needed = fixed + costs.memory(samples, rows_each)
        if needed + LEAST_ROW_BYTES <= memory and costs.seconds(samples, rows_each) <= budget.seconds:
            break
        if samples <= LEAST_SAMPLES and needed + LEAST_ROW_BYTES <= memory:
            break
        if samples == 1:
            raise MeasurementError(
                f"The {matrix} of {num_params} parameters takes {in_mib(needed)} on one sample, and {in_mib(memory)} "
                "are allowed. Raise max_memory, or choose params=...."
            )
        samples = max(1, samples // 2)
    row_bytes = int(min(MAX_ROW_BYTES, max(LEAST_ROW_BYTES, memory - needed)))
    plan = replace(wanted, num_samples=samples, row_bytes=row_bytes)
    if samples == wanted.num_samples:
        return plan
    bounds = in_mib(memory) if budget.seconds == math.inf else f"{budget.seconds:g} s and {in_mib(memory)}"
    return replace(plan, why=f"{samples} of {total} samples, to stay within {bounds}")


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


def _trials(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> _Costs | None:
    """None where the data cannot be cut."""
    few, more = TRIALS
    try:
        _trial(measured.first(few), matrix, parameters)  # what happens once only
        first, _ = _trial(measured.first(few), matrix, parameters)
        second, factor_bytes = _trial(measured.first(more), matrix, parameters)
    except MeasurementError:
        raise
    except Exception:  # a step that wants batches of its own size
        return None
    # t = a n + b n^2 through both, neither of them negative.
    square = max(0.0, (second / more - first / few) / (more - few))
    linear = max(0.0, second / more - square * more)
    rows = torch.arange(TIMED_ROWS, dtype=torch.float64, device=parameters[0].device)
    kernel = torch.exp(-(rows[:, None] - rows).abs())
    decomposition = _seconds(lambda: torch.linalg.eigvalsh(kernel)) / TIMED_ROWS**3
    return _Costs(factor_bytes / more, linear, square, decomposition)


def _trial(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> tuple[float, float]:
    """Seconds, and bytes of graphs and factors."""
    started = time.perf_counter()
    kept = list(measured.module.parameters())
    with GraphMeter(kept) as meter, collected_rows(measured, matrix, parameters) as rows:
        factors = sum(batch.num_bytes for batch in rows.batches)
        assemble(rows.batches)
    return time.perf_counter() - started, factors + meter.num_bytes


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _size(measured: Measured, matrix: Matrix) -> tuple[int, int]:
    """Samples in all batches, and the most Gram rows that one of them has."""
    total = rows_each = 0
    with measured.open() as closure:
        for index, batch in enumerate(measured.batches):
            loss = require_outputs(closure(batch, index))
            total += loss.num_samples
            rows_each = max(rows_each, columns_per_sample(loss, matrix))
    return total, rows_each


def _reason(exact: bool, fit: int, total: int, max_rows: int | None) -> str:
    """Why the spectrum is exact, or is not."""
    if max_rows is None:
        return "exact: max_rows sets no bound" if exact else "lanczos: asked for"
    which = "all" if fit == total else f"the first {fit} of"
    if exact:
        return f"exact: the rows of {which} {total} samples fit max_rows={max_rows}"
    return f"lanczos: the rows of only {fit} of {total} samples fit max_rows={max_rows}"
