"""A twin of a live optimizer: same class, hyperparameters and parameters, with a state of its own."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.nn.batches import map_tensors


def twin(optimizer: Optimizer, carry_state: bool) -> Optimizer:
    """An optimizer that steps the same parameters and leaves the original alone.

    Args:
        optimizer: a live one, of any class that keeps its state in ``state`` and ``param_groups``.
        carry_state: whether moments and counts go on from a copy of the original's, or start anew.

    Raises:
        MeasurementError: for an optimizer that holds another one, whose state would not be copied.
    """
    held = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if held:
        raise MeasurementError(
            f"{type(optimizer).__name__} holds another optimizer ({', '.join(held)}), which cannot be copied; pass "
            "optimizer=, a function of the parameters."
        )
    copy: Optimizer = object.__new__(type(optimizer))
    # Not what schedulers and our own context put on the instance.
    vars(copy).update({name: value for name, value in vars(optimizer).items() if name not in ("step", "zero_grad")})
    for name, value in vars(optimizer).items():
        if isinstance(value, OrderedDict):  # hooks, which belong to the run
            vars(copy)[name] = OrderedDict()
    copy.param_groups = [dict(group) for group in optimizer.param_groups]
    for group in copy.param_groups:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})  # capturable lr
    copy.state = defaultdict(dict)
    if carry_state:
        copy.state.update({key: _copied(state, key) for key, state in optimizer.state.items()})
    return copy


def parameters_of(optimizers: list[Optimizer]) -> list[torch.nn.Parameter]:
    """All that they step, each once."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list({id(p): p for group in groups for p in group["params"] if p.requires_grad}.values())


def _copied(state: Any, parameter: Any) -> Any:
    """In the parameter's dtype where that is raised from half precision for the measurement."""

    def copy(value: Tensor) -> Tensor:
        half = value.dtype in (torch.float16, torch.bfloat16)
        return value.to(parameter.dtype, copy=True) if half and isinstance(parameter, Tensor) else value.clone()

    return map_tensors(state, copy)
