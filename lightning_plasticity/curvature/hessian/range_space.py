"""The Hessian of a stack of linear layers inside its own range, for batches much smaller than the layers are wide.

A layer's vector then has N (d_in + d_out) coordinates in place of d_in d_out, and a product with the Hessian 2 dense
products of N d^2 and about 9 of N^2 d in place of 6 of N d^2; all directions left out have eigenvalue zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.hessian.linear_stack import StackLayer, linear_stack, shapes
from lightning_plasticity.curvature.hessian.range_layer import RangeLayer, RowBasis
from lightning_plasticity.curvature.layers import LayerTaps

# How far the product may be from double backward, relative to it, in each parameter; and relative to the whole of it.
AGREEMENT = {torch.float64: 1e-10, torch.float32: 2e-5}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6}
# Multiply-adds of a matrix product in the time that Gram-Schmidt takes for one coordinate of one basis vector: it is
# bound by memory (0.6 ns for 0.028 ns on one core).
SWEEP_COST = 21.0
BASIS_COST = 20.0  # multiply-adds of a singular value decomposition of (N, d) rows, over N^2 d
AUTOGRAD_OVERHEAD, OVERHEAD = 2.5e6, 9e5  # multiply-adds in the time that a layer takes by itself: 70 us and 25 us
MAX_BLOCKS = 100_000  # second derivatives of the loss that are kept


class RangeOperator:
    """Products with the Hessian in coordinates of a subspace that holds its range; made by ``range_operator``.

    A coordinate vector has ``size`` numbers of which ``dim`` are free; those of ``restrict`` and ``matvec`` obey the
    constraint, and so do their sums. All nonzero eigenvalues of the Hessian are eigenvalues of this operator on the
    subspace; the other ``num_params - dim`` eigenvalues are zero.

    Weights are read at every product, so that they must not change before the last one.

    Source: Pearlmutter 1994, section 3 (the R-operator, for what is kept of one forward and one backward pass); the
    subspace is derived in ``range_layer``.

    Attributes:
        num_params: P.
        size: numbers in a coordinate vector.
        dim: dimension of the subspace.
        num_products: products so far.
        dtype: of vectors and products.
        device: of vectors and products.
    """

    def __init__(
        self, layers: Sequence[RangeLayer], outputs: Tensor, gradients: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.parameters = list(parameters)
        self.num_params = sum(parameter.numel() for parameter in parameters)
        self.dtype, self.device = outputs.dtype, outputs.device
        self.num_products = 0
        self._layers = list(layers)
        self._outputs, self._gradients = outputs, gradients
        self._shapes = [shape for layer in layers for shape in layer.shapes]
        self._sizes = [rows * columns for rows, columns in self._shapes]
        self.size, self.dim = sum(self._sizes), sum(layer.dim for layer in layers)
        self._blocks = self._per_sample()

    @torch.no_grad()
    def matvec(self, vector: Tensor) -> Tensor:
        """(size,) -> (size,)."""
        self.num_products += 1
        parts = self._split(vector)
        result = torch.empty(self.size, dtype=self.dtype, device=self.device)
        kept: list[tuple[Tensor | None, Tensor | None]] = []  # R x, and phi'' g_x R z of the layer before
        tangent: Tensor | None = None
        for layer, (a, _) in zip(self._layers, parts, strict=True):
            x = bent = None
            if tangent is not None and layer.slope is not None:
                bent = None if layer.bend is None else layer.bend * tangent
                x = tangent.mul_(layer.slope)
            kept.append((x, bent))
            tangent = layer.forward(x, a)
        assert tangent is not None
        gradient = self._loss_product(tangent)
        steps = zip(self._layers, kept, parts, self._split(result), strict=True)
        for layer, (x, bent), (a, b), (new_a, new_b) in reversed(list(steps)):
            layer.write_product(x, gradient, new_a, new_b)
            if layer.slope is not None:
                gradient = layer.backward(gradient, a, b).mul_(layer.slope)
            if bent is not None:
                gradient.add_(bent)
        return result

    @torch.no_grad()
    def restrict(self, vector: Tensor) -> Tensor:
        """(P,) -> (size,): coordinates of the orthogonal projection; a Gaussian becomes a Gaussian on the subspace."""
        result = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for layer, (a, b) in zip(self._layers, self._split(result), strict=True):
            layer.restrict(self._matrices(vector), a, b)
        return result

    @torch.no_grad()
    def expand(self, vector: Tensor) -> Tensor:
        """(size,) -> (P,): the vector that has these coordinates."""
        result = torch.zeros(self.num_params, dtype=self.dtype, device=self.device)
        for layer, (a, b) in zip(self._layers, self._split(vector), strict=True):
            layer.expand(self._matrices(result), a, b)
        return result

    def basis(self) -> Tensor:
        """(dim, size) coordinates of an orthonormal basis of the subspace; for small ones."""
        basis = torch.zeros(self.dim, self.size, dtype=self.dtype, device=self.device)
        row = column = 0
        for layer, size_a, size_b in zip(self._layers, self._sizes[::2], self._sizes[1::2], strict=True):
            basis[row : row + size_a, column : column + size_a].fill_diagonal_(1.0)
            row, column = row + size_a, column + size_a
            if size_b:
                free = layer.free_rows()
                for _ in range(layer.shapes[1][0]):
                    basis[row : row + len(free), column : column + free.shape[1]] = free
                    row, column = row + len(free), column + free.shape[1]
        return basis

    def dense(self) -> Tensor:
        """(dim, dim) float64 matrix of the operator in ``basis``, symmetrised."""
        basis = self.basis()
        products = torch.stack([self.matvec(row) for row in basis])
        matrix = products.double() @ basis.double().T
        return 0.5 * (matrix + matrix.T)

    def _split(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A and B of each layer, as views."""
        parts = torch.split(vector, self._sizes)
        views = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))

    def _matrices(self, vector: Tensor) -> dict[nn.Parameter, Tensor]:
        """Views of a flat vector in parameter space: a weight (d_out, d_in), a bias (d_out, 1)."""
        parts = torch.split(vector, [parameter.numel() for parameter in self.parameters])
        return {p: part.view(len(p), -1) for p, part in zip(self.parameters, parts, strict=True)}

    def _loss_product(self, tangent: Tensor) -> Tensor:
        """(N, C) the loss's second derivatives at the outputs times a direction there."""
        if self._blocks is not None:
            return torch.bmm(self._blocks, tangent.unsqueeze(2)).squeeze(2)
        return self._by_autograd(tangent)

    def _per_sample(self) -> Tensor | None:
        """(N, C, C) blocks of the loss's second derivatives: few, and all there are; else None."""
        num_samples, size = self._outputs.shape
        if num_samples * size**2 > MAX_BLOCKS:
            return None
        units = torch.eye(size, dtype=self.dtype, device=self.device)
        columns = [self._by_autograd(unit.expand(num_samples, size).contiguous()) for unit in units]
        blocks = torch.stack(columns, dim=2)
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(num_samples, size, generator=generator, dtype=torch.float64).to(self._outputs)
        expected, found = self._by_autograd(mixed), torch.bmm(blocks, mixed.unsqueeze(2)).squeeze(2)
        same = (found - expected).norm() <= 10 * torch.finfo(self.dtype).eps * expected.norm()
        return blocks if bool(same) else None  # a loss that mixes samples has more than blocks

    def _by_autograd(self, tangent: Tensor) -> Tensor:
        product: Tensor | None = None
        if self._gradients.requires_grad:
            (product,) = torch.autograd.grad(
                self._gradients, self._outputs, tangent, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(tangent) if product is None else product


def range_operator(
    loss: Tensor, taps: LayerTaps, parameters: Sequence[nn.Parameter], probe: Tensor, product: Tensor
) -> RangeOperator | None:
    """The Hessian in its range, where the network is a stack of linear layers; None for any other network.

    The stack is recognised by the values that went in and out of the layers; the proof is that its product with the
    probe is that of double backward, to rounding. The loss may be any function of the last layer's outputs.

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
    operator = RangeOperator(_with_bases(stack, gradients.detach()), outputs, gradients, parameters)
    found = operator.expand(operator.matvec(operator.restrict(probe)))
    operator.num_products = 0
    return operator if operator.dim and _agree(found, product, parameters) else None


def estimated_speedup(taps: LayerTaps, parameters: Sequence[nn.Parameter], num_steps: int = 100) -> float:
    """How many times faster Lanczos would be in the range than in parameter space, from shapes alone; 0 without layers.

    Counts multiply-adds of the products and of making the bases, the memory traffic of the reorthogonalisation, and
    what each layer costs however small it is; ranks are taken to be as large as they can be.
    """
    ordinary = restricted = num_params = size = 0.0
    layers = shapes(taps, parameters)
    for index, (num_samples, width, outputs) in enumerate(layers):
        dense, rank_g = num_samples * width * outputs, min(num_samples, outputs)
        whole = num_samples >= width
        rank_x = width if whole else num_samples
        num_params += width * outputs
        size += outputs * rank_x
        ordinary += 2 * dense + AUTOGRAD_OVERHEAD
        restricted += 2 * num_samples * outputs * rank_x + OVERHEAD
        if not whole:
            restricted += BASIS_COST * num_samples**2 * (width + outputs * bool(index)) / num_steps
        if index:
            ordinary += 4 * dense
            restricted += 4 * dense if whole else 2 * dense + num_samples * rank_x * (outputs + 2 * width)
        if index and not whole:
            size += width * rank_g
            restricted += rank_g * (outputs * rank_x + width * rank_x + 2 * num_samples * width)
    sweep = SWEEP_COST * num_steps / 2
    return (ordinary + sweep * num_params) / (restricted + sweep * size) if layers else 0.0


@torch.no_grad()
def _with_bases(stack: Sequence[StackLayer], gradients: Tensor) -> list[RangeLayer]:
    """One backward pass by hand, from the gradients (N, C) at the last outputs, and the bases of all rows."""
    layers: list[RangeLayer] = []
    rows = torch.arange(gradients.shape[1], device=gradients.device)
    for index in range(len(stack) - 1, -1, -1):
        layer = stack[index]
        columns = layer.live_inputs()
        dead = len(rows) < len(layer.weight) or len(columns) < layer.weight.shape[1]
        weight = layer.weight[rows][:, columns] if dead else layer.weight
        inputs = outputs = slope = bend = None
        if layer.parameters:
            ones = layer.inputs.new_ones(len(layer.inputs), len(layer.parameters) - 1)
            extended = torch.cat([layer.inputs[:, columns], ones], dim=1)
            inputs = RowBasis.of(extended)
            if index and inputs.rank < extended.shape[1]:
                outputs = RowBasis.of(gradients)
        through = gradients @ weight
        if layer.slope is not None:
            slope = layer.slope[:, columns]
            bend = None if layer.bend is None else layer.bend[:, columns] * through
        layers.append(RangeLayer(weight, layer.parameters, rows, columns, slope, bend, gradients, inputs, outputs))
        if slope is not None:
            gradients, rows = through * slope, columns
    return layers[::-1]


def _agree(found: Tensor, product: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether two products are the same in each parameter; not if one is not finite."""
    sizes = [parameter.numel() for parameter in parameters]
    floor = ROUNDING[found.dtype] * float(product.norm())
    return all(
        bool((part - truth).norm() <= AGREEMENT[found.dtype] * truth.norm() + floor)
        for part, truth in zip(torch.split(found, sizes), torch.split(product, sizes), strict=True)
    )
