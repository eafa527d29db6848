"""How to measure a Hessian within a budget: how many samples and Lanczos steps, in which precision, by which route."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_plasticity.curvature.budget import Budget, in_mib
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.hessian.costs import Basis, Costs, counted, ladder, sweep_seconds, timed
from lightning_plasticity.curvature.hessian.operator import VMAP_PRODUCTS
from lightning_plasticity.curvature.hessian.problem import cut
from lightning_plasticity.curvature.measured import Measured, num_active
from lightning_plasticity.curvature.samples import in_whole_batches, num_samples
from lightning_plasticity.nn.batches import batch_size
from lightning_plasticity.nn.precision import measured_in

EXACT_LIMIT = 1000  # live coordinates up to which "auto" forms the whole Hessian
# Times the budget's seconds after which the clock ends a run: one whose costs were timed, or only counted.
TIMED_PATIENCE, COUNTED_PATIENCE = 1.5, 5.0

# The basis, and whether graphs are made anew in parts; without a basis copies of eigenvalues come back, and are merged.
ROUTES: tuple[tuple[Basis, bool], ...] = (
    ("full", False),
    ("float16", False),
    ("full", True),
    ("float16", True),
    ("none", False),
    ("none", True),
)


@dataclass(frozen=True)
class HessianPlan:
    """What a measurement will do.

    Attributes:
        num_samples: N, the first samples of the probe data.
        num_steps: Lanczos steps.
        basis: the vectors kept for reorthogonalisation: in the network's own precision, in float16, or none of them.
        chunk: samples whose graph is held at a time, made anew for every product; None keeps all graphs.
        basis_bytes: what the basis may take.
        exact_limit: live coordinates up to which the whole matrix is formed instead.
        at_once: products that are then made in one backward pass.
        patience: times the budget's seconds after which the clock ends the run.
        why: what the budget changed; empty where nothing.
    """

    num_samples: int
    num_steps: int
    basis: Basis = "full"
    chunk: int | None = None
    basis_bytes: float = math.inf
    exact_limit: int = EXACT_LIMIT
    at_once: int = VMAP_PRODUCTS
    patience: float = TIMED_PATIENCE
    why: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What a record says."""
        found: dict[str, Any] = {"budget": self.why} if self.why else {}
        if self.basis != "full":
            found["basis"] = self.basis
        if self.chunk is not None:
            found["graph_samples"] = self.chunk
        return found


def plan_hessian(measured: Measured, parameters: Sequence[nn.Parameter], num_steps: int, budget: Budget) -> HessianPlan:
    """Choose within a budget. What is small by a count of operations and bytes is done as asked, without a trial.

    Given up in this order: a basis in full precision, graphs that are kept, the basis; samples beyond 128, steps beyond
    60, then both in turns. Where time is short all the same, the run is ended by the clock.

    Raises:
        MeasurementError: when not even the least fits the memory.
    """
    return _Planner(measured, parameters, num_steps, budget).plan()


