"""Losses that a step differentiates itself, past ``manual_backward``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.nn.snapshot import shadow_method


@contextmanager
def noting_backward(losses: list[Tensor]) -> Iterator[None]:
    """Add to ``losses`` what ``Tensor.backward`` or ``torch.autograd.backward`` is called on.

    The call runs, and its graph stays for ours. Its gradients are needed by steps that read them (an attack on the
    inputs, say).
    """
    original = torch.autograd.backward  # which ``Tensor.backward`` calls as well

    def backward(tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, *args: Any, **kwargs: Any) -> Any:
        tensors = tensors if isinstance(tensors, Tensor) else tuple(tensors)
        for loss in (tensors,) if isinstance(tensors, Tensor) else tensors:
            if not any(known is loss for known in losses) and grad_tensors is None and not kwargs.get("grad_variables"):
                losses.append(loss)
        return original(tensors, grad_tensors, True, *args, **kwargs)

    undo = shadow_method(torch.autograd, "backward", backward)
    try:
        yield
    finally:
        undo()
