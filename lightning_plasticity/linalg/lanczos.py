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

from lightning_plasticity.linalg.krylov_basis import KrylovBasis
from lightning_plasticity.linalg.progress import Count

Matvec = Callable[[Tensor], Tensor]

# Relative size of beta at which the Krylov space counts as exhausted: the rounding of one product.
BREAKDOWN = {torch.float64: 1e-13, torch.float32: 2e-6}
STILL_ORTHOGONAL = 6  # steps before which no basis is needed to tell a wrong product from lost orthogonality
NORM_BLOCK = 65_536  # coordinates whose squares are added in the vector's own precision


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """Coefficients of one Lanczos run: ``V^T H V = tridiag(beta, alpha, beta)``.

    Attributes:
        alpha: (K,) float64, diagonal of the Jacobi matrix.
        beta: (K,) float64, off-diagonals; the last one is the norm of what the K steps left over.
        breakdown: whether an invariant subspace was found (``beta[-1]`` is rounding); the run is then exact
            for its start vector.
        basis: (K, P) the orthonormal vectors, in the operator's dtype, or None when they were not asked for.
        num_products: operator applications used, one for each step.
        asymmetry: the largest ``|<v_j, H v_k>|``, j < k - 1, relative to the largest coefficient so far: rounding where
            the operator is symmetric.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    breakdown: bool
    basis: Tensor | None
    num_products: int
    asymmetry: float = 0.0

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ritz values (K,), ascending, and the eigenvectors (K, K) of the Jacobi matrix, by columns."""
        nodes, vectors = eigh_tridiagonal(self.alpha, self.beta[:-1])
        return nodes, vectors


def lanczos(
    matvec: Matvec,
    start: Tensor,
    num_steps: int,
    *,
    keep_basis: bool = False,
    first_product: Tensor | None = None,
    storage: torch.dtype | None = None,
    reorthogonalise: bool = True,
    stop: Callable[[int], bool] | None = None,
) -> LanczosResult:
    """Run Lanczos from ``start`` for at most ``num_steps`` steps.

    The basis is kept in the operator's dtype and each new vector is swept once against all of it (a second time when
    little of it is left): float32 then loses no orthogonality that matters, while the coefficients are float64.

    Source: Lanczos 1950; full reorthogonalisation as in Golub and Van Loan, Matrix Computations, 4th ed., 10.3.1.

    Args:
        matvec: product with a symmetric operator, (P,) -> (P,), same dtype and device as ``start``; it may return the
            same tensor every time.
        start: (P,) any nonzero vector; normalised here.
        num_steps: at most this many products; at most P are done.
        keep_basis: whether the result holds the (K, P) basis.
        first_product: (P,) the product with ``start``, where it is known already; one application less.
        storage: dtype in which the basis is kept; ``torch.float16`` halves its memory, None is the dtype of ``start``.
        reorthogonalise: False keeps no basis, only three vectors. Eigenvalues that have converged then come back as
            copies (Paige 1971), which ``LanczosQuadrature(merge=...)`` takes together.
        stop: asked before step k = 1, 2, ... with the number of steps done; True ends the run there.

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
    norm = _norm(start)
    if not norm > 0 or not np.isfinite(norm):
        raise ValueError(f"The start vector has norm {norm}; pass a finite nonzero vector, e.g. torch.randn.")
    num_steps = min(num_steps, start.numel())
    if keep_basis and not reorthogonalise:
        raise ValueError("keep_basis=True needs reorthogonalise=True: without it there is no basis to keep.")
    basis = KrylovBasis(num_steps if reorthogonalise else 0, start.numel(), start.dtype, start.device, storage)
    alpha, beta = np.zeros(num_steps), np.zeros(num_steps)
    scale, asymmetry, tolerance = 0.0, 0.0, BREAKDOWN.get(start.dtype, BREAKDOWN[torch.float32])
    previous, vector, exhausted, done = None, start / norm, False, 0
    count = Count("Lanczos steps", num_steps)
    while done < num_steps and not exhausted and not (done and stop is not None and stop(done)):
        product = matvec(vector) if done or first_product is None else first_product / norm
        alpha[done] = float(torch.dot(vector, product))
        if not np.isfinite(alpha[done]):
            raise ValueError(
                f"Product {done + 1} of the operator is not finite; the loss or the weights are NaN or inf."
            )
        # Not in place: the product may be the operator's own tensor.
        rest = torch.sub(product, vector, alpha=float(alpha[done]))
        if previous is not None:
            rest.sub_(previous, alpha=float(beta[done - 1]))
        distant = 0.0
        if reorthogonalise:
            basis.append(vector)
            coefficients = basis.sweep(rest)
            alpha[done] += float(coefficients[-1])
            distant = float(coefficients[:-2].abs().max()) if done > 1 else 0.0
        elif 1 < done < STILL_ORTHOGONAL:
            distant = abs(float(torch.dot(start, rest))) / norm
        beta[done] = _norm(rest)
        scale = max(scale, abs(alpha[done]), beta[done])
        asymmetry = max(asymmetry, distant / scale if scale else 0.0)
        exhausted = bool(beta[done] <= tolerance * scale)
        done += 1
        count.add()
        if not exhausted and done < num_steps:
            previous, vector = vector, rest.div_(float(beta[done - 1]))
    return LanczosResult(
        alpha[:done],
        beta[:done],
        breakdown=exhausted or done == start.numel(),
        basis=basis.vectors() if keep_basis else None,
        num_products=done,
        asymmetry=asymmetry,
    )


def _norm(vector: Tensor) -> float:
    """Euclidean norm, in blocks whose norms are added in float64: long float32 sums lose digits."""
    if vector.dtype == torch.float64:
        return float(torch.linalg.vector_norm(vector))
    blocks = [torch.linalg.vector_norm(block) for block in torch.split(vector, NORM_BLOCK)]
    return float(torch.linalg.vector_norm(torch.stack(blocks).double()))
