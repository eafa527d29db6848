"""The Hessian of a loss as an operator: products by double backward on graphs that are kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.backward import differentiated_twice
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.linalg.progress import Count

VMAP_PRODUCTS = 32  # products that one vectorised backward pass computes


Gradient = tuple[Tensor | None, Sequence[bool]]
Graph = tuple[float, Gradient]  # weight of a loss, and its gradient with a graph


class HessianOperator:
    """Products with the Hessian of ``sum_b weight_b loss_b``; nothing is written to ``.grad``.

    One forward and one differentiable gradient per batch are made at construction and kept, so that every product is
    one backward pass, and random parts of the network stay one fixed draw: the operator is one fixed symmetric matrix.

    Source: Pearlmutter 1994 (exact multiplication by the Hessian), in its reverse-over-reverse form.

    Args:
        losses: () tensors with their graphs.
        weights: the share of each loss, e.g. batch size over all samples.
        parameters: P coordinates in all, in this order.
        active: (P,) bool, coordinates that no mask switches off; None for all. Vectors stay P long; the matrix to
            measure is the (k, k) one of the active coordinates, and probes are zero elsewhere.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        weights: Sequence[float],
        parameters: Sequence[nn.Parameter],
        active: Tensor | None = None,
    ) -> None:
        self._prepare(parameters, active)
        self.remember(losses, weights)

    @classmethod
    def rebuilding(
        cls,
        losses: Callable[[], Generator[tuple[float, Tensor]]],
        parameters: Sequence[nn.Parameter],
        active: Tensor | None = None,
    ) -> HessianOperator:
        """An operator that keeps no graph: every product makes them anew, one after the other.

        It needs the memory of one batch's graph only, and about 1.6 times as long.

        Args:
            losses: gives weights and losses, each loss when it is asked for; the same ones every time.
            parameters: as in the constructor.
            active: as in the constructor.
        """
        operator = cls.__new__(cls)
        operator._prepare(parameters, active)

        def graphs() -> Generator[Graph]:
            with closing(losses()) as found:
                for weight, loss in found:
                    yield weight, operator._gradient(loss)

        operator._graphs = graphs
        operator._keeps = False
        return operator

    def remember(self, losses: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Make the graphs of the gradients, and keep them."""
        kept = [(weight, self._gradient(loss)) for weight, loss in zip(weights, losses, strict=True)]
        self._graphs: Callable[[], Generator[Graph]] = lambda: (graph for graph in kept)
        self._keeps = True

    def forget(self) -> None:
        """Free the graphs; no product can be made until they are remembered."""
        self._graphs = _no_graphs

    def _prepare(self, parameters: Sequence[nn.Parameter], active: Tensor | None) -> None:
        self.parameters, self.active = list(parameters), active
        self._sizes = [parameter.numel() for parameter in parameters]
        self.num_params = sum(self._sizes)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        self.num_products = 0

    def _gradient(self, loss: Tensor) -> Gradient:
        """The gradient of a loss, flat, with its graph; and which parameters' parts it holds."""
        with differentiated_twice("The loss"):
            parts = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        curved = [part is not None and part.requires_grad for part in parts]
        if not any(curved):  # a loss linear in all parameters
            return None, curved
        return torch.cat([part.reshape(-1) for part, keep in zip(parts, curved, strict=True) if keep]), curved

    def matvec(self, vector: Tensor) -> Tensor:
        """(P,) -> (P,)."""
        self.num_products += 1
        return self._product(vector, batched=False)

    def matmat(self, vectors: Tensor) -> Tensor:
        """(k, P) -> (k, P), several products in one backward pass where the network allows it."""
        self.num_products += len(vectors)
        try:
            return self._product(vectors, batched=True)
        except RuntimeError:
            return torch.stack([self._product(vector, batched=False) for vector in vectors])

    def _product(self, vector: Tensor, batched: bool) -> Tensor:
        total = None
        with closing(self._graphs()) as graphs:  # an error must not leave the context of a loss open
            for weight, (gradient, curved) in graphs:
                if gradient is None:
                    continue
                found = self._pulled(gradient, self._direction(vector, curved), batched)
                if total is None:
                    total = found if weight == 1.0 else found.mul_(weight)
                else:
                    total.add_(found, alpha=weight)
        return torch.zeros_like(vector) if total is None else total

    def _direction(self, vector: Tensor, curved: Sequence[bool]) -> Tensor:
        """The coordinates of the parameters that have curvature, (..., P) -> (..., p)."""
        if all(curved):
            return vector
        parts = torch.split(vector, self._sizes, dim=-1)
        return torch.cat([part for part, keep in zip(parts, curved, strict=True) if keep], dim=-1)

    def _pulled(self, gradient: Tensor, direction: Tensor, batched: bool) -> Tensor:
        """(..., P) derivative of <gradient, direction> of one loss."""
        with differentiated_twice("The loss"):
            found = torch.autograd.grad(
                gradient,
                self.parameters,
                direction.to(gradient.dtype),
                retain_graph=self._keeps,
                allow_unused=True,
                is_grads_batched=batched,
            )
        lead = direction.shape[:-1]
        return torch.cat(
            [
                direction.new_zeros(*lead, size) if part is None else part.reshape(*lead, size)
                for part, size in zip(found, self._sizes, strict=True)
            ],
            dim=-1,
        ).to(self.dtype)

    def live_coordinates(self, generator: torch.Generator) -> Tensor:
        """(P,) bool: active coordinates whose rows are not exactly zero (dead units, constant inputs)."""
        return self.probe(generator)[1] != 0

    def probe(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A Gaussian vector, the same on every device, and the product with it, both (P,) and zero under masks.

        Where the product is exactly zero, so is the row, up to chance of probability zero.

        Raises:
            MeasurementError: when the product is not finite.
        """
        vector = torch.randn(self.num_params, generator=generator).to(self.device, self.dtype)
        if self.active is not None:
            vector *= self.active
        product = self.matvec(vector)
        if self.active is not None:
            product = product.where(self.active, 0.0)
        if not bool(torch.isfinite(product).all()):
            raise MeasurementError("A Hessian-vector product is not finite; look for NaN or inf in weights and data.")
        return vector, product

    def dense(self, live: Tensor, at_once: int = VMAP_PRODUCTS) -> Tensor:
        """(d, d) float64 Hessian on the live coordinates, row by row as computed: symmetric up to rounding.

        Args:
            live: (P,) bool.
            at_once: products that are made, and held, together.
        """
        indices = live.nonzero()[:, 0]
        rows = torch.empty(len(indices), len(indices), dtype=torch.float64, device=self.device)
        count = Count("rows of the matrix", len(indices))
        for start in range(0, len(indices), at_once):
            chunk = indices[start : start + at_once]
            units = torch.zeros(len(chunk), self.num_params, dtype=self.dtype, device=self.device)
            units[torch.arange(len(chunk)), chunk] = 1.0
            rows[start : start + len(chunk)] = self.matmat(units)[:, indices].double()
            count.add(len(chunk))
        return rows


def _no_graphs() -> Generator[Graph]:
    raise RuntimeError("The graphs of this Hessian have been freed.")
