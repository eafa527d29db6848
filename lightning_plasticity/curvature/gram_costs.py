"""What a GGN or NTK costs by each route, from trials on few samples: bytes at the peak, and seconds."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.gram import assemble
from lightning_plasticity.curvature.gram_measure import Matrix, collected_rows, columns_per_sample, scaled_roots
from lightning_plasticity.curvature.hessian_plan import SECOND_ORDER
from lightning_plasticity.curvature.measured import Measured, require_outputs
from lightning_plasticity.curvature.memory import GraphMeter
from lightning_plasticity.curvature.output_jacobian import DualOperator, OutputJacobian

# A Gram matrix is formed for Lanczos up to this size: a product with it then costs less than one with the network, and
# its columns cost fewer backward passes than the steps would.
DENSE_ROWS = 10_000
DENSE_COLUMNS = 64
TRIALS = (4, 16)  # samples that the calibration measures on
GRAMS = 3  # times the Gram matrix: itself, and what its decomposition needs; or a copy, for Lanczos
VECTORS = 4  # of P coordinates: a snapshot, and the gradients that the shortcuts are checked by
ROOTS = 3  # times the outputs in float64: a root, and what a product with it makes
TIMED_ROWS = 500  # size of the matrix whose decomposition is timed
LEAST_ROW_BYTES = 2**22


@dataclass(frozen=True)
class Problem:
    """Sizes of what is to be measured.

    Attributes:
        samples: N, in all batches.
        rows_each: Gram rows of a sample, at most.
        outputs_each: outputs of a sample, at most.
        num_batches: batches that hold the samples.
        graph: bytes of the forward graphs of all samples.
        num_params: P.
        itemsize: bytes of a parameter.
    """

    samples: int
    rows_each: int
    outputs_each: int
    num_batches: int
    graph: float
    num_params: int
    itemsize: int

    def rows(self, samples: int) -> int:
        """M of so many samples."""
        return samples * self.rows_each

    def dense(self, samples: int) -> bool:
        """Whether an estimate may be on the Gram matrix."""
        return self.rows(samples) <= min(DENSE_ROWS, self.num_params) and self.rows_each <= DENSE_COLUMNS


class Costs(ABC):
    """Of one route; infinite where it cannot be taken."""

    @abstractmethod
    def memory(self, samples: int, steps: int) -> float:
        """Bytes at the peak."""

    @abstractmethod
    def seconds(self, samples: int, steps: int) -> float:
        """Of the whole measurement."""


@dataclass(frozen=True)
class MatrixCosts(Costs):
    """Of factors in proportion to samples, of their Gram matrix to the square, of its decomposition to the cube."""

    problem: Problem
    factor_bytes: float  # per sample
    linear: float  # seconds per sample
    square: float  # seconds per squared sample
    decomposition: float  # seconds per cubed row
    explicit: bool = False  # whether some parameters have no shortcut

    def memory(self, samples: int, steps: int) -> float:
        """Bytes at the peak."""
        fixed = VECTORS * self.problem.num_params * self.problem.itemsize + LEAST_ROW_BYTES
        return fixed + samples * self.factor_bytes + 8 * GRAMS * self.problem.rows(samples) ** 2

    def seconds(self, samples: int, steps: int) -> float:
        """Of the rows and the decomposition."""
        return self.building(samples) + self.decomposition * self.problem.rows(samples) ** 3

    def building(self, samples: int) -> float:
        """Seconds until the Gram matrix is there."""
        return self.linear * samples + self.square * samples**2


@dataclass(frozen=True)
class DenseLanczosCosts(Costs):
    """Of Lanczos on a Gram matrix."""

    matrix: MatrixCosts
    sweep: float  # seconds per entry of a matrix that is read

    def memory(self, samples: int, steps: int) -> float:
        """Bytes at the peak; infinite where the matrix is too large, or its rows too long, to be worth it."""
        problem = self.matrix.problem
        if self.matrix.explicit or not problem.dense(samples):
            return math.inf
        return self.matrix.memory(samples, steps) + steps * problem.rows(samples) * problem.itemsize

    def seconds(self, samples: int, steps: int) -> float:
        """Of the matrix and the products with it."""
        rows = self.matrix.problem.rows(samples)
        return self.matrix.building(samples) + self.sweep * steps * rows * (rows + steps)


@dataclass(frozen=True)
class FreeLanczosCosts(Costs):
    """Of Lanczos by products with the network, while the graphs of all batches are kept."""

    problem: Problem
    build: float = 0.0  # seconds per sample
    product: float = 0.0  # seconds per sample and step
    sweep: float = 0.0  # seconds per entry of the basis that is read

    def memory(self, samples: int, steps: int) -> float:
        """Bytes at the peak. Each batch keeps a gradient, whose graph is what products go through."""
        problem, share = self.problem, samples / self.problem.samples
        vectors = VECTORS + math.ceil(problem.num_batches * share)
        roots = 8 * ROOTS * samples * problem.outputs_each
        fixed = vectors * problem.num_params * problem.itemsize + SECOND_ORDER * problem.graph * share + roots
        return fixed + steps * self._vector(samples) * problem.itemsize

    def seconds(self, samples: int, steps: int) -> float:
        """Of the graphs, the products and two passes over a basis that grows from 1 to ``steps``."""
        vectors = self.sweep * steps**2 * self._vector(samples)
        return samples * (self.build + steps * self.product) + vectors

    def _vector(self, samples: int) -> int:
        """Coordinates of a vector of the recurrence."""
        return min(self.problem.rows(samples), self.problem.num_params)


def problem_of(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> Problem:
    """The sizes, from one forward pass on all batches."""
    total = rows_each = outputs_each = graph = 0
    kept = list(measured.module.parameters())
    with measured.open() as closure:
        for index, batch in enumerate(measured.batches):
            with GraphMeter(kept) as meter:
                loss = require_outputs(closure(batch, index))
            total, graph = total + loss.num_samples, graph + meter.num_bytes
            rows_each = max(rows_each, columns_per_sample(loss, matrix))
            outputs_each = max(outputs_each, loss.outputs[0].numel())
            del loss  # the graph, before the next one is there
    size = sum(parameter.numel() for parameter in parameters)
    itemsize = parameters[0].dtype.itemsize
    return Problem(total, rows_each, outputs_each, len(measured.batches), graph, size, itemsize)


def matrix_costs(
    problem: Problem, measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]
) -> MatrixCosts | None:
    """From trials on 4 and 16 samples; None where the data cannot be cut, or the measurement will fail anyway."""
    few, more = TRIALS
    try:
        _matrix_trial(measured.first(few), matrix, parameters)  # what happens once only
        few, first, _, _ = _matrix_trial(measured.first(few), matrix, parameters)
        more, second, factor_bytes, explicit = _matrix_trial(measured.first(more), matrix, parameters)
    except Exception:  # a step that wants batches of its own size
        return None
    # t = a n + b n^2 through both, neither of them negative.
    square = max(0.0, (second / more - first / few) / max(1, more - few))
    linear = max(0.0, second / more - square * more)
    rows = torch.arange(TIMED_ROWS, dtype=torch.float64, device=parameters[0].device)
    kernel = torch.exp(-(rows[:, None] - rows).abs())
    decomposition = _seconds(lambda: torch.linalg.eigvalsh(kernel)) / TIMED_ROWS**3
    return MatrixCosts(problem, factor_bytes / more, linear, square, decomposition, explicit)


def free_costs(
    problem: Problem, measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]
) -> FreeLanczosCosts | None:
    """From a trial on 16 samples; None as in ``matrix_costs``."""
    few = measured.first(min(TRIALS[-1], problem.samples))
    try:
        _free_trial(few, matrix, parameters)  # what happens once only
        samples, build, product = _free_trial(few, matrix, parameters)
    except Exception:  # a step that wants batches of its own size
        return None
    return FreeLanczosCosts(problem, build / samples, product / samples, sweep_seconds(parameters[0]))


def sweep_seconds(like: Tensor) -> float:
    """Seconds for each entry of a matrix in a product with it, from one that no cache holds."""
    table = torch.zeros(8, 2**20, dtype=like.dtype, device=like.device)
    return min(_seconds(lambda: torch.mv(table, table[0])) for _ in range(3)) / table.numel()


def _matrix_trial(
    measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]
) -> tuple[int, float, float, bool]:
    """Samples, seconds, bytes of graphs and factors, and whether some parameters have no shortcut."""
    started = time.perf_counter()
    kept = list(measured.module.parameters())
    with GraphMeter(kept) as meter, collected_rows(measured, matrix, parameters) as rows:
        factors = sum(batch.num_bytes for batch in rows.batches)
        gram = assemble(rows.batches)
        _wait(gram.matrix)
    return gram.num_samples, time.perf_counter() - started, factors + meter.num_bytes, bool(gram.general)


def _free_trial(measured: Measured, matrix: Matrix, parameters: Sequence[nn.Parameter]) -> tuple[int, float, float]:
    """Samples, seconds until products can be made, and seconds of one."""
    started = time.perf_counter()
    with measured.open() as closure:
        losses = [require_outputs(closure(batch, index)) for index, batch in enumerate(measured.batches)]
        jacobian = OutputJacobian([loss.outputs for loss in losses], parameters)
        operator = DualOperator(jacobian, scaled_roots(losses, matrix))
        vector = torch.ones(operator.dim, dtype=jacobian.dtype, device=jacobian.device)
        _wait(vector)
        build = time.perf_counter() - started
        product = _seconds(lambda: operator.matvec(vector))
    return sum(loss.num_samples for loss in losses), build, product


def _seconds(function: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    _wait(function())
    return time.perf_counter() - started


def _wait(result: Tensor) -> None:
    """Until a GPU has computed it."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
