"""The neural tangent kernel as an operator: one vector-Jacobian and one Jacobian-vector product at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.output_jacobian import OutputJacobian


class NtkOperator:
    """Products with J J^T / N on vectors in the order of the Gram matrix's rows, (output, sample).

    Args:
        outputs: (N_b, ...) outputs of each batch, with their graphs; as many per sample in each.
        parameters: what J is taken with respect to.
    """

    def __init__(self, outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._jacobian = OutputJacobian(outputs, parameters)
        self._shapes = [out.shape for out in outputs]
        self._sizes = [len(out) for out in outputs]
        self.dtype, self.device = outputs[0].dtype, outputs[0].device

    def matvec(self, vector: Tensor) -> Tensor:
        """(C N,) -> (C N,)."""
        parts = torch.split(vector.reshape(-1, sum(self._sizes)), self._sizes, dim=1)
        directions = [part.T.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        pushed = self._jacobian.push(self._jacobian.pull(directions))
        return torch.cat([part.reshape(len(part), -1).T for part in pushed], dim=1).flatten() / sum(self._sizes)
