"""The neural tangent kernel as an operator: one vector-Jacobian and one Jacobian-vector product at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NtkOperator:
    """Products with J J^T / N on vectors in the order of the Gram matrix's rows, (output, sample).

    J v is the derivative of u -> J^T u along v, by a second backward pass: no forward-mode rules are needed. The graphs
    of all batches are kept.

    Args:
        outputs: (N_b, ...) outputs of each batch, with their graphs; as many per sample in each.
        parameters: what J is taken with respect to.
    """

    def __init__(self, outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._outputs = list(outputs)
        self._parameters = list(parameters)
        self._dummies = [torch.zeros_like(out, requires_grad=True) for out in outputs]
        self._pulled = [
            torch.autograd.grad(out, self._parameters, dummy, create_graph=True, allow_unused=True)
            for out, dummy in zip(self._outputs, self._dummies, strict=True)
        ]
        self._sizes = [len(out) for out in outputs]
        self.dtype, self.device = outputs[0].dtype, outputs[0].device

    def matvec(self, vector: Tensor) -> Tensor:
        """(C N,) -> (C N,)."""
        parts = torch.split(vector.reshape(-1, sum(self._sizes)), self._sizes, dim=1)
        total = [torch.zeros_like(parameter) for parameter in self._parameters]
        for out, part in zip(self._outputs, parts, strict=True):
            pulled = torch.autograd.grad(
                out, self._parameters, part.T.reshape(out.shape), retain_graph=True, allow_unused=True
            )
            total = [t if p is None else t + p for t, p in zip(total, pulled, strict=True)]
        rows = [
            self._push(pulled, dummy, total).reshape(size, -1).T
            for pulled, dummy, size in zip(self._pulled, self._dummies, self._sizes, strict=True)
        ]
        return torch.cat(rows, dim=1).flatten() / sum(self._sizes)

    def _push(self, pulled: Sequence[Tensor | None], dummy: Tensor, direction: Sequence[Tensor]) -> Tensor:
        """J direction, for one batch."""
        pairs = [(p, d) for p, d in zip(pulled, direction, strict=True) if p is not None and p.requires_grad]
        if not pairs:
            return torch.zeros_like(dummy)
        (pushed,) = torch.autograd.grad(
            [p for p, _ in pairs], dummy, [d for _, d in pairs], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(dummy) if pushed is None else pushed
