"""Concatenated ReLU, which no unit can die under, and a helper that fits it into a Sequential."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.nn.wiring import CONVOLUTIONS, NORMS, entry_count, unit_count


class CReLU(nn.Module):
    """``concat(relu(x), relu(-x))``: twice as many features, half of them at work for any input.

    Source: Shang et al. 2016 (arXiv 1603.05201, definition 2.1); against loss of plasticity Abbas et al. 2023 (arXiv
    2303.07507).

    Args:
        dim: along which to join: 1 for vectors and feature maps, -1 for sequences.

    Example:
        >>> import torch
        >>> from lightning_plasticity import CReLU
        >>> CReLU()(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 0., 0., 2.]])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Join both halves: ``(N, D, ...)`` to ``(N, 2 D, ...)``."""
        return torch.cat([torch.relu(x), torch.relu(-x)], self.dim)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


def use_crelu(network: nn.Sequential, keep: Literal["parameters", "units"] = "parameters") -> nn.Sequential:
    """Replace every ReLU of a flat Sequential by ``CReLU``, in place; the layers that change size are drawn anew.

    Call it before training and before optimizers are made.

    Args:
        network: Linear, convolutions, norms, ReLU, pooling, dropout and flattening, in any order.
        keep: ``"parameters"`` halves the layer before each ReLU (and its norm), so that what follows keeps its size;
            ``"units"`` doubles the inputs of the layer after it.

    Returns:
        The same network.

    Raises:
        ValueError: when there is no ReLU between two layers, a width that should be halved is odd, or an unknown
            ``keep``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.interventions import use_crelu
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> use_crelu(net)(torch.ones(5, 4)).shape
        torch.Size([5, 2])
    """
    if keep not in ("parameters", "units"):
        raise ValueError(f"keep={keep!r}, expected 'parameters' (halve the layer before) or 'units' (double the next).")
    children = list(network)
    relus = [index for index, child in enumerate(children) if isinstance(child, nn.ReLU)]
    weights = [index for index, child in enumerate(children) if isinstance(child, (nn.Linear, *CONVOLUTIONS))]
    plan = []
    for relu in relus:
        sides = [i for i in weights if i < relu][-1:] + [i for i in weights if i > relu][:1]
        if len(sides) == 2:
            plan.append((sides[0], relu, sides[1]))
    if not plan:
        raise ValueError(
            "use_crelu: expected a flat Sequential with a ReLU between two Linear or convolution layers, got "
            f"{[type(child).__name__ for child in children]}."
        )
    odd = [index for index, _, _ in plan if unit_count(children[index]) % 2]
    if keep == "parameters" and odd:
        raise ValueError(
            f"use_crelu: layers {odd} have odd widths and cannot be halved; use even ones, or keep='units'."
        )
    for before, relu, after in plan:
        layer = children[before]
        if keep == "parameters":
            half = unit_count(layer) // 2
            children[before] = _resized(layer, outputs=half)
            for index in range(before + 1, relu):
                if isinstance(children[index], NORMS):
                    children[index] = _resized_norm(children[index], half)
        else:
            following = children[after]
            children[after] = _resized(following, inputs=2 * entry_count(following))
            for index in range(relu + 1, after):
                if isinstance(children[index], NORMS):
                    children[index] = _resized_norm(children[index], 2 * unit_count(layer))
        children[relu] = CReLU()
    for index, child in enumerate(children):
        network[index] = child.train(network.training)
    return network


def _resized(layer: Any, inputs: int | None = None, outputs: int | None = None) -> nn.Module:
    options = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs or layer.in_features, outputs or layer.out_features, **options)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        options["output_padding"] = layer.output_padding
    for key in ("stride", "padding", "dilation", "groups", "padding_mode"):
        options[key] = getattr(layer, key)
    new: nn.Module = type(layer)(
        inputs or layer.in_channels, outputs or layer.out_channels, layer.kernel_size, **options
    )
    return new


def _resized_norm(norm: Any, size: int) -> nn.Module:
    weight = next(norm.parameters(), next(norm.buffers(), torch.zeros(())))
    options = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else None, "eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(size, elementwise_affine=norm.elementwise_affine, **options)
    if isinstance(norm, nn.RMSNorm):
        return nn.RMSNorm(size, elementwise_affine=norm.elementwise_affine, **options)
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, size, affine=norm.affine, **options)
    new: nn.Module = type(norm)(
        size, momentum=norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats, **options
    )
    return new
