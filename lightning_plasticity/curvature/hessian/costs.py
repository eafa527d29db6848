"""What measuring a Hessian costs: counted from one forward pass of a few samples, or timed in trials on a few more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plasticity.curvature.hessian.problem import opened
from lightning_plasticity.curvature.measured import Measured, on_few
from lightning_plasticity.curvature.memory import GraphMeter
from lightning_plasticity.curvature.samples import num_samples

Basis = Literal["full", "float16", "none"]

FEW_SAMPLES, FEW_STEPS = 128, 60  # what is given up last, and then in turns
LEAST_SAMPLES, LEAST_STEPS = 16, 20
FEW = 2  # samples whose forward pass is counted
TRIALS = (16, 64)  # samples that are timed
SECOND_ORDER = 2.2  # bytes of a differentiable gradient's graph over those of the forward pass: 1.5 to 1.9 measured
SLOW_RATE = 2.5e9  # operations of the forward pass that a slow core does in the time of a second's products
BYTE_WORK = 2  # operations that the elementwise work on a byte of the graph counts as
# Vectors of P coordinates that are held at most: a snapshot, the gradient and, while it is made, its parts, the probe
# and its product; then those of the recurrence, or in the Hessian's range the snapshot alone.
BUILD_VECTORS, RUN_VECTORS, RANGE_VECTORS = 6, 9, 2
EXACT_VECTORS = 3  # of a product of the exact route
GRAMS = 4  # times the exact route's matrix: the rows, their mean with the transpose, and what the solver needs
REBUILT = 1.7  # times that a product takes when graphs are made anew for it
RANGE_SHARE = 0.5  # of the coordinates; with longer vectors the route through the range does not pay
SWEEPS = {"full": 1.0, "float16": 2.0, "none": 0.0}  # times what a sweep over a basis in full precision takes


@dataclass(frozen=True)
class Trial:
    """What the measurement costs on some samples.

    Attributes:
        samples: N.
        build: seconds until the first product is there.
        product: seconds of one product in parameter space.
        graph: bytes of the graphs that are kept.
        range_size: coordinates of a vector in the Hessian's range; None where that route is not taken.
        range_product: seconds of a product there.
    """

    samples: int
    build: float
    product: float
    graph: float
    range_size: int | None = None
    range_product: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What trials on few samples say about more of them."""

    trials: Sequence[Trial]
    num_params: int
    itemsize: int
    sweep: float = 0.0  # seconds per coordinate and basis vector
    active: int | None = None  # coordinates that no mask switches off; None for all

    def vector(self, samples: int) -> int:
        """Coordinates of a vector of the recurrence."""
        last = self.trials[-1]
        if self.active is not None:
            return self.active
        if last.range_size is None:
            return self.num_params
        size = math.ceil(last.range_size / last.samples * samples)
        return size if size <= RANGE_SHARE * self.num_params else self.num_params

    def in_range(self, samples: int) -> bool:
        """Whether the route through the Hessian's range is taken."""
        return self.active is None and self.vector(samples) < self.num_params

    def basis(self, samples: int, steps: int, basis: Basis) -> int:
        """Bytes of the basis."""
        itemsize = {"full": self.itemsize, "float16": min(2, self.itemsize), "none": 0}[basis]
        return steps * self.vector(samples) * itemsize

    def graph(self, samples: int) -> float:
        """Bytes of the graphs of so many samples."""
        return self.trials[-1].graph / self.trials[-1].samples * samples

    def memory(self, samples: int, basis_bytes: float, graph: float) -> float:
        """Bytes at the peak: while the graphs are made, or during the run."""
        reduced = self.in_range(samples)
        run = RANGE_VECTORS * self.num_params + 6 * self.vector(samples) if reduced else RUN_VECTORS * self.num_params
        return max(self.building(graph), run * self.itemsize + basis_bytes + (0.0 if reduced else graph))

    def building(self, graph: float) -> float:
        """Bytes while the graphs are made."""
        return BUILD_VECTORS * self.num_params * self.itemsize + graph

    def product(self, samples: int) -> float:
        """Seconds of a product in parameter space."""
        return self._extrapolated(samples, lambda trial: trial.product)

    def seconds(self, samples: int, steps: int, basis: Basis, chunk: int | None) -> float:
        """Of the whole measurement by Lanczos."""
        reduced = self.in_range(samples)
        one = self._extrapolated(samples, lambda trial: trial.range_product) if reduced else self.product(samples)
        build = self._extrapolated(samples, lambda trial: trial.build)
        # Two passes over a basis that grows from 1 to ``steps``.
        vectors = steps**2 * self.vector(samples) * self.sweep * SWEEPS[basis]
        return build + steps * one * (1.0 if chunk is None else REBUILT) + vectors

    def affordable_exact(self, samples: int, room: float, seconds: float) -> float:
        """Live coordinates whose whole matrix fits so much room and time."""
        return min(math.sqrt(room / (8 * GRAMS)), seconds / max(self.product(samples), 1e-9))

    def products_at_once(self, part: int, room: float) -> float:
        """Products of the exact route that fit so much room; each holds gradients of all that the graph holds."""
        return room / (EXACT_VECTORS * self.num_params * self.itemsize + self.graph(part))

    def _extrapolated(self, samples: int, cost: Callable[[Trial], float]) -> float:
        """A straight line through the trials, and never less than in proportion where there is one only."""
        first, last = self.trials[0], self.trials[-1]
        rise = last.samples - first.samples
        slope = max(0.0, (cost(last) - cost(first)) / rise) if rise else cost(last) / last.samples
        return max(0.0, cost(last) + slope * (samples - last.samples))


