"""Fresh values for weights, drawn from a generator of our own so that training's random numbers stay what they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from lightning_plasticity.nn import preserve_rng
from lightning_plasticity.nn.masked_layers import without_masks
from lightning_plasticity.nn.wiring import row_dim

Init = Literal["default", "kaiming"]
INITS = ("default", "kaiming")
_PLAIN = (nn.Linear.reset_parameters, nn.modules.conv._ConvNd.reset_parameters)


def fresh_rows(
    layer: nn.Module, units: Tensor, generator: Generator, init: Init = "default", gain: float = math.sqrt(2.0)
) -> Tensor:
    """New incoming weights of some units.

    ``"default"``: the distribution of the layer's own ``reset_parameters``; for PyTorch's layers U(-b, b) with b =
    1 / sqrt(fan_in). ``"kaiming"``: b = gain * sqrt(3 / fan_in), as in Dohare et al. 2024 (doi
    10.1038/s41586-024-07711-7) for ReLU.

    Args:
        layer: Linear or convolution.
        units: (K,) indices.
        generator: on the CPU.
        init: which distribution.
        gain: of the activation, for ``"kaiming"``.

    Returns:
        Rows in the layer's dtype and on its device: (K, ...), units first also for transposed convolutions.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    own = type(layer).reset_parameters  # type: ignore[attr-defined]
    if init == "default" and own not in _PLAIN:
        twin = copy.deepcopy(layer)
        reset_parameters(twin, generator)
        return twin.weight.detach().movedim(row_dim(layer), 0)[units]  # type: ignore[operator]
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = 1.0 / math.sqrt(fan_in) if init == "default" else gain * math.sqrt(3.0 / fan_in)
    shape = (len(units), *weight.movedim(row_dim(layer), 0).shape[1:])
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    rows = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return rows.to(weight)


def reset_parameters(module: nn.Module, generator: Generator) -> None:
    """Run a module's ``reset_parameters`` under a seed from the generator; masked entries stay zero."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with preserve_rng(), torch.no_grad(), without_masks(module):
        torch.manual_seed(seed)
        draw = resetter(module)
        assert draw is not None, "only modules with reset_parameters come here"
        draw()


def resetter(module: nn.Module) -> Callable[[], object] | None:
    """The method that draws a module's own parameters anew; None where it has none."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
