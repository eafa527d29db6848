"""Square roots of a loss's Hessian in the outputs, as operators: S with S S^T = H_out, block by block for the samples.

``OutputLoss.hessian_root`` makes them. A vector in the range of S^T is (R, N): R entries for each sample, in the order
of the Gram matrix's rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputRoot(ABC):
    """A root S of the Hessian in the outputs.

    Attributes:
        shape: (N, ...) of the outputs.
    """

    shape: torch.Size

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """R, columns for each sample."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """S v: (R, N) -> (N, ...)."""

    @abstractmethod
    def transpose(self, outputs: Tensor) -> Tensor:
        """S^T u: (N, ...) -> (R, N)."""

    @abstractmethod
    def columns(self) -> Tensor:
        """(R, N, ...) the columns S_r, each shaped like the outputs: sum_r S_r S_r^T is the Hessian of each sample."""

    @abstractmethod
    def scaled(self, factor: float) -> OutputRoot:
        """S times a factor."""

    @property
    def num_samples(self) -> int:
        """N."""
        return self.shape[0]


@dataclass(frozen=True)
class SoftmaxRoot(OutputRoot):
    """Of cross-entropy, S = sqrt(omega) diag(sqrt p) Q, so that S S^T = omega (diag p - p p^T); products take O(C).

    Q is the first C - 1 columns of the Householder matrix that maps sqrt(p) to -e_C.

    Attributes:
        root: (N, C, T) sqrt p at each position.
        weights: (N, T) sqrt omega.
    """

    root: Tensor
    weights: Tensor

    @property
    def num_columns(self) -> int:
        """T (C - 1)."""
        return (self.root.shape[1] - 1) * self.root.shape[2]

    @property
    def _u(self) -> Tensor:
        """(N, C, T): Q z = (z, 0) - u (u, z) / u_C. Nothing cancels in u, since sqrt p >= 0."""
        u = self.root.clone()
        u[:, -1] += 1.0
        return u

    def apply(self, vector: Tensor) -> Tensor:
        """S v: (R, N) -> (N, ...)."""
        num_samples, num_classes, num_positions = self.root.shape
        u = self._u
        inner = vector.to(u.dtype).reshape(num_positions, num_classes - 1, num_samples).permute(2, 1, 0)
        rotated = u * (-(u[:, :-1] * inner).sum(1, keepdim=True) / u[:, -1:])
        rotated[:, :-1] += inner
        return (rotated * self.root * self.weights[:, None]).reshape(self.shape)

    def transpose(self, outputs: Tensor) -> Tensor:
        """S^T u: (N, ...) -> (R, N)."""
        u = self._u
        scaled = outputs.reshape(self.root.shape) * self.root * self.weights[:, None]
        inner = scaled[:, :-1] - u[:, :-1] * ((u * scaled).sum(1, keepdim=True) / u[:, -1:])
        return inner.permute(2, 1, 0).reshape(self.num_columns, -1)

    def columns(self) -> Tensor:
        """(R, N, ...)."""
        _, num_classes, num_positions = self.root.shape
        u = self._u
        factor = self.root.new_zeros(num_positions, num_classes - 1, *self.root.shape)
        for t in range(num_positions):
            q = -u[:, :, None, t] * u[:, None, :-1, t] / u[:, -1:, None, t]  # (N, C, C-1)
            q += torch.eye(num_classes, num_classes - 1, dtype=q.dtype, device=q.device)
            factor[t, :, :, :, t] = (self.root[:, :, None, t] * q * self.weights[:, None, None, t]).permute(2, 0, 1)
        return factor.reshape(self.num_columns, *self.shape)

    def scaled(self, factor: float) -> OutputRoot:
        """S times a factor."""
        return replace(self, weights=self.weights * factor)


@dataclass(frozen=True)
class DiagonalRoot(OutputRoot):
    """Of a loss that is a sum over outputs; R is the number of outputs of a sample.

    Attributes:
        root: (N, ...) roots of the second derivatives.
    """

    root: Tensor

    @property
    def num_columns(self) -> int:
        """O."""
        return self.shape[1:].numel()

    def apply(self, vector: Tensor) -> Tensor:
        """S v: (R, N) -> (N, ...)."""
        return vector.T.reshape(self.shape) * self.root

    def transpose(self, outputs: Tensor) -> Tensor:
        """S^T u: (N, ...) -> (R, N)."""
        return (outputs * self.root).reshape(self.num_samples, -1).T

    def columns(self) -> Tensor:
        """(R, N, ...)."""
        flat = self.root.reshape(self.num_samples, -1)
        return torch.diag_embed(flat).permute(1, 0, 2).reshape(-1, *self.shape)

    def scaled(self, factor: float) -> OutputRoot:
        """S times a factor."""
        return replace(self, root=self.root * factor)


@dataclass(frozen=True)
class DenseRoot(OutputRoot):
    """Of any other loss.

    Attributes:
        matrix: (R, N, ...) its columns.
    """

    matrix: Tensor

    @property
    def num_columns(self) -> int:
        """R."""
        return len(self.matrix)

    def apply(self, vector: Tensor) -> Tensor:
        """S v: (R, N) -> (N, ...)."""
        return torch.einsum("rn...,rn->n...", self.matrix, vector.to(self.matrix.dtype))

    def transpose(self, outputs: Tensor) -> Tensor:
        """S^T u: (N, ...) -> (R, N)."""
        flat = self.matrix.reshape(*self.matrix.shape[:2], -1)
        return torch.einsum("rno,no->rn", flat, outputs.reshape(self.num_samples, -1).to(flat.dtype))

    def columns(self) -> Tensor:
        """(R, N, ...)."""
        return self.matrix

    def scaled(self, factor: float) -> OutputRoot:
        """S times a factor."""
        return replace(self, matrix=self.matrix * factor)
