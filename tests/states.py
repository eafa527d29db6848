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
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(module: nn.Module) -> dict[str, Any]:
    """All that must not change, as values that can be compared."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[f"{name} is"] = id(value)
        if isinstance(value, Tensor):
            place = value.data_ptr() if value.layout == torch.strided else None
            found[name] = (bits(value), value.shape, value.dtype, value.requires_grad, place)
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


def attributes(module: nn.Module) -> dict[str, Any]:
    """What all submodules hold besides parameters, buffers and Lightning's own, by value: runs can be compared."""
    seen: set[int] = set()

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (bits(value.float()), value.shape, value.dtype)
        if isinstance(value, np.ndarray):
            return value.tobytes()
        if isinstance(value, torch.Generator):
            return bits(value.get_state())
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.random.Generator):
            return str(value.bit_generator.state)
        if isinstance(value, int | float | str | bytes | type(None)):
            return repr(value)
        if id(value) in seen:
            return "seen"
        seen.add(id(value))
        if isinstance(value, dict):
            return [
                (repr(key) if isinstance(key, str | int) else type(key).__name__, plain(v)) for key, v in value.items()
            ]
        if isinstance(value, list | tuple | deque):
            return [plain(item) for item in value]
        if isinstance(value, set):
            return sorted(map(str, map(plain, value)))
        mine = not isinstance(value, type) and type(value).__module__.partition(".")[0] in _TESTS
        return plain(vars(value)) if mine and hasattr(value, "__dict__") else type(value).__name__

    return {
        # The keys of hooks are numbers that the process counts up.
        f"{name}.{key}": plain(list(value.values()) if key.endswith("_hooks") else value)
        for name, submodule in module.named_modules()
        for key, value in vars(submodule).items()
        if key not in _NOT_OURS
    }


_TESTS = ("zoo", "runs", "test_bit_identity", "small_fits")
_NOT_OURS = ("_trainer", "_fabric", "_parameters", "_buffers", "_modules", "_hparams", "_torchdynamo_wrapper_id")
