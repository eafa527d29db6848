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
    def solve(self, outputs: Tensor) -> Tensor:
        """S^+ u: (N, ...) -> (R, N), the v of least norm for which S v comes closest to u."""

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

    Q is the Householder matrix I - u u^T / u_k with u = sqrt(p) + e_k, which maps sqrt(p) to -e_k, without its column
    k. With k the most likely class of each sample and position no entry of Q suffers from cancellation: those of row k
    are -sqrt(p_j), and 1 - p_j / u_k on the diagonal has p_j <= 1/2. Class k stands last here, in the last one's place.

    Attributes:
        root: (N, C, T) sqrt p at each position.
        pivot: (N, 1, T) k, with which the last class has changed places in ``root``.
        weights: (N, T) sqrt omega.
    """

    root: Tensor
    pivot: Tensor
    weights: Tensor

    @classmethod
    def of(cls, shape: torch.Size, probabilities: Tensor, weights: Tensor) -> SoftmaxRoot:
        """From p (N, C, T) and omega (N, T)."""
        pivot = probabilities.argmax(dim=1, keepdim=True)
        return cls(shape, _exchanged(probabilities.sqrt(), pivot), pivot, weights.sqrt())

    @property
    def num_columns(self) -> int:
        """T (C - 1)."""
        return (self.root.shape[1] - 1) * self.root.shape[2]

    @property
    def _u(self) -> Tensor:
        """(N, C, T): Q z = (z, 0) - u (u, z) / u_k. Nothing cancels in u, since sqrt p >= 0."""
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
        return _exchanged(rotated * self.root * self.weights[:, None], self.pivot).reshape(self.shape)

    def transpose(self, outputs: Tensor) -> Tensor:
        """S^T u: (N, ...) -> (R, N)."""
        scaled = _exchanged(outputs.reshape(self.root.shape), self.pivot) * self.root * self.weights[:, None]
        return self._reflected(scaled)

    def solve(self, outputs: Tensor) -> Tensor:
        """S^+ u = Q^T u / (sqrt(omega p)): (N, ...) -> (R, N); as accurate as u / sqrt(p), however small a p is."""
        scale = self.root * self.weights[:, None]
        return self._reflected(_divided(_exchanged(outputs.reshape(self.root.shape), self.pivot), scale))

    def _reflected(self, values: Tensor) -> Tensor:
        """Q^T u: (N, C, T) -> (R, N)."""
        u = self._u
        inner = values[:, :-1] - u[:, :-1] * ((u * values).sum(1, keepdim=True) / u[:, -1:])
        return inner.permute(2, 1, 0).reshape(self.num_columns, len(values))

    def columns(self) -> Tensor:
        """(R, N, ...)."""
        _, num_classes, num_positions = self.root.shape
        u = self._u
        factor = self.root.new_zeros(num_positions, num_classes - 1, *self.root.shape)
        for t in range(num_positions):
            q = -u[:, :, None, t] * u[:, None, :-1, t] / u[:, -1:, None, t]  # (N, C, C-1)
            q += torch.eye(num_classes, num_classes - 1, dtype=q.dtype, device=q.device)
            q *= (self.root * self.weights[:, None])[:, :, None, t]
            factor[t, :, :, :, t] = _exchanged(q, self.pivot[:, :, None, t]).permute(2, 0, 1)
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

    def solve(self, outputs: Tensor) -> Tensor:
        """S^+ u: (N, ...) -> (R, N)."""
        return _divided(outputs, self.root).reshape(self.num_samples, -1).T

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

    def solve(self, outputs: Tensor) -> Tensor:
        """S^+ u: (N, ...) -> (R, N). Rows are scaled alike first: where a solution exists that does not change it."""
        flat = self.matrix.flatten(2).permute(1, 2, 0)  # (N, O, R)
        norms = flat.norm(dim=2, keepdim=True)
        norms = norms.where(norms > 0, 1.0)
        values = outputs.reshape(self.num_samples, -1, 1).to(flat.dtype)
        solution: Tensor = torch.linalg.pinv(flat / norms) @ (values / norms)
        return solution[:, :, 0].T

    def columns(self) -> Tensor:
        """(R, N, ...)."""
        return self.matrix

    def scaled(self, factor: float) -> OutputRoot:
        """S times a factor."""
        return replace(self, matrix=self.matrix * factor)


def _exchanged(values: Tensor, pivot: Tensor) -> Tensor:
    """(N, C, ...) with class ``pivot`` (N, 1, ...) and the last one in each other's places."""
    index = pivot.expand(-1, -1, *values.shape[2:])
    moved = values.scatter(1, index, values[:, -1:])
    moved[:, -1:] = values.gather(1, index)
    return moved


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """Values / scale, zero where the scale is."""
    live = scale != 0
    return torch.where(live, values / scale.where(live, 1.0), 0.0)
