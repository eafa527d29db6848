"""A fresh initialisation of the same architecture, written into a module in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.nn.masked_layers import without_masks

FreshInit = Callable[[Any], Any]


def reinitialize(module: nn.Module, fresh: FreshInit | None = None) -> None:
    """Give every trainable parameter a new initial value; the random state decides which.

    Each submodule's own ``reset_parameters`` (or ``_reset_parameters``) is called, inner modules first, as constructors
    do. BatchNorm's does its running statistics too; other buffers and frozen parameters stay as they are. An
    initialisation that the user's ``__init__`` applies afterwards is not known: pass it as ``fresh``. Weights under a
    ``Mask`` get the fresh values of a dense weight, masked as before.

    Args:
        module: any module; changed in place.
        fresh: ``fresh(module)`` initialises the module in place and returns None, or returns a new module of the same
            architecture, whose parameters and buffers are taken; its masks, if any, are not.

    Raises:
        MeasurementError: for trainable parameters that no ``reset_parameters`` has set; it names them.
    """
    with without_masks(module):
        _reinitialize(module, fresh)


def _reinitialize(module: nn.Module, fresh: FreshInit | None) -> None:
    if fresh is not None:
        built = fresh(module)
        if isinstance(built, nn.Module) and built is not module:
            _take(module, built)
        return
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    frozen = [(p, p.detach().clone()) for p in module.parameters() if not p.requires_grad]
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.fill_(torch.nan)  # what is still NaN afterwards has not been set
        for submodule in reversed(list(module.modules())):  # inner modules before the outer ones that hold them
            reset: Any = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
            if callable(reset):
                reset()
        for parameter, value in frozen:
            parameter.copy_(value)
    missed = [name for name, parameter in trainable.items() if bool(torch.isnan(parameter).any())]
    if missed:
        raise MeasurementError(
            f"No reset_parameters of {type(module).__name__}'s modules sets {', '.join(missed)}; give their module a "
            "reset_parameters method. TrainabilityProbe and measure_trainability also take fresh=, a function that "
            "initialises the module or returns a new one."
        )


def _take(module: nn.Module, built: nn.Module) -> None:
    """Parameters and buffers of another module of the same architecture."""
    try:
        with without_masks(built):
            module.load_state_dict(built.state_dict())
    except RuntimeError as error:
        raise MeasurementError(f"fresh= returned a module of another architecture: {error}") from error
