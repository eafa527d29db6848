"""The Jacobian of outputs with respect to parameters as an operator, and the curvature matrices that it makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.backward import pulled_back
from lightning_plasticity.curvature.loss.output_root import OutputRoot


class OutputJacobian:
    """J of several batches of outputs.

    J v is the derivative of u -> J^T u along v, by a second backward pass: no forward-mode rules are needed. The graphs
    of all batches are kept.

    Args:
        outputs: (N_b, ...) outputs of each batch, with their graphs.
        parameters: what J is taken with respect to.
    """

    def __init__(self, outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._outputs = list(outputs)
        self.parameters = list(parameters)
        self._dummies = [torch.zeros_like(out, requires_grad=True) for out in outputs]
        self._pulled = [
            torch.autograd.grad(out, self.parameters, dummy, create_graph=True, allow_unused=True)
            for out, dummy in zip(self._outputs, self._dummies, strict=True)
        ]
        dtypes = [tensor.dtype for tensor in (*outputs, *parameters)]
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)  # as precise as the least precise part
        self.device = outputs[0].device
        self.num_params = sum(parameter.numel() for parameter in self.parameters)

    def pull(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """J^T u: a direction shaped like the outputs of each batch, to a tensor for each parameter."""
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        for out, direction in zip(self._outputs, directions, strict=True):
            pulled = pulled_back(out, self.parameters, direction)
            total = [t + p for t, p in zip(total, pulled, strict=True)]
        return total

    def push(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """J v: a tensor for each parameter, to one shaped like the outputs for each batch."""
        pairs = zip(self._pulled, self._dummies, strict=True)
        return [self._push(pulled, dummy, direction) for pulled, dummy in pairs]

    def _push(self, pulled: Sequence[Tensor | None], dummy: Tensor, direction: Sequence[Tensor]) -> Tensor:
        pairs = [(p, d) for p, d in zip(pulled, direction, strict=True) if p is not None and p.requires_grad]
        if not pairs:
            return torch.zeros_like(dummy)
        (pushed,) = torch.autograd.grad(
            [p for p, _ in pairs], dummy, [d for _, d in pairs], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(dummy) if pushed is None else pushed


class DualOperator:
    """Products with S^T J J^T S, which has the nonzero eigenvalues of J^T S S^T J; never formed.

    Args:
        jacobian: J.
        roots: S of each batch.
    """

    def __init__(self, jacobian: OutputJacobian, roots: Sequence[OutputRoot]) -> None:
        self._jacobian, self._roots = jacobian, list(roots)
        self._sizes = [root.num_columns * root.num_samples for root in roots]
        self.dim = sum(self._sizes)

    def matvec(self, vector: Tensor) -> Tensor:
        """(M,) -> (M,), M = sum of R_b N_b."""
        parts = torch.split(vector, self._sizes)
        directions = [
            root.apply(part.view(-1, root.num_samples)) for root, part in zip(self._roots, parts, strict=True)
        ]
        pushed = self._jacobian.push(self._jacobian.pull(directions))
        rows = [root.transpose(part).flatten() for root, part in zip(self._roots, pushed, strict=True)]
        return torch.cat(rows).to(vector.dtype)


class PrimalOperator:
    """Products with J^T S S^T J itself, for fewer parameters than rows; never formed.

    Args:
        jacobian: J.
        roots: S of each batch.
        active: (P,) bool, the k coordinates to which the matrix is restricted; None for all.
    """

    def __init__(self, jacobian: OutputJacobian, roots: Sequence[OutputRoot], active: Tensor | None = None) -> None:
        self._jacobian, self._roots = jacobian, list(roots)
        self._places = None if active is None else active.nonzero()[:, 0]
        self.dim = jacobian.num_params if self._places is None else len(self._places)

    def matvec(self, vector: Tensor) -> Tensor:
        """(k,) -> (k,), with k = P where all coordinates are active."""
        if self._places is None:
            return self._product(vector)
        whole = vector.new_zeros(self._jacobian.num_params).index_copy_(0, self._places, vector)
        return self._product(whole)[self._places]

    def _product(self, vector: Tensor) -> Tensor:
        parameters = self._jacobian.parameters
        parts = torch.split(vector, [parameter.numel() for parameter in parameters])
        pushed = self._jacobian.push([part.view_as(p).to(p.dtype) for p, part in zip(parameters, parts, strict=True)])
        directions = [root.apply(root.transpose(part)) for root, part in zip(self._roots, pushed, strict=True)]
        return torch.cat([part.flatten().to(vector.dtype) for part in self._jacobian.pull(directions)])
