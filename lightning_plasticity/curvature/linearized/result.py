"""What gradient descent does to a squared loss when the network is replaced by its linearisation: the prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal, solve_banded
from torch import Tensor

from lightning_plasticity.linalg import Estimate, LanczosResult

_MAX_DOUBLINGS = 60  # steps beyond 2^60 are never


@dataclass(frozen=True, eq=False)
class LinearizedPrediction:
    """L_T = 1/(2 h N) sum_i (1 - eta h lambda_i)^{2T} c_i^2, and what follows from it.

    (lambda_i, u_i) are the eigenpairs of the NTK J J^T / N, c_i = u_i . r_0 with r_0 = -N dL/df the residual of the
    loss at the start, eta the learning rate and h the second derivative of the loss in its outputs, times N. With
    ``kernel="ggn"`` they are those of S^T J J^T S, S r_0 = -sqrt(N) dL/df and h is 1, so that L_T is ``1/2 |r_T|^2`` of
    the quadratic model; see ``linearized_trainability``.

    Attributes:
        nodes: (K,) float64, h lambda_i, ascending; by Lanczos the nodes of a Gauss quadrature that stand for them.
        masses: (K,) float64, c_i^2, which sum to ``|r_0|^2``.
        learning_rate: eta.
        num_steps: T, the budget of steps that was asked for.
        num_samples: N.
        num_rows: N C, the number of eigenvalues; for ``"ggn"`` N R with R columns of S, C - 1 for a softmax.
        curvature: h, 1 except for ``mse_loss`` (2 / C for the mean over N C entries).
        exact_steps: up to this many steps the prediction has no quadrature error; ``inf`` for a whole spectrum.
        resolution: the nodes are known to within this, because of floating-point rounding.
        lanczos: the run behind a quadrature; None for a whole spectrum.
        num_products: products with the NTK, or backward passes for the Gram matrix.
        seconds: wall time spent.
        settings: dtype, mode and the like.
        kernel: ``"ntk"`` or ``"ggn"``.
        offset: with ``"ggn"``, what has to be added to L_T to give the quadratic model of the loss; else 0.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import LinearizedPrediction
        >>> nodes, masses = torch.tensor([[0.0, 0.5, 1.0], [0.02, 1.0, 3.0]], dtype=torch.float64)
        >>> found = LinearizedPrediction(nodes, masses, learning_rate=1.0, num_steps=4, num_samples=1, num_rows=3)
        >>> [round(found.loss_after(steps).value, 6) for steps in (0, 1)]  # 4.02 / 2, then (0.02 + 1 / 4) / 2
        [2.01, 0.135]
        >>> found.steps_to(0.02).value, found.steps_to(0.005).value  # what lies in the null space stays
        (3.0, inf)
    """

    nodes: Tensor
    masses: Tensor
    learning_rate: float
    num_steps: int
    num_samples: int
    num_rows: int
    curvature: float = 1.0
    exact_steps: float = math.inf
    resolution: float = 0.0
    lanczos: LanczosResult | None = None
    num_products: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    kernel: str = "ntk"
    offset: float = 0.0

    @property
    def initial_loss(self) -> float:
        """``|r_0|^2 / (2 h N)``; for squared losses the loss itself, for others the squared residual in its place."""
        return float(self.masses.sum()) / (2 * self.curvature * self.num_samples)

    @property
    def final_loss(self) -> Estimate:
        """The loss after the budget of ``num_steps`` steps."""
        return self.loss_after(self.num_steps)

    @property
    def eps(self) -> float:
        """``1 / (eta T)``; directions with h lambda below it are out of the budget's reach."""
        return 1.0 / (self.learning_rate * max(1, self.num_steps))

    def loss_after(self, steps: int) -> Estimate:
        """L_T after T = ``steps`` steps; the interval covers rounding, and beyond ``exact_steps`` the quadrature.

        All even derivatives of the summand in lambda are positive, so Gauss quadrature is a lower bound, and
        Gauss-Lobatto quadrature with nodes at 0 and 2 / (eta h) an upper one (Golub and Meurant 1994).

        Raises:
            ValueError: for negative ``steps``.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}, expected at least 0.")
        value = self._loss(self.nodes, self.masses, steps, 0.0)
        lower = self._loss(self.nodes, self.masses, steps, -self.resolution)
        upper = self._loss(self.nodes, self.masses, steps, self.resolution)
        if steps > self.exact_steps:
            upper = max(upper, self._loss(*self._lobatto, steps, self.resolution))
        return Estimate(value, min(lower, value), max(upper, value))

    def steps_to(self, target: float) -> Estimate:
        """Fewest steps after which the loss is at most ``target``; ``inf`` when it never is.

        Raises:
            ValueError: for a negative ``target``.
        """
        if not target >= 0:
            raise ValueError(f"target={target}, expected a loss of at least 0.")
        ends = (self._first_step(target, which) for which in ("value", "lower", "upper"))
        return Estimate(*ends)

    def reaches(self, target: float) -> bool:
        """Whether the loss is at most ``target`` after the budget of steps."""
        return self.final_loss.value <= target

    def share_below(self, eps: float) -> float:
        """Share of ``|r_0|^2`` in eigenvectors with h lambda <= eps (by Lanczos: on nodes there, an estimate)."""
        total = float(self.masses.sum())
        return float(self.masses[self.nodes <= eps].sum()) / total if total else 0.0

    def share_allowed(self, target: float, eps: float | None = None, steps: int | None = None) -> float:
        """The largest ``share_below(eps)`` with which the loss can be ``target`` after the steps.

        L_T >= L_0 (1 - eta eps)^{2T} share_below(eps) for eta eps <= 1, so the share is at most
        (target / L_0) (1 - eta eps)^{-2T}, and at most 1.

        Args:
            target: a loss.
            eps: threshold of h lambda; by default 1 / (eta T).
            steps: T; by default the budget.

        Raises:
            ValueError: when eta eps > 1, where the bound does not hold.
        """
        steps = self.num_steps if steps is None else steps
        eps = 1.0 / (self.learning_rate * max(1, steps)) if eps is None else eps
        if not 0 <= self.learning_rate * eps <= 1:
            raise ValueError(f"eps={eps:g} times learning_rate={self.learning_rate:g} is not in [0, 1]; lower eps.")
        if not self.initial_loss:
            return 1.0
        decay = (1.0 - self.learning_rate * eps) ** (2 * steps)
        return min(1.0, target / self.initial_loss / decay) if decay else 1.0

    def required_rank(self, target: float, eps: float | None = None, steps: int | None = None) -> float:
        """How many of the N C eigenvalues must exceed eps for ``target`` to be in reach, for a residual like any other.

        N C (1 - share_allowed): with a residual of no preferred direction the share below eps is the share of the
        eigenvalues below eps. Arguments and errors as in ``share_allowed``.
        """
        return self.num_rows * (1.0 - self.share_allowed(target, eps, steps))

    def _loss(self, nodes: Tensor, masses: Tensor, steps: int, shift: float) -> float:
        """The sum, with every node moved by up to ``|shift|`` to where it is larger (shift > 0) or smaller (< 0)."""
        rates = (1.0 - self.learning_rate * nodes).abs()
        moved = (rates + self.learning_rate * shift).clamp_min(0.0)
        rates = moved.minimum(rates.clamp_min(1.0))  # eigenvalues are not negative: nothing grows that did not before
        powers = torch.exp(2.0 * steps * rates.log()) if steps else torch.ones_like(rates)
        return float((powers * masses).sum()) / (2 * self.curvature * self.num_samples)

    def _first_step(self, target: float, which: str) -> float:
        def reached(steps: int) -> bool:
            return bool(getattr(self.loss_after(steps), which) <= target)

        if reached(0):
            return 0.0
        high = 1
        for _ in range(_MAX_DOUBLINGS):
            if reached(high):
                break
            high *= 2
        else:
            return math.inf
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return float(high)

    @cached_property
    def _lobatto(self) -> tuple[Tensor, Tensor]:
        """Nodes and masses of the Gauss-Lobatto rule with the two prescribed nodes (Golub 1973)."""
        assert self.lanczos is not None
        alpha, beta = self.lanczos.alpha, self.lanczos.beta[:-1]
        # Just below 0, where a node may be already; 2 / eta is above all eigenvalues if gradient descent is stable.
        low = -max(self.resolution, 1e-300) / self.curvature
        high = 2.0 / (self.learning_rate * self.curvature)
        at_low, at_high = _last_of_inverse(alpha - low, beta), _last_of_inverse(alpha - high, beta)
        squared = (high - low) / (at_low - at_high)
        nodes, vectors = eigh_tridiagonal([*alpha, low + squared * at_low], [*beta, math.sqrt(squared)])
        masses = float(self.masses.sum()) * vectors[0] ** 2
        return self.curvature * torch.from_numpy(nodes).clamp_min(0.0), torch.from_numpy(masses)


def _last_of_inverse(diagonal: Any, off: Any) -> float:
    """Last entry of (T)^-1 e_K for a tridiagonal T."""
    size = len(diagonal)
    bands = [[0.0, *off], diagonal, [*off, 0.0]]
    unit = [0.0] * (size - 1) + [1.0]
    return float(solve_banded((1, 1), bands, unit)[-1])
