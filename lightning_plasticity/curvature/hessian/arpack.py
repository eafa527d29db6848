"""The outermost eigenpairs of a symmetric operator by ARPACK, complete where eigenvalues are repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from lightning_plasticity.curvature.hessian.operator import HessianOperator
from lightning_plasticity.curvature.measured import finite
from lightning_plasticity.linalg import lanczos
from lightning_plasticity.linalg.progress import Count

Which = Literal["magnitude", "largest", "smallest"]
# What makes an eigenvalue come first, and what ARPACK calls it.
ORDERS: dict[str, tuple[Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "magnitude": (np.abs, "LM"),
    "largest": (np.positive, "LA"),
    "smallest": (np.negative, "SA"),
}
MAX_BASIS_BYTES = 2**31  # what the Lanczos basis may take when ARPACK has given up
POWER_STEPS = 5  # products for the order of magnitude of the largest eigenvalue

Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]  # values (j,) and vectors (j, d), best first


def subspace_size(k: int) -> int:
    """Lanczos vectors that ARPACK keeps."""
    return max(2 * k + 1, 20)


def best(pairs: Pairs, k: int, which: Which) -> Pairs:
    """The first k in the order that was asked for."""
    order = np.argsort(-ORDERS[which][0](pairs[0]), kind="stable")[:k]
    return pairs[0][order], pairs[1][order]


class ArpackIteration:
    """ARPACK on the live coordinates, each pass on the orthogonal complement of what is found already."""

    def __init__(
        self, operator: HessianOperator, live: Tensor, which: Which, tol: float, max_products: int, seed: int
    ) -> None:
        self.operator, self.which, self.tol = operator, which, tol
        self.fallback = max_products // 4  # products kept back for when ARPACK gives up
        self.budget = max_products - self.fallback
        self.indices = live.nonzero()[:, 0]
        self.random = np.random.default_rng(seed)
        self.found: Pairs = np.empty(0), np.empty((0, len(self.indices)))
        self.count = Count("products")
        self.scale = self._power()
        # ARPACK's tolerance is relative to each eigenvalue. A shift away from zero makes it one to the largest: shifted
        # ones are at most three times as large as that.
        self.shift = {"magnitude": 0.0, "largest": 2.0, "smallest": -2.0}[which] * self.scale

    def run(self, k: int) -> Pairs:
        """At most k pairs; fewer than k only where there are no more."""
        tol = self.tol / 3 if self.shift else self.tol
        self._merge(self._pass(k, tol), k)
        while self.operator.num_products < self.budget:
            # The error of an eigenvalue is of the order of its residual squared, so this one is right to about tol.
            missed = self._pass(1, self.tol**0.5)[0]
            key = ORDERS[self.which][0]
            full = len(self.found[0]) >= k
            if full and not (len(missed) and key(missed)[0] > key(self.found[0])[k - 1] + self.tol * self.scale):
                break
            self._merge(self._pass(k, tol), k)
            if not full and len(self.found[0]) < k:
                break
        while (have := len(self.found[0])) < k:  # one run may end early, in a subspace that is invariant
            self._merge(self._ritz(k), k)
            if len(self.found[0]) == have:
                break
        return self.found

    def _product(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        full = torch.zeros(self.operator.num_params, dtype=self.operator.dtype, device=self.operator.device)
        full[self.indices] = torch.from_numpy(vector.ravel()).to(full)
        product: NDArray[np.float64] = finite(self.operator.matvec(full)[self.indices]).double().cpu().numpy()
        self.count.add()
        return product

    def _deflated(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """The shifted operator, and zero on what is found."""
        inside = self._project(vector.ravel())
        return self._project(self._product(inside) + self.shift * inside)

    def _project(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        basis = self.found[1]
        inside: NDArray[np.float64] = vector - basis.T @ (basis @ vector)
        return inside

    def _power(self) -> float:
        """The largest ``|eigenvalue|`` from below, its order of magnitude at least."""
        vector, size = self.random.standard_normal(len(self.indices)), 0.0
        for _ in range(POWER_STEPS):
            vector = self._product(vector / np.linalg.norm(vector))
            size = max(size, float(np.linalg.norm(vector)))
            if not vector.any():  # below what the dtype holds
                break
        return size

    def _pass(self, k: int, tol: float) -> Pairs:
        """What ARPACK finds on the complement within the budget, and perhaps fewer than k."""
        size, subspace = len(self.indices), subspace_size(k)
        left = self.budget - self.operator.num_products - subspace
        linear = LinearOperator((size, size), matvec=self._deflated, dtype=np.float64)
        start = self._project(self.random.standard_normal(size))
        restarts = max(1, left // (subspace - k))
        try:
            values, vectors = eigsh(
                linear, k, which=ORDERS[self.which][1], v0=start, ncv=subspace, maxiter=restarts, tol=tol
            )
        except ArpackNoConvergence as stopped:
            values, vectors = stopped.eigenvalues, stopped.eigenvectors
        return best((values - self.shift, vectors.T), k, self.which)

    def _ritz(self, k: int) -> Pairs:
        """Ritz pairs of one Lanczos run on the complement: the best there is when ARPACK gave up."""
        room = MAX_BASIS_BYTES // (8 * len(self.indices))
        steps = max(subspace_size(k), min(self.fallback, room))
        start = torch.from_numpy(self._project(self.random.standard_normal(len(self.indices))))
        run = lanczos(lambda v: torch.from_numpy(self._deflated(v.numpy())), start, steps, keep_basis=True)
        values, vectors = run.ritz()
        assert run.basis is not None
        return best((values - self.shift, vectors.T @ run.basis.numpy()), k, self.which)

    def _merge(self, new: Pairs, k: int) -> None:
        """Keep the k best; ARPACK's own restarts may leave the complement, so the new ones are put back into it."""
        values, vectors = self.found
        for value, vector in zip(*new, strict=True):
            rest = vector - vectors.T @ (vectors @ vector)
            norm = np.linalg.norm(rest)
            if norm > 0.5:  # else it was mostly found already
                rest = rest / norm
                rest -= vectors.T @ (vectors @ rest)
                vectors = np.vstack([vectors, rest / np.linalg.norm(rest)])
                values = np.append(values, value)
        self.found = best((values, vectors), k, self.which)