def counted(measured: Measured, operations: bool = True) -> Trial:
    """Costs from the operations and the graph of one forward pass: no clock, so the same every time.

    Args:
        measured: what to measure on.
        operations: whether seconds matter; without them products count as free.
    """
    return on_few(measured, (FEW,), lambda few: _counted(few, operations))[0][0]


def timed(
    measured: Measured, parameters: Sequence[nn.Parameter], limit: float, in_range: int = 100
) -> tuple[list[Trial], bool]:
    """Costs of the first 16 and 64 samples, or of as many as the limit; and whether batches can be cut."""
    total = num_samples(measured.batches)
    sizes = [size for size in TRIALS if size < total and size <= limit] or [int(max(1, min(total, limit, TRIALS[0])))]
    return on_few(measured, sizes, lambda few: _timed(few, parameters, in_range))


def sweep_seconds(like: Tensor, room: float) -> float:
    """What one coordinate of one basis vector costs in one pass, from vectors that no cache holds if there is room."""
    count = 4
    size = int(min(2**20, max(2**12, room / (8 * count * like.dtype.itemsize))))
    basis = torch.ones(count, size, dtype=like.dtype, device=like.device)
    return min(_seconds(lambda: torch.mv(basis, basis[0])) for _ in range(3)) / (count * size)


def ladder(samples: int, steps: int) -> Iterator[tuple[int, int]]:
    """Samples and steps, from what is wanted to the least: samples down to 128, steps to 60, then both in turns."""
    yield samples, steps
    while samples > FEW_SAMPLES:
        samples = max(FEW_SAMPLES, samples // 2)
        yield samples, steps
    while steps > FEW_STEPS:
        steps = max(FEW_STEPS, steps // 2)
        yield samples, steps
    while samples > LEAST_SAMPLES or steps > LEAST_STEPS:
        samples = max(min(samples, LEAST_SAMPLES), samples // 2)
        yield samples, steps
        steps = max(min(steps, LEAST_STEPS), steps // 2)
        yield samples, steps


def _counted(measured: Measured, operations: bool) -> Trial:
    samples, module = num_samples(measured.batches), measured.module
    flops = FlopCounterMode(display=False) if operations else nullcontext()
    with measured.open() as closure, GraphMeter(list(module.parameters())) as meter, flops as counter:
        for index, batch in enumerate(measured.batches):
            closure(batch, index)
    work = 0.0 if counter is None else counter.get_total_flops() + BYTE_WORK * meter.num_bytes
    if any(isinstance(child, nn.RNNBase) for child in module.modules()):
        work = math.inf  # one fused operation, which the counter does not know
    return Trial(samples, 0.0, work / SLOW_RATE, SECOND_ORDER * meter.num_bytes)


def _timed(measured: Measured, parameters: Sequence[nn.Parameter], in_range: int) -> Trial:
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(measured.seed)
    meter = GraphMeter(list(measured.module.parameters()))
    with meter, opened(measured, parameters, generator, in_range=in_range) as problem:
        build = time.perf_counter() - started
        samples, graph, reduced = num_samples(measured.batches), meter.num_bytes, problem.reduced
        if reduced is None:
            problem.product = torch.empty(0)  # room for the next one
            return Trial(samples, build, _seconds(lambda: problem.operator.matvec(problem.probe)), graph)
        coordinates = reduced.restrict(problem.probe)
        return Trial(samples, build, build, graph, reduced.size, _seconds(lambda: reduced.matvec(coordinates)))


def _seconds(function: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    result = function()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - started
