"""How to measure a Hessian within a budget: how many samples and Lanczos steps, in which precision, by which route."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.budget import Budget, in_mib
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.hessian_problem import opened
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.memory import GraphMeter
from lightning_plasticity.curvature.samples import num_samples

FEW = 2  # samples whose graphs are weighed
SECOND_ORDER = 2.2  # bytes of a differentiable gradient's graph over those of the forward pass: 1.5 to 1.9 measured
TRIALS = (16, 64)  # samples that the calibration measures on
FEW_SAMPLES, FEW_STEPS = 128, 60  # what is given up last, and then in turns
LEAST_SAMPLES, LEAST_STEPS = 16, 20
# Vectors of P coordinates that are held at most: a snapshot, the gradient and, while it is made, its parts, the probe
# and its product; then those of the recurrence, or in the Hessian's range the snapshot alone.
BUILD_VECTORS, RUN_VECTORS, RANGE_VECTORS = 6, 9, 2
REBUILT = 1.7  # times that a product takes when graphs are made anew for it
RANGE_SHARE = 0.5  # of the coordinates; with longer vectors the route through the range does not pay
SMALL_BASIS = 2**24  # bytes; with SMALL_WORK, what no trial is made for
SMALL_WORK = 1e10  # coordinates times samples times steps


Basis = Literal["full", "float16", "none"]
BASES: tuple[Basis, ...] = ("full", "float16", "none")  # none: copies of eigenvalues come back, and are merged


@dataclass(frozen=True)
class HessianPlan:
    """What a measurement will do.

    Attributes:
        num_samples: N, the first samples of the probe data.
        num_steps: Lanczos steps.
        basis: the vectors kept for reorthogonalisation: in the network's own precision, in float16, or none of them.
        chunk: samples whose graph is held at a time, made anew for every product; None keeps all graphs.
        basis_bytes: what the basis may take.
        why: what the budget changed; empty where nothing.
    """

    num_samples: int
    num_steps: int
    basis: Basis = "full"
    chunk: int | None = None
    basis_bytes: float = math.inf
    why: str = ""

    def settings(self, num_steps: int) -> dict[str, Any]:
        """What a record says."""
        found: dict[str, Any] = {"budget": self.why} if self.why else {}
        if num_steps < self.num_steps:
            found["num_steps_wanted"] = self.num_steps
        if self.basis != "full":
            found["basis"] = self.basis
        if self.chunk is not None:
            found["graph_samples"] = self.chunk
        return found


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
    graph: int
    range_size: int | None = None
    range_product: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What trials on few samples say about more of them."""

    trials: Sequence[Trial]
    num_params: int
    itemsize: int
    sweep: float  # seconds per coordinate and basis vector

    def vector(self, samples: int) -> int:
        """Coordinates of a vector of the recurrence."""
        last = self.trials[-1] if self.trials else None
        if last is None or last.range_size is None:
            return self.num_params
        size = math.ceil(last.range_size / last.samples * samples)
        return size if size <= RANGE_SHARE * self.num_params else self.num_params

    def basis(self, samples: int, steps: int, basis: Basis) -> int:
        """Bytes of the basis."""
        itemsize = {"full": self.itemsize, "float16": min(2, self.itemsize), "none": 0}[basis]
        return steps * self.vector(samples) * itemsize

    def memory(self, samples: int, basis_bytes: int, graph: float) -> float:
        """Bytes at the peak: while the graphs are made, or during the run."""
        vector, reduced = self.vector(samples), self.vector(samples) < self.num_params
        run = RANGE_VECTORS * self.num_params + 6 * vector if reduced else RUN_VECTORS * self.num_params
        return max(
            BUILD_VECTORS * self.num_params * self.itemsize + graph,
            run * self.itemsize + basis_bytes + (0.0 if reduced else graph),
        )

    def graph(self, samples: int) -> float:
        """Bytes of the graphs of so many samples."""
        return self.trials[-1].graph / self.trials[-1].samples * samples

    def seconds(self, samples: int, steps: int, chunk: int | None) -> float:
        """Of the whole measurement."""
        vector = self.vector(samples)
        reduced = vector < self.num_params
        product = self._extrapolated(samples, lambda trial: trial.range_product if reduced else trial.product)
        build = self._extrapolated(samples, lambda trial: trial.build)
        vectors = steps**2 * vector * self.sweep  # two passes over a basis that grows from 1 to ``steps``
        return build + steps * product * (1.0 if chunk is None else REBUILT) + vectors

    def _extrapolated(self, samples: int, cost: Callable[[Trial], float]) -> float:
        """A straight line through the trials, and never less than in proportion where there is one only."""
        first, last = self.trials[0], self.trials[-1]
        rise = last.samples - first.samples
        slope = max(0.0, (cost(last) - cost(first)) / rise) if rise else cost(last) / last.samples
        return max(0.0, cost(last) + slope * (samples - last.samples))


