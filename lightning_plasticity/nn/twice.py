"""Operations of torch whose second derivative is missing or wrong, in forms that can be differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.nn.snapshot import shadow_method

_CHECKPOINT = sys.modules["torch.utils.checkpoint"]
_WEIGHT_NORM = sys.modules["torch.nn.utils.weight_norm"]  # the function of that name hides the module


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Replace what torch differentiates once only, until the context ends.

    - reentrant activation checkpointing, which hides the parameters inside from ``torch.autograd.grad`` (an error, or
      silently no gradient), by the kind that is not reentrant;
    - the fused weight normalisation, whose double backward takes the norms for constants (``gradgradcheck`` fails), by
      its definition.
    """
    with ExitStack() as stack:
        stack.callback(shadow_method(_CHECKPOINT, "CheckpointFunction", _Recomputed))
        for owner in (torch, _WEIGHT_NORM):
            stack.callback(shadow_method(owner, "_weight_norm", _weight_norm))
        yield


class _Recomputed:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Salimans and Kingma 2016 (arXiv 1602.07868), equation 2: ``g v / |v|``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
