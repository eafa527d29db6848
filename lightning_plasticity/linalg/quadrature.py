"""What one Lanczos run from a Gaussian probe says about a spectrum: counts, and an interval that holds.

A Ritz pair that has converged is an eigenvalue and is counted as one; only the rest of the probe's weight is spread
over the rest of the dimension. The idea is the deflation of "variance-reduced SLQ" (Bhattacharjee, Jayaram, Musco,
Musco, Ray 2024, arXiv 2410.21690). Intervals combine two exact facts: the moments fix the probe's mass below a point
up to the Chebyshev-Markov-Stieltjes bounds (computed by Gauss-Radau quadrature, Golub and Meurant 1994), and the mass
a Gaussian probe puts on r of d eigendirections follows Beta(r/2, (d-r)/2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.special import betainc, betaincc
from torch import Tensor

from lightning_plasticity.linalg.estimate import Estimate
from lightning_plasticity.linalg.lanczos import Matvec, lanczos

Array = NDArray[np.float64]

CONVERGED = 0.1  # a pair has converged when its residual is below this share of the gap to the next node
# Probability on each side of an interval. Half of the 2.5 % that an exact law would need for 95 %: deflation takes out
# the pairs that the probe favours, which leaves the rest biased low (91.5 % in the worst case found, with 2.5 %).
TAIL = 0.0125
SIMPLE = 1e-5  # a mass less likely than this for one eigenvector belongs to a multiple eigenvalue
ROUNDING_MASS = 1e-9  # a mass this close to 0 or 1 is taken to be 0 or 1
ZERO_MASS = 1e-14  # an upper bound this small is rounding: nothing lies there
NEW_COPY = 1e-6  # a node with less than this share of one eigenvalue's mass is a copy on its way to the others
LOST_MASS = 0.1  # masses of a run without reorthogonalisation are right to this share of ``merge``
REMOTE = 1e8  # a last diagonal entry this many times the others: the solver would lose the other nodes in its rounding


@dataclass(frozen=True, eq=False)
class LanczosQuadrature:
    """The spectrum of a d-dimensional symmetric operator as seen by one Gaussian probe.

    Attributes:
        alpha: (K,) diagonal of the Jacobi matrix.
        beta: (K,) its off-diagonals, the last one the norm of the remainder.
        dim: d, the dimension that the probe lived in.
        breakdown: whether the run ended in an invariant subspace.
        merge: nodes closer than this, relative to the largest, are copies of one eigenvalue, which a run without
            reorthogonalisation makes; 0 for a run with it. Such a run is that of a nearby matrix with small clusters
            for eigenvalues (Greenbaum 1989), so the bounds from its moments hold all the same.
    """

    alpha: Array
    beta: Array
    dim: int
    breakdown: bool
    merge: float = 0.0

    @cached_property
    def _decomposition(self) -> tuple[Array, Array, Array]:
        nodes, vectors = eigh_tridiagonal(self.alpha, self.beta[:-1])
        masses, residuals = vectors[0] ** 2, self.beta[-1] * np.abs(vectors[-1])
        if not self.merge:
            return nodes, masses, residuals
        real = masses * self.dim > NEW_COPY
        return _merged(nodes[real], masses[real], residuals[real], self.merge)

    @property
    def nodes(self) -> Array:
        """(K,) Ritz values, ascending."""
        return self._decomposition[0]

    @property
    def masses(self) -> Array:
        """(K,) the probe's weight on each node; sums to 1."""
        return self._decomposition[1]

    @property
    def residuals(self) -> Array:
        """(K,) residual norms; each node is this close to an eigenvalue."""
        return self._decomposition[2]

    @cached_property
    def converged(self) -> NDArray[np.bool_]:
        """(K,) which nodes are eigenvalues, found by walking inwards from both ends.

        Walking matters: picking small residuals out of the middle favours what the probe favours, and biases the rest.
        """
        nodes, residuals = self.nodes, self.residuals
        mask = np.zeros(len(nodes), dtype=bool)
        if self.breakdown:
            return self._simple_after_breakdown()
        gaps = np.diff(nodes, prepend=-np.inf, append=np.inf)
        good = residuals < CONVERGED * np.minimum(gaps[:-1], gaps[1:])
        for k in range(len(nodes) - 1, -1, -1):
            if nodes[k] <= 0 or not good[k]:
                break
            mask[k] = True
        for k in range(len(nodes)):
            if nodes[k] >= 0 or not good[k]:
                break
            mask[k] = True
        if mask.all():  # the rest of the dimension has to live somewhere: on the node nearest zero
            mask[np.argmin(np.abs(nodes))] = False
        return mask & self._likely_simple(mask)

    def _simple_after_breakdown(self) -> NDArray[np.bool_]:
        """After a breakdown every node is an eigenvalue; it counts once unless its mass says that it is multiple."""
        if len(self.nodes) == self.dim:
            return np.ones(self.dim, dtype=bool)
        surprise = betaincc(0.5, (self.dim - 1) / 2, self.masses)
        mask = np.asarray(surprise > SIMPLE, dtype=bool)
        mask[np.argmin(np.abs(self.nodes))] = False  # the null space, or else where the rest of the dimension must live
        return mask & self._likely_simple(mask)

    def _likely_simple(self, mask: NDArray[np.bool_]) -> bool:
        """Whether the marked nodes together weigh what as many single eigenvectors may weigh.

        Where a spectrum repeats as a whole (a linear model with squared loss has each eigenvalue once for every output)
        no single mass is telling, but their sum is; nothing is counted as one then, and the masses decide.
        """
        count = int(mask.sum())
        if not 0 < count < self.dim:
            return True
        surprise = betaincc(count / 2, (self.dim - count) / 2, float(self.masses[mask].sum()))
        return bool(surprise > SIMPLE)

    @cached_property
    def counts(self) -> Array:
        """(K,) how many eigenvalues each node stands for; sums to ``dim``."""
        converged, masses = self.converged, self.masses
        num_converged = int(converged.sum())
        counts = np.ones(len(masses))
        rest = masses[~converged].sum()
        if rest > 0:
            counts[~converged] = masses[~converged] * ((self.dim - num_converged) / rest)
        elif (~converged).any():
            counts[~converged] = (self.dim - num_converged) / (~converged).sum()
        return counts

    def count_above(self, eps: float) -> Estimate:
        """How many of the ``dim`` eigenvalues exceed ``eps`` in absolute value, with a 95 % interval.

        The value is ``nan`` where what K steps cannot resolve is more than half of it; run more steps then.

        Raises:
            ValueError: for an ``eps`` that is negative or not a number.
        """
        if not eps >= 0:
            raise ValueError(f"eps={eps}, expected eps >= 0.")
        return self._count(self._interpolated_count(eps), np.abs(self.nodes) > eps, eps, self._mass_outside(eps))

    def count_below(self, point: float) -> Estimate:
        """How many of the ``dim`` eigenvalues lie below ``point``, with a 95 % interval; ``nan`` if unresolved."""
        below = self.nodes < point
        return self._count(float(self.counts[below].sum()), below, point, self._mass_below(point))

    def resample(self, num_draws: int, seed: int = 0) -> Array:
        """(num_draws, K) counts that the same operator could have shown to other Gaussian probes.

        Converged pairs stay; a node that stands for c directions draws the mass of c Gaussian coordinates.
        """
        generator = np.random.default_rng(seed)
        draws = np.tile(self.counts, (num_draws, 1))
        free = ~self.converged & (self.counts > 0)
        if free.any():
            shape = 0.5 * self.counts[free]
            mass = generator.gamma(shape, size=(num_draws, len(shape)))
            draws[:, free] = mass / mass.sum(axis=1, keepdims=True) * self.counts[free].sum()
        return draws

    def _count(self, value: float, region: NDArray[np.bool_], edge: float, mass: tuple[float, float]) -> Estimate:
        """A count in a region of the axis, kept within its interval; no value where the interval is all there is."""
        lower, upper = self._count_interval(region, edge, *mass)
        value = float(min(max(value, lower), upper))
        unresolved = self.dim * (mass[1] - mass[0])
        if unresolved > 0.5 * max(value, 1.0) and upper > lower:
            value = float("nan")
        return Estimate(value, lower, upper)

    def _interpolated_count(self, eps: float) -> float:
        """Converged pairs outside plus the midpoint rule in ``log|node|`` on the rest; the null-space node an atom."""
        nodes, counts, converged = np.abs(self.nodes), self.counts, self.converged
        if self.breakdown:  # the nodes are the eigenvalues: nothing lies between them
            return float(counts[nodes > eps].sum())
        outside = float(converged[nodes > eps].sum())
        rest, rest_counts = nodes[~converged], counts[~converged]
        if not len(rest):
            return outside
        atom = int(np.argmin(rest))
        outside += float(rest_counts[atom]) * float(rest[atom] > eps)
        rest, rest_counts = np.delete(rest, atom), np.delete(rest_counts, atom)
        rest, rest_counts = rest[rest > 0], rest_counts[rest > 0]
        if not len(rest) or eps <= 0:
            return outside + float(rest_counts.sum())
        order = np.argsort(rest)[::-1]
        middle = np.cumsum(rest_counts[order]) - 0.5 * rest_counts[order]
        log_rest, total = np.log(rest[order])[::-1], float(rest_counts.sum())
        # np.interp wants ascending abscissae; beyond the ends nothing, or everything, lies outside.
        return outside + float(np.interp(np.log(eps), log_rest, middle[::-1], left=total, right=0.0))

    def _mass_outside(self, eps: float) -> tuple[float, float]:
        """Bounds on the probe mass with ``|eigenvalue|`` > eps, from the moments alone (no statistics)."""
        if self.breakdown:
            outside = float(self.masses[np.abs(self.nodes) > eps].sum())
            return outside, outside
        below_plus, at_plus = self._radau(eps)
        below_minus, at_minus = self._radau(-eps)
        low = 1.0 - (below_plus + at_plus - below_minus)
        high = 1.0 - max(0.0, below_plus - below_minus - at_minus)
        return min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)

    def _mass_below(self, point: float) -> tuple[float, float]:
        """Bounds on the probe mass below a point, from the moments alone."""
        if self.breakdown:
            below = float(self.masses[self.nodes < point].sum())
            return below, below
        below, at = self._radau(point)
        return below, min(below + at, 1.0)

    def _radau(self, point: float) -> tuple[float, float]:
        """Gauss-Radau rule with a node forced at ``point``: the mass below it and the mass on it.

        The ratio form r_k = beta_k p_k / p_{k-1} of the three-term recurrence is used since p_k itself overflows. Where
        a Ritz value lies on the point already, the added node moves to infinity and leaves the Gauss rule.
        """
        scale = max(float(np.abs(self.alpha).max()), float(self.beta.max()), abs(point))
        tiny = 1e-30 * scale
        ratio = point - self.alpha[0]
        for k in range(1, len(self.alpha)):
            ratio = point - self.alpha[k] - self.beta[k - 1] ** 2 / (ratio if abs(ratio) > tiny else tiny)
        last = point - self.beta[-1] ** 2 / (ratio if abs(ratio) > tiny else tiny)
        if abs(last) > REMOTE * scale:
            nodes, vectors = eigh_tridiagonal(self.alpha, self.beta[:-1])
        else:
            nodes, vectors = eigh_tridiagonal(np.append(self.alpha, last), self.beta)
        at = int(np.argmin(np.abs(nodes - point)))
        masses = vectors[0] ** 2
        return float(masses[:at].sum()), float(masses[at])

    def _count_interval(self, region: NDArray[np.bool_], edge: float, low: float, high: float) -> tuple[float, float]:
        """95 % interval of a count: deflate the certain pairs, then invert the Beta law at both mass bounds."""
        certain = self.converged & (np.abs(np.abs(self.nodes) - abs(edge)) > 3 * self.residuals)
        outside = certain & region
        num_outside, num_certain = int(outside.sum()), int(certain.sum())
        rest_dim = self.dim - num_certain
        if rest_dim <= 0:
            return float(num_outside), float(num_outside)
        rest_mass = 1.0 - float(self.masses[certain].sum())
        if rest_mass <= ROUNDING_MASS:
            return float(num_outside), float(num_outside + rest_dim)
        mass_outside = float(self.masses[outside].sum())
        slack = LOST_MASS * self.merge
        low, high = (low - mass_outside - slack) / rest_mass, (high - mass_outside + slack) / rest_mass
        return float(num_outside + _fewest(low, rest_dim)), float(num_outside + _most(high, rest_dim))


