"""The whole state of a module and of the process, as values that can be compared: used wherever nothing may change."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_plasticity.nn import is_measuring


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(module: nn.Module) -> dict[str, Any]:
    """All that must not change, as values that can be compared."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[f"{name} is"] = id(value)
        if isinstance(value, Tensor):
            found[name] = (bits(value), value.shape, value.dtype, value.requires_grad, value.data_ptr())
            if value.is_leaf and value.grad is not None:
                note(f"{name}.grad", value.grad)
        elif isinstance(value, nn.Module):
            for key, item in value.__dict__.items():
                note(f"{name}.{key}", item)
        elif isinstance(value, dict):
            found[name] = list(value)
            for key, item in value.items():
                note(f"{name}[{key}]", item)
        elif isinstance(value, list | tuple | deque):
            found[name] = len(value)
            for index, item in enumerate(value):
                note(f"{name}[{index}]", item)
        elif isinstance(value, set):
            found[name] = set(value)
        elif isinstance(value, np.ndarray):
            found[name] = value.tobytes()
        elif isinstance(value, torch.Generator):
            found[name] = bits(value.get_state())
        elif isinstance(value, random.Random):
            found[name] = value.getstate()
        elif isinstance(value, np.random.Generator):
            found[name] = str(value.bit_generator.state)
        else:
            found[name] = repr(value)

    note("module", module)
    found["torch rng"], found["python rng"] = bits(torch.get_rng_state()), random.getstate()
    found["numpy rng"] = str(np.random.get_state())
    found["switches"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    found["kernels"] = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    found["measuring"] = is_measuring()
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    missing = object()
    return [key for key in before | after if before.get(key, missing) != after.get(key, missing)]
