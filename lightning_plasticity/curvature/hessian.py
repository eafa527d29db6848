"""The Hessian of a loss as an operator: products by double backward on graphs that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.errors import MeasurementError

VMAP_PRODUCTS = 32  # products that one vectorised backward pass computes
MAX_ASYMMETRY = 1e-2


class HessianOperator:
    """Products with the Hessian of ``sum_b weight_b loss_b``; nothing is written to ``.grad``.

    One forward and one differentiable gradient per batch are made at construction and kept, so that every product is
    one backward pass, and random parts of the network stay one fixed draw: the operator is one fixed symmetric matrix.

    Source: Pearlmutter 1994 (exact multiplication by the Hessian), in its reverse-over-reverse form.

    Args:
        losses: () tensors with their graphs.
        weights: the share of each loss, e.g. batch size over all samples.
        parameters: P coordinates in all, in this order.
    """

    def __init__(self, losses: Sequence[Tensor], weights: Sequence[float], parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.num_params = sum(parameter.numel() for parameter in parameters)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        self.num_products = 0
        self._weights = list(weights)
        self._gradients = [
            torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True) for loss in losses
        ]

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

    def _split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector (or of several), one for each parameter."""
        parts = torch.split(vector, [parameter.numel() for parameter in self.parameters], dim=-1)
        shapes = [(*vector.shape[:-1], *parameter.shape) for parameter in self.parameters]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _product(self, vector: Tensor, batched: bool) -> Tensor:
        vector = vector.contiguous()
        total = torch.zeros(vector.shape, dtype=self.dtype, device=self.device)
        directions, slots = self._split(vector), self._split(total)
        for weight, gradients in zip(self._weights, self._gradients, strict=True):
            pairs = [
                (g, d.to(g.dtype))
                for g, d in zip(gradients, directions, strict=True)
                if g is not None and g.requires_grad
            ]
            if not pairs:  # a loss linear in all parameters
                continue
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                self.parameters,
                [d for _, d in pairs],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
            for slot, part in zip(slots, found, strict=True):
                if part is not None:
                    slot.add_(part, alpha=weight)
        return total

    def live_coordinates(self, generator: torch.Generator) -> Tensor:
        """(P,) bool: coordinates whose rows are not exactly zero (dead units, constant inputs), from one product."""
        probe = torch.randn(self.num_params, generator=generator, dtype=torch.float64)
        product = self.matvec(probe.to(self.device, self.dtype))
        if not bool(torch.isfinite(product).all()):
            raise MeasurementError("A Hessian-vector product is not finite; look for NaN or inf in weights and data.")
        return product != 0

    def asymmetry(self, generator: torch.Generator) -> tuple[float, float]:
        """|<u, Hv> - <v, Hu>| over |Hu| |v|, and |Hu|: how wrong a double backward is, on products of what size.

        Rounding, for a Hessian; except where the Hessian itself is rounding.
        """
        u, v = (torch.randn(self.num_params, generator=generator, dtype=torch.float64) for _ in range(2))
        u, v = u.to(self.device, self.dtype), v.to(self.device, self.dtype)
        product_u, product_v = self.matvec(u), self.matvec(v)
        size = float(product_u.norm())
        scale = max(size * float(v.norm()) / self.num_params**0.5, 1e-300)
        return abs(float(torch.dot(u, product_v) - torch.dot(v, product_u))) / scale, size

    def dense(self, live: Tensor) -> Tensor:
        """(d, d) float64 Hessian on the live coordinates, symmetrised."""
        indices = live.nonzero()[:, 0]
        rows = torch.empty(len(indices), len(indices), dtype=torch.float64, device=self.device)
        for start in range(0, len(indices), VMAP_PRODUCTS):
            chunk = indices[start : start + VMAP_PRODUCTS]
            units = torch.zeros(len(chunk), self.num_params, dtype=self.dtype, device=self.device)
            units[torch.arange(len(chunk)), chunk] = 1.0
            rows[start : start + len(chunk)] = self.matmat(units)[:, indices].double()
        return 0.5 * (rows + rows.T)
