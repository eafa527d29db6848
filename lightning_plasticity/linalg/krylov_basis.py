"""The orthonormal vectors of a Krylov space, and the sweep of a new vector against them; in 16 bits where asked."""

from __future__ import annotations

import torch
from torch import Tensor

# A sweep that leaves less than this share of the vector is repeated: what is left is dominated by rounding.
SECOND_PASS = 0.1
BLOCK = 16_384  # coordinates of 16-bit vectors that are widened at a time: they stay in the cache


class KrylovBasis:
    """Room for K vectors of P coordinates, filled one after the other.

    In float16 the vectors are scaled by sqrt(P), so that their entries are of order one. That is enough: the sweep
    takes out what two full-precision subtractions have left, and rounds only that
    (docs/concepts/spectrum.md#memory has the measurement).

    Args:
        num_vectors: K.
        size: P.
        dtype: of the vectors that are swept.
        device: of all of them.
        storage: dtype in which vectors are kept; None for ``dtype``.
    """

    def __init__(
        self, num_vectors: int, size: int, dtype: torch.dtype, device: torch.device, storage: torch.dtype | None = None
    ) -> None:
        self._stored = torch.empty((num_vectors, size), dtype=storage or dtype, device=device)
        self._dtype = dtype
        self._narrow = self._stored.dtype != dtype
        self._scale = float(size) ** 0.5
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, vector: Tensor) -> None:
        """Keep a unit vector (P,)."""
        self._stored[self._count].copy_(vector * self._scale if self._narrow else vector)
        self._count += 1

    def sweep(self, vector: Tensor) -> Tensor:
        """Subtract from a vector (P,), in place, its part in the space; return its coefficients (k,).

        One pass of classical Gram-Schmidt, and a second one where little of the vector is left (Giraud et al. 2005).
        """
        before = float(torch.linalg.vector_norm(vector))
        coefficients = self._pass(vector)
        if float(torch.linalg.vector_norm(vector)) <= SECOND_PASS * before:
            coefficients += self._pass(vector)
        return coefficients

    def vectors(self) -> Tensor:
        """(k, P) in the dtype of the vectors swept."""
        stored = self._stored[: self._count]
        return stored.to(self._dtype) / self._scale if self._narrow else stored

    def _pass(self, vector: Tensor) -> Tensor:
        stored = self._stored[: self._count]
        if not self._narrow:
            coefficients = torch.mv(stored, vector)
            vector.addmv_(stored.T, coefficients, alpha=-1)
            return coefficients
        coefficients = vector.new_zeros(self._count)
        for start in range(0, len(vector), BLOCK):
            block = stored[:, start : start + BLOCK].to(self._dtype)
            coefficients.addmv_(block, vector[start : start + BLOCK], alpha=1.0 / self._scale)
        for start in range(0, len(vector), BLOCK):
            block = stored[:, start : start + BLOCK].to(self._dtype)
            vector[start : start + BLOCK].addmv_(block.T, coefficients, alpha=-1.0 / self._scale)
        return coefficients
