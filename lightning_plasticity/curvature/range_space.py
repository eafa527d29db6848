"""The Hessian of a stack of linear layers inside its own range, for batches much smaller than the layers are wide.

With inputs x~ = [x, 1] (N, d_in + 1) and output gradients g (N, d_out), a layer's rows of the Hessian are
(R g)^T x~ + g^T (R x~): every column lies in {A Qx + Qg^T B}, with Qx and Qg orthonormal bases of the rows of x~ and g.
A vector of the layer is kept as A = V Qx^T (d_out, r_x) and B = Qg V (I - Qx^T Qx) (r_g, d_in + 1), the Euclidean inner
product unchanged; N (d_in + d_out) numbers in place of d_in d_out. The first layer's inputs depend on no parameter, so
that it has no B. The other directions have eigenvalue zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.linear_stack import StackLayer, linear_stack, shapes

# How far the product may be from double backward, relative to it, in each parameter; and relative to the whole of it.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6}
# Multiply-adds of a matrix product in the time that Gram-Schmidt takes for one coordinate of one basis vector: it is
# bound by memory (0.6 ns for 0.028 ns on one core).
SWEEP_COST = 21.0


@dataclass(frozen=True)
class _RowBasis:
    """``rows = left @ basis`` with ``basis`` (r, d) orthonormal and ``left`` (N, r)."""

    left: Tensor
    basis: Tensor

    @property
    def rank(self) -> int:
        """How many directions r the rows span."""
        return len(self.basis)


@dataclass(frozen=True)
class _Layer:
    """What a product needs of one layer.

    Attributes:
        weight: (d_out, d_in).
        parameters: the chosen parameters; none when the layer only passes derivatives on.
        slope: (N, d_in) first derivative of the activation before the layer; None in the first layer.
        bend: (N, d_in) its second derivative times the gradient at the inputs; None where it is zero.
        gradients: (N, d_out) g, at the outputs.
        inputs: basis of x~; None when the layer has no coordinates.
        outputs: basis of g; None when there is no B.
    """

    weight: Tensor
    parameters: tuple[nn.Parameter, ...]
    slope: Tensor | None
    bend: Tensor | None
    gradients: Tensor
    inputs: _RowBasis | None
    outputs: _RowBasis | None

    @property
    def width(self) -> int:
        """d_in, one more with a bias."""
        return self.weight.shape[1] + len(self.parameters) - 1

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and of B; (0, 0) for what the layer does not have."""
        first = (0, 0) if self.inputs is None else (len(self.weight), self.inputs.rank)
        second = (0, 0) if self.outputs is None else (self.outputs.rank, self.width)
        return first, second

    @property
    def dim(self) -> int:
        """Dimension of the layer's subspace: the rows of B are orthogonal to Qx."""
        if self.inputs is None:
            return 0
        rank = 0 if self.outputs is None else self.outputs.rank
        return len(self.weight) * self.inputs.rank + rank * (self.width - self.inputs.rank)


