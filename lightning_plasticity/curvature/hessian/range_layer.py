"""One linear layer's coordinates in the range of the Hessian, and its part of a product with the Hessian.

With inputs x~ = [x, 1] (N, d_in + 1; no 1 without a bias) and output gradients g (N, d_out), the layer's rows of the
Hessian are (R g)^T x~ + g^T (R x~): every column lies in {A Qx + Qg^T B}, with Qx and Qg orthonormal bases of the rows
of x~ and g, x~ = Lx Qx and g = Lg Qg. A vector V (d_out, d_in + 1) of the layer is kept as A = V Qx^T (d_out, r_x) and
B = Qg V (I - Qx^T Qx) (r_g, d_in + 1), the Euclidean inner product unchanged. Derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RowBasis:
    """``rows = left @ basis`` with ``basis`` (r, d) orthonormal and ``left`` (N, r); None is the identity."""

    left: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, rows: Tensor) -> RowBasis:
        """The basis of (N, d) rows, without directions that are rounding; all of the space for d rows or more.

        Each row is brought to length 1 first, which leaves their span as it is. A direction counts when its singular
        value then exceeds eps of the rows' dtype times the largest: dropping the others changes each sample's row, and
        its part of a product, by no more than rounding does, also where another sample is a million times as long.
        Keeping too many only adds eigenvalues zero. In float64, since in float32 the basis would be off by that much.
        """
        if len(rows) >= rows.shape[1]:
            return cls(rows, None)
        wide = rows.double()
        lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        left, values, right = torch.linalg.svd(wide / lengths.where(lengths > 0, 1.0), full_matrices=False)
        rank = int((values > torch.finfo(rows.dtype).eps * values[:1]).sum())
        left = lengths * left[:, :rank] * values[:rank]
        return cls(left.to(rows.dtype), right[:rank].to(rows.dtype).contiguous())

    @property
    def rank(self) -> int:
        """How many directions r there are."""
        return self.left.shape[1]

    def into(self, vectors: Tensor) -> Tensor:
        """(..., d) vectors in coordinates, (..., r); with fewer than d entries the last ones are zero."""
        return vectors if self.basis is None else vectors @ self.basis[:, : vectors.shape[-1]].T

    def out_of(self, coordinates: Tensor, size: int) -> Tensor:
        """The first ``size`` entries of the vectors that have these coordinates, (..., r) -> (..., size)."""
        return coordinates[..., :size] if self.basis is None else coordinates @ self.basis[:, :size]


@dataclass(frozen=True)
class RangeLayer:
    """What a product needs of one layer, for its live units only: the others have neither values nor derivatives.

    Attributes:
        weight: (d_out, d_in).
        parameters: the chosen parameters, weight first; none when the layer only passes derivatives on.
        rows: (d_out,) which rows of the parameters the live outputs are.
        columns: (d_in,) which columns of the weight the live inputs are.
        slope: (N, d_in) first derivative of the activation before the layer; None in the first layer.
        bend: (N, d_in) its second derivative times the gradient at the inputs; None where it is zero.
        gradients: (N, d_out) g, at the outputs.
        inputs: basis of x~; None when the layer has no coordinates.
        outputs: basis of g; None when there is no B: in the first layer, whose inputs depend on no parameter, and where
            Qx spans everything.
    """

    weight: Tensor
    parameters: tuple[nn.Parameter, ...]
    rows: Tensor
    columns: Tensor
    slope: Tensor | None
    bend: Tensor | None
    gradients: Tensor
    inputs: RowBasis | None
    outputs: RowBasis | None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and of B; (0, 0) for what the layer does not have."""
        first = (0, 0) if self.inputs is None else (len(self.weight), self.inputs.rank)
        second = (0, 0) if self.inputs is None or self.outputs is None else (self.outputs.rank, self._width)
        return first, second

    @property
    def dim(self) -> int:
        """Dimension of the layer's subspace: the rows of B are orthogonal to Qx."""
        (outputs, rank_x), (rank_g, width) = self.shapes
        return outputs * rank_x + rank_g * (width - rank_x)

    @property
    def _width(self) -> int:
        return self.weight.shape[1] + len(self.parameters) - 1

    def forward(self, x: Tensor | None, a: Tensor) -> Tensor:
        """R z (N, d_out) from R x (N, d_in), None in the first layer, and A: Lx A^T + (R x) W^T."""
        if x is None:
            assert self.inputs is not None
            return self.inputs.left @ a.T
        tangent = x @ self.weight.T
        return tangent if self.inputs is None else tangent.addmm_(self.inputs.left, a.T)

    def backward(self, gradient: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """R g at the inputs (N, d_in) from R g at the outputs: (R g) W + g V, the latter Lg ((Qg A) Qx + B)."""
        through = gradient @ self.weight
        if self.inputs is None:
            return through
        num_inputs = through.shape[1]
        if self.inputs.basis is None:
            return through.addmm_(self.gradients, a[:, :num_inputs])
        basis = self.inputs.basis[:, :num_inputs]
        if self.outputs is None:
            return through.addmm_(self.gradients @ a, basis)
        projected = a if self.outputs.basis is None else self.outputs.basis @ a
        inner = torch.addmm(b[:, :num_inputs], projected, basis)
        return through.addmm_(self.outputs.left, inner)

    def write_product(self, x: Tensor | None, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        """A <- Rg^T Lx + g^T (Rx~ Qx^T) and B <- Lg^T (Rx~ - (Rx~ Qx^T) Qx), with Rx~ = [Rx, 0]."""
        if self.inputs is None:
            return
        torch.mm(gradient.T, self.inputs.left, out=a)
        if x is None:
            return
        num_inputs, basis = x.shape[1], self.inputs.basis
        if basis is None:
            a[:, :num_inputs].addmm_(self.gradients.T, x)
            return
        coordinates = self.inputs.into(x)  # (N, r_x)
        a.addmm_(self.gradients.T, coordinates)
        if self.outputs is not None:
            rest = coordinates @ basis
            torch.sub(x, rest[:, :num_inputs], out=rest[:, :num_inputs])
            rest[:, num_inputs:].neg_()
            torch.mm(self.outputs.left.T, rest, out=b)

    def restrict(self, matrices: dict[nn.Parameter, Tensor], a: Tensor, b: Tensor) -> None:
        """Write the coordinates of the projection of V, given by its parameters (d_out, ...), to A and B."""
        if self.inputs is None:
            return
        parts = [matrices[parameter][self.rows] for parameter in self.parameters]
        direction = torch.cat([parts[0][:, self.columns], *parts[1:]], dim=1)
        a.copy_(self.inputs.into(direction))
        if self.outputs is not None:
            b.copy_(self.outputs.into(direction.T).T)
            b.sub_(self.inputs.out_of(self.inputs.into(b), b.shape[1]))

    def expand(self, matrices: dict[nn.Parameter, Tensor], a: Tensor, b: Tensor) -> None:
        """Write V = A Qx + Qg^T B to its parameters; what belongs to no live unit stays."""
        if self.inputs is None:
            return
        direction = self.inputs.out_of(a, self._width)
        if self.outputs is not None:
            direction = direction + self.outputs.out_of(b.T, len(self.weight)).T
        num_inputs = self.weight.shape[1]
        matrices[self.parameters[0]][self.rows[:, None], self.columns] = direction[:, :num_inputs]
        for bias in self.parameters[1:]:
            matrices[bias][self.rows] = direction[:, num_inputs:]

    def free_rows(self) -> Tensor:
        """(d_in + 1 - r_x, d_in + 1) orthonormal rows, orthogonal to Qx: what a row of B may be."""
        assert self.inputs is not None
        assert self.inputs.basis is not None
        whole: Tensor = torch.linalg.qr(self.inputs.basis.double().T, mode="complete").Q
        return whole[:, self.inputs.rank :].T.to(self.weight.dtype)
