"""The loss-weighted Gram matrix S^T J J^T S as an operator: the NTK between two products with S."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plasticity.curvature.ntk_operator import NtkOperator


class WeightedOperator:
    """Products with S^T J J^T S on vectors in the order of the Gram matrix's rows, (column, sample).

    Args:
        ntk: J J^T / N.
        columns: (R, N_b, ...) columns of S in each batch, shaped like its outputs.
    """

    def __init__(self, ntk: NtkOperator, columns: Sequence[Tensor]) -> None:
        self._ntk = ntk
        self._columns = torch.cat([part.flatten(2) for part in columns], dim=1).to(ntk.device, ntk.dtype)  # (R, N, O)

    def matvec(self, vector: Tensor) -> Tensor:
        """(R N,) -> (R N,)."""
        num_columns, num_samples, size = self._columns.shape
        pulled = torch.einsum("rno,rn->on", self._columns, vector.view(num_columns, num_samples))
        pushed = self._ntk.matvec(pulled.flatten()).view(size, num_samples) * num_samples
        return torch.einsum("rno,on->rn", self._columns, pushed).flatten()