def _merged(nodes: Array, masses: Array, residuals: Array, merge: float) -> tuple[Array, Array, Array]:
    """Copies taken together: their masses added, the node and residual those of the copy that converged first."""
    starts = np.append(0, 1 + np.flatnonzero(np.diff(nodes) > merge * np.abs(nodes).max()))
    best = [start + int(np.argmin(part)) for start, part in zip(starts, np.split(residuals, starts[1:]), strict=True)]
    # Eigenvalues that are this close to one another cannot be told apart, so only those further apart may converge.
    return nodes[best], np.add.reduceat(masses, starts), np.maximum(residuals[best], merge * np.abs(nodes).max())


def _fewest(mass: float, dim: int) -> int:
    """Least r whose chance to carry at least ``mass`` is ``TAIL`` or more."""
    if mass < ROUNDING_MASS:
        return 0
    if mass > 1.0 - ROUNDING_MASS:
        return dim
    low, high = 1, dim
    while low < high:
        middle = (low + high) // 2
        enough = middle == dim or betaincc(middle / 2, (dim - middle) / 2, mass) >= TAIL
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _most(mass: float, dim: int) -> int:
    """Greatest r whose chance to carry at most ``mass`` is ``TAIL`` or more."""
    if mass > 1.0 - ROUNDING_MASS:
        return dim
    if mass < ZERO_MASS:
        return 0
    low, high = 0, dim - 1
    while low < high:
        middle = (low + high + 1) // 2
        enough = betainc(middle / 2, (dim - middle) / 2, mass) >= TAIL
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def stochastic_lanczos_quadrature(
    matvec: Matvec,
    dim: int,
    num_steps: int = 120,
    *,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    stop: Callable[[int], bool] | None = None,
) -> LanczosQuadrature:
    """Estimate a spectrum by one long Lanczos run from one Gaussian probe.

    One long run beats several short ones at the same number of products: what is missing near zero is resolution, not
    averaging. The sampling error that is left is in the intervals of the result.

    Args:
        matvec: product with a symmetric operator, (P,) -> (P,).
        dim: P.
        num_steps: Lanczos steps, each one product.
        generator: where the probe is drawn from; None uses a fresh generator with seed 0.
        mask: (P,) bool; the probe lives on these coordinates only, and only they are counted. Use it for coordinates
            whose rows are known to be zero.
        dtype: dtype of the probe and the basis.
        device: device of the probe.
        stop: as in ``lanczos``: asked before each step, given the number done, whether to end there.

    Raises:
        ValueError: when ``mask`` leaves no coordinate, or a product is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import stochastic_lanczos_quadrature
        >>> diagonal = torch.zeros(200); diagonal[:3] = torch.tensor([3.0, 5.0, -4.0])
        >>> quadrature = stochastic_lanczos_quadrature(lambda v: diagonal * v, 200, num_steps=20)
        >>> quadrature.count_above(1.0)
        Estimate(value=3.0, lower=3.0, upper=3.0)
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU so that every device gets the same probe.
    probe = torch.randn(dim, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    live = dim
    if mask is not None:
        probe = probe * mask
        live = int(mask.sum())
    if live == 0:
        raise ValueError("mask leaves no live coordinate: the spectrum is all zeros and needs no estimate.")
    run = lanczos(matvec, probe, min(num_steps, live), stop=stop)
    return LanczosQuadrature(run.alpha, run.beta, live, run.breakdown or run.num_products >= live)
