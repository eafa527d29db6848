"""Losses that a step calls ``backward`` on itself, past ``manual_backward``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def noting_backward(losses: list[Tensor]) -> Iterator[None]:
    """Add to ``losses`` what ``Tensor.backward`` is called on; the call runs, and its graph stays for ours.

    Its gradients are needed by steps that read them (an attack on the inputs, say).
    """
    tensor_class: Any = Tensor
    original = tensor_class.backward

    def backward(loss: Tensor, gradient: Any = None, retain_graph: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Under a function mode torch comes here twice, for the same tensor.
        if not any(known is loss for known in losses) and gradient is None:
            losses.append(loss)
        return original(loss, gradient, True, *args, **kwargs)

    tensor_class.backward = backward
    try:
        yield
    finally:
        tensor_class.backward = original
