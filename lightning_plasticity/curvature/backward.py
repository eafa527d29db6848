"""Backward passes: zeros where nothing comes back, a clear error where there is no second derivative."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_plasticity.curvature.errors import MeasurementError

_ONCE_ONLY = re.compile(r"derivative for \S+ is not implemented|once_differentiable")  # what torch says then


def pulled_back(outputs: Tensor, targets: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    """d(direction . outputs) / d target for each target; zeros for those that the outputs do not depend on.

    Args:
        outputs: with their graph, which is kept.
        targets: parameters, or tensors inside the graph.
        direction: shaped like the outputs, in any dtype.
    """
    live = [target for target in targets if target.requires_grad]
    found: dict[int, Tensor | None] = {}
    if live and outputs.requires_grad:
        gradients = torch.autograd.grad(
            outputs, live, direction.to(outputs.dtype), retain_graph=True, allow_unused=True
        )
        found = {id(target): gradient for target, gradient in zip(live, gradients, strict=True)}
    return [torch.zeros_like(t) if (gradient := found.get(id(t))) is None else gradient for t in targets]


@contextmanager
def differentiated_twice(what: str) -> Iterator[None]:
    """Say which operation has no second derivative, and what to do, instead of torch's bare error."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MeasurementError) or not _ONCE_ONLY.search(str(error)):
            raise
        raise MeasurementError(
            f"{what} cannot be differentiated twice: {str(error).rstrip('.')}. Write the operation with ones that can, "
            "in the network or in curvature_loss(batch); the NTK needs no second derivative."
        ) from error