class _Planner:
    def __init__(self, measured: Measured, parameters: Sequence[nn.Parameter], num_steps: int, budget: Budget) -> None:
        self.measured, self.parameters, self.num_steps, self.budget = measured, parameters, num_steps, budget
        self.total = num_samples(measured.batches)
        self.memory = budget.memory(parameters[0].device)
        size = sum(parameter.numel() for parameter in parameters)
        light = counted(measured, operations=budget.max_seconds is not None)
        active = measured.active(parameters)
        self.costs = Costs(
            [light],
            size,
            measured_in(parameters[0].dtype).itemsize,
            active=None if active is None else num_active(parameters, active),
        )
        self._divisible: bool | None = None

    def plan(self) -> HessianPlan:
        wanted = self._fitting(self.total, self.num_steps, ROUTES[:1])
        if wanted is not None and self._seconds(wanted) <= self.budget.seconds:
            return self._finished(replace(wanted, patience=COUNTED_PATIENCE))
        room = self.memory - self.costs.building(0.0)
        if room < self.costs.graph(1):
            raise self._refusal()
        sweep = sweep_seconds(self.parameters[0], self.memory)
        trials, divisible = timed(self.measured, self.parameters, room / max(self.costs.graph(1), 1.0))
        self.costs = replace(self.costs, trials=trials, sweep=sweep)
        return self._finished(self._first_affordable(divisible))

    def _first_affordable(self, divisible: bool) -> HessianPlan:
        """Down the ladder to what memory and time allow; what memory allows at least."""
        fitting = None
        for samples, steps in ladder(self.total, self.num_steps):
            samples = samples if divisible else in_whole_batches(self.measured.batches, samples)
            fitting = self._fitting(samples, steps, ROUTES) or fitting
            if fitting is not None and self._seconds(fitting) <= self.budget.seconds:
                return fitting
        if fitting is None:
            raise self._refusal()
        return fitting

    def _fitting(self, samples: int, steps: int, routes: Sequence[tuple[Basis, bool]]) -> HessianPlan | None:
        """By the first of the routes that fits the memory."""
        costs = self.costs
        for basis, rebuilt in routes:
            bound = costs.basis(samples, steps, basis)
            plan = HessianPlan(samples, steps, basis, None, bound or math.inf)
            if not rebuilt and costs.memory(samples, bound, costs.graph(samples)) <= self.memory:
                return plan
            if rebuilt and (part := self._part(samples, self.memory - costs.memory(samples, bound, 0.0))):
                return replace(plan, chunk=part)
        return None

    def _part(self, samples: int, room: float) -> int:
        """Samples whose graphs fit in the room and of which batches can be made; 0 for none.

        Batches are not divisible where their loss is not a mean, or couples samples.
        """
        part = int(room / max(self.costs.graph(1), 1.0))
        if not 1 <= part < samples or self.costs.in_range(samples):
            return 0
        if self._divisible is None:
            parts = cut(self.measured.first(samples), part)
            self._divisible = max(batch_size(batch) for batch in parts.batches) <= part
        largest = max(batch_size(batch) for batch in self.measured.first(samples).batches)
        return part if self._divisible or largest <= part else 0

    def _seconds(self, plan: HessianPlan) -> float:
        return self.costs.seconds(plan.num_samples, plan.num_steps, plan.basis, plan.chunk)

    def _finished(self, plan: HessianPlan) -> HessianPlan:
        """With the exact route as far as it is affordable, and with what was given up, and for what."""
        costs, samples, part = self.costs, plan.num_samples, plan.chunk or plan.num_samples
        room = self.memory - costs.memory(samples, 0, costs.graph(part))
        limit = int(min(EXACT_LIMIT, costs.affordable_exact(samples, room / 2, self.budget.seconds)))
        at_once = int(max(1, min(VMAP_PRODUCTS, costs.products_at_once(part, room / 2))))
        return replace(plan, exact_limit=limit, at_once=at_once, why=self._why(plan))

    def _why(self, plan: HessianPlan) -> str:
        changes = []
        if plan.num_samples < self.total:
            changes.append(f"{plan.num_samples} of {self.total} samples")
        if plan.num_steps < self.num_steps:
            changes.append(f"{plan.num_steps} of {self.num_steps} Lanczos steps")
        if plan.basis != "full":
            changes.append({"float16": "a basis in 16 bits", "none": "no basis"}[plan.basis])
        if plan.chunk is not None:
            changes.append(f"graphs of {plan.chunk} samples at a time")
        return self.budget.reason(changes, self.memory)

    def _refusal(self) -> MeasurementError:
        needed = self.costs.memory(1, 0, self.costs.graph(1))
        return MeasurementError(
            f"The Hessian of {self.costs.num_params} parameters takes {in_mib(needed)} at least, and "
            f"{in_mib(self.memory)} are allowed. Raise max_memory, choose params=..., or measure the GGN only: "
            "quantities=('ggn',)."
        )
