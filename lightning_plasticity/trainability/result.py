"""What a trainability probe found: loss curves from the present weights and from fresh ones, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.linalg import Estimate

Target = Literal["fresh", "relative", "absolute"]
TARGETS = ("fresh", "relative", "absolute")


@dataclass(frozen=True)
class Curve:
    """The loss along one run.

    Attributes:
        steps: numbers of optimizer steps after which it was evaluated, from 0.
        losses: mean loss on all the probe data then; ``inf`` where it had diverged.
        step_losses: loss of each step's minibatch, before the step.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    step_losses: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """Least loss."""
        return min(self.losses)

    @property
    def area(self) -> float:
        """Mean loss over the steps, the area under the curve (trapezoids), divided by the number of steps."""
        pairs = list(zip(self.steps, self.losses, strict=True))
        if len(pairs) == 1:
            return self.losses[0]
        total = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(pairs))
        return total / (self.steps[-1] - self.steps[0])

    def steps_to(self, target: float) -> Estimate:
        """Fewest steps after which the loss was at most ``target``.

        The value is where it was first seen there; the lower end is one step after the last evaluation before. Where it
        never was, the value is ``inf``, and the lower end one more than the steps taken.
        """
        for i, loss in enumerate(self.losses):
            if loss <= target:
                lower = self.steps[i - 1] + 1 if i else self.steps[i]
                return Estimate(float(self.steps[i]), float(lower), float(self.steps[i]))
        return Estimate(math.inf, float(self.steps[-1] + 1), math.inf)


@dataclass(frozen=True)
class Trainability:
    """Loss curves of short training runs, one for each seed. Numbers are means over seeds, from the least to the most.

    Attributes:
        curves: from the present weights.
        fresh_curves: from fresh initialisations, in the same order of the data; empty where there are none.
        target: ``"fresh"``: (1 + tau) times the best loss of the fresh run of the same seed (tau times its absolute
            value above it); ``"relative"``: tau times the loss before the first step; ``"absolute"``: tau.
        tau: see ``target``.
        num_steps: steps taken.
        num_samples: of the probe data.
        fresh_failure: why there are no fresh runs, where they were wanted.
        seconds: wall time.
        settings: how it was measured.

    Example:
        >>> from lightning_plasticity.trainability import Curve, Trainability
        >>> old, new = Curve((0, 1, 2), (4.0, 3.0, 2.1)), Curve((0, 1, 2), (3.0, 2.0, 2.0))
        >>> found = Trainability((old,), (new,), "fresh", 0.1, num_steps=2, num_samples=8)
        >>> found.steps_to_target.value, round(found.gap_to_fresh.value, 6), found.area.value
        (2.0, 0.1, 3.025)
    """

    curves: tuple[Curve, ...]
    fresh_curves: tuple[Curve, ...]
    target: Target
    tau: float
    num_steps: int
    num_samples: int
    fresh_failure: str | None = None
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def initial_loss(self) -> Estimate:
        """Before the first step."""
        return _spread([curve.losses[0] for curve in self.curves])

    @property
    def best_loss(self) -> Estimate:
        """Least loss at any evaluation."""
        return _spread([curve.best for curve in self.curves])

    @property
    def final_loss(self) -> Estimate:
        """After the last step; ``inf`` when it diverged."""
        return _spread([curve.losses[-1] for curve in self.curves])

    @property
    def area(self) -> Estimate:
        """Mean loss over the steps."""
        return _spread([curve.area for curve in self.curves])

    @property
    def fresh_best_loss(self) -> Estimate:
        """Best loss from fresh initialisations."""
        return _spread([curve.best for curve in self._fresh()])

    @property
    def gap_to_fresh(self) -> Estimate:
        """Best loss minus that of the fresh run of the same seed; above 0 the present weights learn less."""
        return _spread([old.best - new.best for old, new in zip(self.curves, self._fresh(), strict=True)])

    @property
    def targets(self) -> tuple[float, ...]:
        """The target loss of each seed.

        Raises:
            MeasurementError: for a relative target where the loss is not positive, and a fresh one without fresh runs.
        """
        if self.target == "absolute":
            return tuple(self.tau for _ in self.curves)
        if self.target == "fresh":
            return tuple(curve.best + self.tau * abs(curve.best) for curve in self._fresh())
        starts = [curve.losses[0] for curve in self.curves]
        if min(starts) <= 0:
            raise MeasurementError(
                f"The loss starts at {min(starts):.4g}, of which no share is a target; use target='fresh' or "
                "'absolute'."
            )
        return tuple(self.tau * start for start in starts)

    @property
    def target_loss(self) -> Estimate:
        """The loss that counts as learnt."""
        return _spread(self.targets)

    @property
    def steps_to_target(self) -> Estimate:
        """Median over seeds of the fewest steps to the target; the interval spans all seeds and the evaluations' grid.

        ``nan`` when half of the seeds or more never got there: then the lower end still says how far one has looked,
        and the upper end is ``inf``.
        """
        found = [curve.steps_to(target) for curve, target in zip(self.curves, self.targets, strict=True)]
        middle = median(estimate.value for estimate in found)
        lower, upper = min(estimate.lower for estimate in found), max(estimate.upper for estimate in found)
        return Estimate(middle if math.isfinite(middle) else math.nan, lower, upper)

    @property
    def reached(self) -> float:
        """Share of the seeds that got to the target, between 0 and 1."""
        pairs = zip(self.curves, self.targets, strict=True)
        return fmean(float(curve.best <= target) for curve, target in pairs)

    def _fresh(self) -> tuple[Curve, ...]:
        if not self.fresh_curves:
            raise MeasurementError(self.fresh_failure or "There are no runs from fresh initialisations (fresh=False).")
        return self.fresh_curves


def _spread(values: Sequence[float]) -> Estimate:
    mean = fmean(values) if all(map(math.isfinite, values)) else math.inf
    return Estimate(min(max(mean, min(values)), max(values)), min(values), max(values))
