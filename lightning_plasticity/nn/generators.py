"""Random generators that objects keep for themselves (augmentation, sampling noise): find them, put them back."""

from __future__ import annotations

import argparse
import queue
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

MANY = 64  # entries of a list of transforms or datasets that are looked into
_OPAQUE = ("builtins", "torch", "numpy", "pandas", "PIL", "lightning", "pytorch_lightning")
_LIBRARIES = (  # objects of these, and of classes derived from theirs, are no plain helpers
    frozenset(sys.stdlib_module_names) - {"abc", "typing", "types", "collections"}
    | {*_OPAQUE, "lightning_fabric", "lightning_plasticity", "matplotlib", "omegaconf"}
    | {"aim", "clearml", "comet_ml", "mlflow", "neptune", "tensorboard", "tensorboardX", "wandb"}
)
_KEPT = (argparse.Namespace, queue.Queue, Dataset)  # library classes that are plain helpers all the same
_OPEN = (Dataset, DataLoader, Sampler, nn.Module)  # looked into wherever their class is defined


def generator_state(value: Any) -> Callable[[], object] | None:
    """What puts a random generator back to its present state; None when the value is no generator."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return partial(setattr, value, "state", value.state)
    return None


def is_helper(value: Any) -> bool:
    """Whether the value is a plain object of the user's: it has attributes, and no class of a library is behind it."""
    classes = [cls for cls in type(value).__mro__ if cls is not object]
    if isinstance(value, _KEPT):
        return True
    if isinstance(value, type) or not (
        isinstance(getattr(value, "__dict__", None), dict) or any(cls.__dict__.get("__slots__") for cls in classes)
    ):
        return False
    return all(cls.__module__.partition(".")[0] not in _LIBRARIES for cls in classes)


def held_by(*owners: Any) -> list[Any]:
    """The owners and what they hold, also inside transforms, wrapped datasets and closures, each once."""
    seen: dict[int, Any] = {}
    waiting = list(owners)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            if generator_state(value) is None:
                waiting.extend(_parts(value))
    return list(seen.values())


def _parts(value: Any) -> Iterator[Any]:
    """What an object holds and may hold generators."""
    if isinstance(value, dict):
        yield from islice(value.values(), MANY)
    elif isinstance(value, list | tuple | set):
        yield from islice(value, MANY)
    elif isinstance(value, partial | MethodType | BuiltinMethodType | FunctionType):
        yield from reached_by_calling(value)
    elif isinstance(value, _OPEN) or type(value).__module__.partition(".")[0] not in _OPAQUE:
        yield from getattr(value, "__dict__", {}).values()


def reached_by_calling(value: Any) -> Iterator[Any]:
    """What a function, method or partial works on; nothing for other values."""
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType | BuiltinMethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not bound yet
                continue
