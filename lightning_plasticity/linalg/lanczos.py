"""Lanczos tridiagonalisation of a symmetric operator with full reorthogonalisation.

Only the recurrence is here; what its coefficients say about the spectrum is in `quadrature`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]

# Relative size of beta at which the Krylov space counts as exhausted: the rounding of one product.
BREAKDOWN = {torch.float64: 1e-13, torch.float32: 2e-6}
# A sweep that leaves less than this share of the vector is repeated: what is left is dominated by rounding.
SECOND_PASS = 0.1


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """Coefficients of one Lanczos run: ``V^T H V = tridiag(beta, alpha, beta)``.

    Attributes:
        alpha: (K,) float64, diagonal of the Jacobi matrix.
        beta: (K,) float64, off-diagonals; the last one is the norm of what the K steps left over.
        breakdown: whether an invariant subspace was found (``beta[-1]`` is rounding); the run is then exact
            for its start vector.
        basis: (K, P) the orthonormal vectors, in the operator's dtype, or None when they were not asked for.
        num_products: operator applications used.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    breakdown: bool
    basis: Tensor | None
    num_products: int

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ritz values (K,), ascending, and the eigenvectors (K, K) of the Jacobi matrix, by columns."""
        nodes, vectors = eigh_tridiagonal(self.alpha, self.beta[:-1])
        return nodes, vectors


def lanczos(matvec: Matvec, start: Tensor, num_steps: int, *, keep_basis: bool = False) -> LanczosResult:
    """Run Lanczos from ``start`` for at most ``num_steps`` steps.

    The basis is kept in the operator's dtype and each new vector is swept once against all of it (a second time when
    little of it is left): float32 then loses no orthogonality that matters, while the coefficients are float64.

    Source: Lanczos 1950; full reorthogonalisation as in Golub and Van Loan, Matrix Computations, 4th ed., 10.3.1.

    Args:
        matvec: product with a symmetric operator, (P,) -> (P,), same dtype and device as ``start``.
        start: (P,) any nonzero vector; normalised here.
        num_steps: at most this many products; at most P are done.
        keep_basis: whether the result holds the (K, P) basis.

    Raises:
        ValueError: for a zero or non-finite start, ``num_steps`` below 1, or a product that is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import lanczos
        >>> diagonal = torch.arange(1.0, 5.0, dtype=torch.float64)
        >>> run = lanczos(lambda v: diagonal * v, torch.ones(4, dtype=torch.float64), num_steps=4)
        >>> [round(float(x), 6) for x in run.ritz()[0]]
        [1.0, 2.0, 3.0, 4.0]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}, expected at least 1; 60 is a quick look, 120 the usual choice.")
    norm = float(torch.linalg.vector_norm(start, dtype=torch.float64))
    if not norm > 0 or not np.isfinite(norm):
        raise ValueError(f"The start vector has norm {norm}; pass a finite nonzero vector, e.g. torch.randn.")
    num_steps = min(num_steps, start.numel())
    basis = torch.empty((num_steps, start.numel()), dtype=start.dtype, device=start.device)
    basis[0] = start / norm
    alpha, beta = np.zeros(num_steps), np.zeros(num_steps)
    scale, tolerance = 0.0, BREAKDOWN.get(start.dtype, BREAKDOWN[torch.float32])
    for k in range(num_steps):
        product = matvec(basis[k])
        alpha[k] = float(torch.dot(basis[k], product))
        if not np.isfinite(alpha[k]):
            raise ValueError(f"Product {k + 1} of the operator is not finite; the loss or the weights are NaN or inf.")
        rest = torch.sub(product, basis[k], alpha=float(alpha[k]))
        if k > 0:
            rest.sub_(basis[k - 1], alpha=float(beta[k - 1]))
        alpha[k] += _orthogonalise(rest, basis[: k + 1])
        beta[k] = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        scale = max(scale, abs(alpha[k]), beta[k])
        exhausted = beta[k] <= tolerance * scale
        if exhausted or k == num_steps - 1:
            done = k + 1
            return LanczosResult(
                alpha[:done],
                beta[:done],
                breakdown=bool(exhausted or done == start.numel()),
                basis=basis[:done] if keep_basis else None,
                num_products=done,
            )
        torch.div(rest, float(beta[k]), out=basis[k + 1])
    raise AssertionError("unreachable: the loop returns at its last step")


def _orthogonalise(vector: Tensor, basis: Tensor) -> float:
    """Sweep ``vector`` against the basis in place; return its correction to alpha."""
    correction = 0.0
    for _ in range(2):
        before = float(torch.linalg.vector_norm(vector))
        coefficients = torch.mv(basis, vector)
        vector.addmv_(basis.T, coefficients, alpha=-1)
        correction += float(coefficients[-1])
        if float(torch.linalg.vector_norm(vector)) > SECOND_PASS * before:
            break
    return correction
