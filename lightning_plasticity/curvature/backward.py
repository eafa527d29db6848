"""One backward pass, with zeros where nothing comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