def plan_hessian(measured: Measured, parameters: Sequence[nn.Parameter], num_steps: int, budget: Budget) -> HessianPlan:
    """Choose within a budget, from two trials on few samples; small problems are not tried, and done as asked.

    Given up in this order: full precision of the basis, samples beyond 128, steps beyond 60, then both in turns. Where
    time is short all the same, the run is ended by the clock.

    Raises:
        MeasurementError: when not even the least fits the memory.
    """
    total, device = num_samples(measured.batches), parameters[0].device
    size, itemsize = sum(parameter.numel() for parameter in parameters), parameters[0].dtype.itemsize
    memory = budget.memory(device)
    if size * num_steps * itemsize <= SMALL_BASIS <= memory / 4 and size * num_steps * total <= SMALL_WORK:
        return HessianPlan(total, num_steps)
    basis_bytes = size * num_steps * itemsize
    if budget.max_seconds is None:
        rough = Costs((), size, itemsize, 0.0)
        if rough.memory(total, basis_bytes, _graph_bytes(measured, total)) <= memory:
            return HessianPlan(total, num_steps)
    costs = Costs(_trials(measured, parameters, total), size, itemsize, _sweep_seconds(parameters[0]))
    fitting = None
    for samples, steps in _ladder(total, num_steps):
        for basis in BASES:
            fitting = _within(costs, samples, steps, basis, memory) or fitting
            if fitting is not None and costs.seconds(samples, steps, fitting.chunk) <= budget.seconds:
                return _explained(fitting, total, num_steps, budget, memory)
    if fitting is None:
        needed = costs.memory(1, 0, costs.graph(1))
        raise MeasurementError(
            f"The Hessian of {size} parameters takes {in_mib(needed)} at least, and {in_mib(memory)} are allowed. "
            "Raise max_memory, choose params=..., or measure the GGN only: quantities=('ggn',)."
        )
    return _explained(fitting, total, num_steps, budget, memory)


def _within(costs: Costs, samples: int, steps: int, basis: Basis, memory: float) -> HessianPlan | None:
    """The plan, if basis and graphs fit; with graphs of a few samples at a time where those of all do not."""
    bound = costs.basis(samples, steps, basis)
    if costs.memory(samples, bound, costs.graph(samples)) <= memory:
        return HessianPlan(samples, steps, basis, None, bound or math.inf)
    chunk = int((memory - costs.memory(samples, bound, 0.0)) / max(costs.graph(1), 1.0))
    fits = 1 <= chunk < samples and costs.vector(samples) == costs.num_params  # in the range the graph must be whole
    return HessianPlan(samples, steps, basis, chunk, bound or math.inf) if fits else None


def _ladder(samples: int, steps: int) -> Iterator[tuple[int, int]]:
    """Samples and steps, from what is wanted to the least."""
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


def _trials(measured: Measured, parameters: Sequence[nn.Parameter], total: int) -> list[Trial]:
    sizes = [size for size in TRIALS if size < total] or [total]
    try:
        return [_trial(measured.first(size), parameters) for size in sizes]
    except MeasurementError:
        raise
    except Exception:  # a step that wants batches of its own size; the first one is one of those
        return [_trial(measured.with_batches(measured.batches[:1]), parameters)]


def _graph_bytes(measured: Measured, total: int) -> float:
    """Of all samples, from the forward graphs of a few; infinite where those cannot be made."""
    few = min(FEW, total)
    try:
        with measured.first(few).open() as closure, GraphMeter(list(measured.module.parameters())) as meter:
            kept = [closure(batch, index).loss for index, batch in enumerate(measured.first(few).batches)]
            return SECOND_ORDER * meter.num_bytes / few * total if kept else 0.0
    except MeasurementError:
        raise
    except Exception:  # a step that wants batches of its own size
        return math.inf


def _trial(measured: Measured, parameters: Sequence[nn.Parameter]) -> Trial:
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(measured.seed)
    with GraphMeter(list(measured.module.parameters())) as meter, opened(measured, parameters, generator) as problem:
        build, reduced = time.perf_counter() - started, problem.reduced
        samples, graph = num_samples(measured.batches), meter.num_bytes
        if reduced is None:
            problem.product = torch.empty(0)  # room for the next one
            return Trial(samples, build, _seconds(lambda: problem.operator.matvec(problem.probe)), graph)
        coordinates = reduced.restrict(problem.probe)
        in_range = _seconds(lambda: reduced.matvec(coordinates))
        return Trial(samples, build, build, graph, reduced.size, in_range)


def _seconds(function: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    result = function()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - started


def _sweep_seconds(like: Tensor) -> float:
    """What one coordinate of one basis vector costs in one pass, from vectors that no cache holds."""
    count, size = 4, 2**20
    basis = torch.zeros(count, size, dtype=like.dtype, device=like.device)
    return min(_seconds(lambda: torch.mv(basis, basis[0])) for _ in range(3)) / (count * size)


def _explained(plan: HessianPlan, total: int, num_steps: int, budget: Budget, memory: float) -> HessianPlan:
    """The plan with what it gave up, and for what."""
    changes = []
    if plan.num_samples < total:
        changes.append(f"{plan.num_samples} of {total} samples")
    if plan.num_steps < num_steps:
        changes.append(f"{plan.num_steps} of {num_steps} Lanczos steps")
    if plan.basis != "full":
        changes.append({"float16": "a basis in 16 bits", "none": "no basis"}[plan.basis])
    if plan.chunk is not None:
        changes.append(f"graphs of {plan.chunk} samples at a time")
    if not changes:
        return plan
    bounds = f"{budget.seconds:g} s and {in_mib(memory)}" if budget.seconds < math.inf else in_mib(memory)
    return replace(plan, why=f"{', '.join(changes)}, to stay within {bounds}")
