"""The Kronecker block of a masked layer: a mask does not factorise, so each output unit has a block of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_plasticity.curvature.kronecker.block import KroneckerBlock, factor_eigenvalues
from lightning_plasticity.linalg import Estimate, effective_rank_of

BATCH = 2**24  # entries of factors that are decomposed together


@dataclass(frozen=True, eq=False)
class MaskedBlock(KroneckerBlock):
    """A x B restricted to the k active entries of a masked weight (and the bias), terms between output units left out.

    Of the restricted A x B the diagonal block of output unit o, with active inputs S_o, is B_oo A[S_o, S_o]; the
    eigenvalues are those of all of these blocks. That is exact for a diagonal B, as under a squared loss at the last
    layer; elsewhere the trace stays that of the restricted A x B, and its largest eigenvalue may be missed. ``rank``
    counts the nonzero ones; ranks and eigenvalues of the factors are those of A and B as they are, over all entries.
    Derived here.

    Attributes:
        mask: (O, D) bool, active entries; with the bias its column too.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import MaskedBlock
        >>> a, b = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 5.0]))
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> block = MaskedBlock("net.0", ("net.0.weight",), a.double(), b.double(), mask=mask)
        >>> block.eigenvalues(), block.num_params  # 2 * 3, and 5 * (1, 3)
        (tensor([ 5.,  6., 15.], dtype=torch.float64), 3)
    """

    mask: Tensor = field(kw_only=True)

    @property
    def num_params(self) -> int:
        """k, the number of active coordinates."""
        return int(torch.count_nonzero(self.mask))

    @property
    def rank(self) -> int:
        """How many of the k eigenvalues are not zero."""
        return int((self._values > 0).sum())

    @property
    def max_abs(self) -> float:
        """The largest eigenvalue."""
        return float(self._values[-1])

    def eigenvalues(self) -> Tensor:
        """(k,) float64, ascending."""
        return self._values

    def count_above(self, threshold: float) -> int:
        """How many eigenvalues exceed a nonnegative threshold."""
        return len(self._values) - int(torch.searchsorted(self._values, threshold, right=True))

    def effective_rank(self) -> Estimate:
        """Roy and Vetterli 2007, of the k eigenvalues."""
        return Estimate.exactly(float(effective_rank_of(self._values)))

    def trace(self) -> Estimate:
        """Sum of B_oo tr(A[S_o, S_o])."""
        return Estimate.exactly(float(self._values.sum()))

    def frobenius_norm(self) -> Estimate:
        """Root of the sum of all squared eigenvalues."""
        return Estimate.exactly(float(self._values.norm()))

    def lambda_max(self) -> Estimate:
        """Largest eigenvalue."""
        return Estimate.exactly(self.max_abs)

    def lambda_min(self) -> Estimate:
        """Smallest eigenvalue."""
        return Estimate.exactly(float(self._values[0]))

    @cached_property
    def _values(self) -> Tensor:
        """Units with the same inputs share one decomposition, and those with as many are decomposed together."""
        patterns, units = torch.unique(self.mask, dim=0, return_inverse=True)
        diagonal = self.output_factor.diagonal().clamp_min(0.0)
        found = []
        for size in patterns.sum(1).unique().tolist():
            if not size:
                continue
            alike = (patterns.sum(1) == size).nonzero()[:, 0]
            for chosen in alike.split(max(1, BATCH // size**2)):
                entries = patterns[chosen].nonzero()[:, 1].view(len(chosen), size)
                factors = self.input_factor[entries[:, :, None], entries[:, None]]
                values = factor_eigenvalues(factors, self.dtype)
                for row, pattern in enumerate(chosen.tolist()):
                    found.append(torch.outer(diagonal[units == pattern], values[row]).flatten())
        return torch.cat(found).sort().values
