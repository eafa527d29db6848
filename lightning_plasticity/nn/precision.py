"""Measure a half-precision module in float32: its tensors and batches, for as long as it is measured.

Curvature and ranks of bfloat16 numbers are mostly rounding, and eigenvalue routines do not take them. Lightning's
``bf16-true`` and ``16-true`` keep the parameters themselves in half precision; under ``-mixed`` they are float32
already, and measuring happens outside autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_plasticity.nn.batches import map_tensors

HALF = (torch.float16, torch.bfloat16)
_MARK = "lightning_plasticity"


def is_half(module: nn.Module) -> bool:
    """Whether any parameter or buffer is kept in half precision."""
    return any(tensor.dtype in HALF for tensor in (*module.parameters(), *module.buffers()))


def measured_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor of this one has while it is measured."""
    return torch.float32 if dtype in HALF else dtype


def measured_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module is measured in: float64 where all its parameters are, else float32."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


@contextmanager
def full_precision(module: nn.Module) -> Iterator[None]:
    """Half-precision tensors of the module become float32, and new tensors are of the dtype it is measured in.

    The tensor objects stay, so that references to parameters stay valid. What this leaves changed on exit, the data and
    gradients of those tensors, is for the caller's ``Snapshot`` to put back.

    Raises:
        RuntimeError: for half precision under ``DistributedDataParallel``. Another dtype makes autograd drop the node
            that adds up a parameter's gradient, and with it the hook that joins the processes' gradients.
    """
    dtype, raised = measured_dtype(module), is_half(module)
    if raised:
        if _has_gradient_hooks(module):
            raise RuntimeError(
                f"{type(module).__name__} is kept in half precision under DistributedDataParallel, which measuring in "
                "float32 would cut off; use precision='bf16-mixed' or '16-mixed', or one process."
            )
        for half in _tensors(module):
            half.grad = None  # torch refuses a gradient of another dtype
            half.data = half.data.float()
        for submodule in module.modules():
            if submodule.__dict__.get("_dtype") in HALF:  # what ``LightningModule.dtype`` tells
                vars(submodule)["_dtype"] = torch.float32
    default = torch.get_default_dtype()
    if raised or dtype == torch.float64:  # as Lightning does around a training step
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def match_precision(module: nn.Module, batch: Any) -> Any:
    """The batch as a module without half-precision tensors takes it; for other modules it stays as it is."""
    return batch if is_half(module) else map_tensors(batch, lambda t: t.float() if t.dtype in HALF else t)


def _has_gradient_hooks(module: nn.Module) -> bool:
    """Whether another process hangs on the gradients of a parameter."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(_is_kept(parameter) for parameter in module.parameters() if parameter.requires_grad)


def _is_kept(parameter: Tensor) -> bool:
    """Whether somebody keeps the node that adds up the gradient, for autograd makes a new one at each use."""
    if not parameter.is_leaf:
        return False

    def metadata() -> Any:
        return get_gradient_edge(parameter).node.metadata

    metadata()[_MARK] = True
    return bool(metadata().pop(_MARK, False))


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensors that submodules keep as attributes, in half precision, each once."""
    kept = (value for submodule in module.modules() for value in vars(submodule).values() if isinstance(value, Tensor))
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers(), *kept)}
    return [t for t in found.values() if t.dtype in HALF and t.is_leaf and not t.is_inference()]