class RangeOperator:
    """Products with the Hessian in coordinates of a subspace that holds its range; made by ``range_operator``.

    A coordinate vector has ``size`` numbers of which ``dim`` are free; those of ``restrict`` and ``matvec`` obey the
    constraint, and so do their sums. All nonzero eigenvalues of the Hessian are eigenvalues of this operator on the
    subspace; the other ``num_params - dim`` eigenvalues are zero.

    Weights are read at every product, so that they must not change before the last one.

    Source: Pearlmutter 1994, section 3 (the R-operator, for what is kept of one forward and one backward pass); the
    subspace is derived here, see the title.

    Attributes:
        num_params: P.
        size: numbers in a coordinate vector.
        dim: dimension of the subspace.
        num_products: products so far.
        dtype: of vectors and products.
        device: of vectors and products.
    """

    def __init__(
        self, layers: Sequence[_Layer], outputs: Tensor, output_gradients: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.parameters = list(parameters)
        self.num_params = sum(parameter.numel() for parameter in parameters)
        self.dtype, self.device = outputs.dtype, outputs.device
        self.num_products = 0
        self._layers = list(layers)
        self._outputs, self._output_gradients = outputs, output_gradients
        self._shapes = [shape for layer in layers for shape in layer.shapes]
        self._sizes = [rows * columns for rows, columns in self._shapes]
        self.size, self.dim = sum(self._sizes), sum(layer.dim for layer in layers)

    @torch.no_grad()
    def matvec(self, vector: Tensor) -> Tensor:
        """(size,) -> (size,)."""
        self.num_products += 1
        result = torch.empty(self.size, dtype=self.dtype, device=self.device)
        inputs: list[Tensor] = []  # R x, from the second layer on
        bent: list[Tensor | None] = []  # phi'' g_x R z, likewise
        tangent = torch.empty(0)  # R z (N, d_out)
        for index, (layer, (a, _)) in enumerate(self._parts(vector)):
            if index:
                bent.append(None if layer.bend is None else layer.bend * tangent)
                assert layer.slope is not None
                inputs.append(tangent.mul_(layer.slope))
                tangent = inputs[-1] @ layer.weight.T
                if layer.inputs is not None:
                    tangent.addmm_(layer.inputs.left, a.T)
            else:
                assert layer.inputs is not None
                tangent = layer.inputs.left @ a.T
        gradient = self._loss_product(tangent)  # R g (N, d_out)
        both = list(zip(self._parts(vector), self._parts(result), strict=True))
        for (layer, (a, b)), (_, (new_a, new_b)) in reversed(both[1:]):
            x = inputs.pop()
            through = gradient @ layer.weight
            if layer.inputs is not None:
                _products(layer, x, gradient, new_a, new_b)
                _add_direction(through, layer, a, b)
            assert layer.slope is not None
            gradient = through.mul_(layer.slope)
            if (extra := bent.pop()) is not None:
                gradient.add_(extra)
        (first, _), (_, (new_a, _)) = both[0]
        assert first.inputs is not None
        torch.mm(gradient.T, first.inputs.left, out=new_a)
        return result

    @torch.no_grad()
    def restrict(self, vector: Tensor) -> Tensor:
        """(P,) -> (size,): coordinates of the orthogonal projection; those of a Gaussian are one on the subspace."""
        result = torch.empty(self.size, dtype=self.dtype, device=self.device)
        matrices = self._matrices(vector)
        for layer, (a, b) in self._parts(result):
            if layer.inputs is None:
                continue
            direction = torch.cat([matrices[parameter] for parameter in layer.parameters], dim=1)  # (d_out, d_in + 1)
            torch.mm(direction, layer.inputs.basis.T, out=a)
            if layer.outputs is not None:
                torch.mm(layer.outputs.basis, direction, out=b)
                b.addmm_(b @ layer.inputs.basis.T, layer.inputs.basis, alpha=-1)
        return result

    @torch.no_grad()
    def expand(self, vector: Tensor) -> Tensor:
        """(size,) -> (P,): the vector that has these coordinates."""
        result = torch.empty(self.num_params, dtype=self.dtype, device=self.device)
        matrices = self._matrices(result)
        for layer, (a, b) in self._parts(vector):
            if layer.inputs is None:
                continue
            direction = a @ layer.inputs.basis
            if layer.outputs is not None:
                direction.addmm_(layer.outputs.basis.T, b)
            columns = [matrices[parameter].shape[1] for parameter in layer.parameters]
            for parameter, part in zip(layer.parameters, direction.split(columns, dim=1), strict=True):
                matrices[parameter].copy_(part)
        return result

    def basis(self) -> Tensor:
        """(dim, size) coordinates of an orthonormal basis of the subspace; for small ones."""
        blocks = []
        for layer in self._layers:
            if layer.inputs is None:
                continue
            rows, columns = layer.shapes[0]
            blocks.append(torch.eye(rows * columns, dtype=self.dtype, device=self.device))
            if layer.outputs is not None:
                whole = torch.linalg.qr(layer.inputs.basis.double().T, mode="complete").Q
                free = whole[:, layer.inputs.rank :].T.to(self.dtype)  # (d_in + 1 - r_x, d_in + 1)
                blocks.append(torch.block_diag(*[free] * layer.outputs.rank))
        return torch.block_diag(*blocks)

    def dense(self) -> Tensor:
        """(dim, dim) float64 matrix of the operator in ``basis``, symmetrised."""
        basis = self.basis()
        products = torch.stack([self.matvec(row) for row in basis])
        matrix = products.double() @ basis.double().T
        return 0.5 * (matrix + matrix.T)

    def _parts(self, vector: Tensor) -> Iterator[tuple[_Layer, tuple[Tensor, Tensor]]]:
        """Each layer with its A and B, as views."""
        views = [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]
        return zip(self._layers, zip(views[::2], views[1::2], strict=True), strict=True)

    def _matrices(self, vector: Tensor) -> dict[nn.Parameter, Tensor]:
        """Views of a flat vector in parameter space: a weight (d_out, d_in), a bias (d_out, 1)."""
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        return {p: part.view(len(p), -1) for p, part in zip(self.parameters, parts, strict=True)}

    def _loss_product(self, tangent: Tensor) -> Tensor:
        """(N, C) the loss's second derivatives at the outputs times a direction there."""
        product: Tensor | None = None
        if self._output_gradients.requires_grad:
            (product,) = torch.autograd.grad(
                self._output_gradients, self._outputs, tangent, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(tangent) if product is None else product


def range_operator(
    loss: Tensor, taps: LayerTaps, parameters: Sequence[nn.Parameter], probe: Tensor, product: Tensor
) -> RangeOperator | None:
    """The Hessian in its range, where the network is a stack of linear layers; None for any other network.

    The stack is recognised by the values that went in and out of the layers; the proof is that its product with the
    probe is that of double backward, to rounding.

    Args:
        loss: () the loss of one batch with its graph, evaluated inside ``taps``.
        taps: the layer calls of that evaluation.
        parameters: the parameters that count, P coordinates in all, in this order.
        probe: (P,) a Gaussian vector.
        product: (P,) the Hessian times ``probe``, by double backward.
    """
    stack = linear_stack(taps, parameters)
    if not stack or not stack[-1].outputs.requires_grad:
        return None
    outputs = stack[-1].outputs
    (gradients,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if gradients is None or not bool(torch.isfinite(gradients).all()):
        return None
    with torch.no_grad():
        layers = _with_bases(stack, gradients.detach())
    operator = RangeOperator(layers, outputs, gradients, parameters)
    found = operator.expand(operator.matvec(operator.restrict(probe)))
    operator.num_products = 0
    return operator if operator.dim and _agree(found, product, parameters) else None


def estimated_speedup(taps: LayerTaps, parameters: Sequence[nn.Parameter], num_steps: int = 100) -> float:
    """How many times faster Lanczos would be in the range than in parameter space, from shapes alone; 0 without layers.

    Counts multiply-adds of the products and the memory traffic of the reorthogonalisation; ranks are taken to be as
    large as they can be.
    """
    layers = shapes(taps, parameters)
    ordinary = restricted = num_params = size = 0.0
    for index, (num_samples, width, outputs) in enumerate(layers):
        dense, rank, rank_g = num_samples * width * outputs, min(num_samples, width), min(num_samples, outputs)
        num_params += width * outputs
        size += outputs * rank
        restricted += 2 * num_samples * outputs * rank
        ordinary += 2 * dense
        if index:
            size += width * rank_g
            ordinary += 4 * dense
            restricted += 2 * dense + num_samples * rank * (outputs + 2 * width)
            restricted += rank_g * (outputs * rank + width * rank + 2 * num_samples * width)
    sweep = SWEEP_COST * num_steps / 2
    return (ordinary + sweep * num_params) / (restricted + sweep * size) if layers else 0.0


def _products(layer: _Layer, x: Tensor, gradient: Tensor, new_a: Tensor, new_b: Tensor) -> None:
    """A' = Rg^T Lx + g^T (Rx~ Qx^T) and B' = Lg^T (Rx~ - (Rx~ Qx^T) Qx), with Rx~ = [Rx, 0]."""
    assert layer.inputs is not None
    num_inputs, basis = x.shape[1], layer.inputs.basis
    coordinates = x @ basis[:, :num_inputs].T  # (N, r_x)
    torch.mm(gradient.T, layer.inputs.left, out=new_a)
    new_a.addmm_(layer.gradients.T, coordinates)
    if layer.outputs is not None:
        rest = coordinates @ basis
        torch.sub(x, rest[:, :num_inputs], out=rest[:, :num_inputs])
        rest[:, num_inputs:].neg_()
        torch.mm(layer.outputs.left.T, rest, out=new_b)


def _add_direction(through: Tensor, layer: _Layer, a: Tensor, b: Tensor) -> None:
    """Add g V at the layer's inputs (N, d_in): Lg ((Qg A) Qx + B)."""
    assert layer.inputs is not None
    num_inputs = through.shape[1]
    basis = layer.inputs.basis[:, :num_inputs]
    if layer.outputs is None:
        through.addmm_(layer.gradients @ a, basis)
    else:
        inner = torch.addmm(b[:, :num_inputs], layer.outputs.basis @ a, basis)
        through.addmm_(layer.outputs.left, inner)


def _with_bases(stack: Sequence[StackLayer], gradients: Tensor) -> list[_Layer]:
    """One backward pass by hand, from the gradients (N, C) at the last outputs, and the bases of all rows."""
    layers: list[_Layer] = []
    for index in range(len(stack) - 1, -1, -1):
        layer = stack[index]
        inputs = outputs = None
        if layer.parameters:
            ones = layer.inputs.new_ones(len(layer.inputs), len(layer.parameters) - 1)
            inputs = _row_basis(torch.cat([layer.inputs, ones], dim=1))
            if index and inputs.rank < layer.inputs.shape[1] + ones.shape[1]:  # else nothing is orthogonal to Qx
                outputs = _row_basis(gradients)
        through = gradients @ layer.weight
        bend = None if layer.bend is None else layer.bend * through
        layers.append(_Layer(layer.weight, layer.parameters, layer.slope, bend, gradients, inputs, outputs))
        if layer.slope is not None:
            gradients = through * layer.slope
    return layers[::-1]


def _row_basis(rows: Tensor) -> _RowBasis:
    """Orthonormal basis (r, d) of the rows (N, d), without directions that are rounding.

    A direction counts when its singular value exceeds eps of the rows' dtype times the largest. Dropping the others
    changes the rows, hence a product, by no more than rounding does; keeping too many only adds zero eigenvalues. In
    float64, since in float32 the basis itself would be off by that much.
    """
    left, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int((values > torch.finfo(rows.dtype).eps * values[:1]).sum())
    return _RowBasis((left[:, :rank] * values[:rank]).to(rows.dtype), right[:rank].to(rows.dtype).contiguous())


def _agree(found: Tensor, product: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether two products are the same in each parameter; not if one is not finite."""
    sizes = [parameter.numel() for parameter in parameters]
    floor = ROUNDING[found.dtype] * float(product.norm())
    return all(
        bool((part - truth).norm() <= AGREEMENT[found.dtype] * truth.norm() + floor)
        for part, truth in zip(found.split(sizes), product.split(sizes), strict=True)
    )
