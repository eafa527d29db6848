"""Nested batches (tensors in tuples, lists, dicts): clone, move, join, slice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a nested batch; other containers than tuple, list and dict are deep-copied."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in batch.items()}
        return mapped if type(batch) is dict else type(batch)(mapped)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, function) for value in batch)
    if isinstance(batch, int | float | str | bytes | bool | type(None)):
        return batch
    return copy.deepcopy(batch)


def clone_batch(batch: Any) -> Any:
    """An independent copy on the same device."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a nested batch."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def batch_size(batch: Any) -> int:
    """First dimension of the first tensor that has one; 1 when there is none."""
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim), 1)


def is_plain(value: Any) -> bool:
    """Whether a nested value holds only tensors and plain Python, so that a checkpoint can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list):
        return all(is_plain(item) for item in value)
    return isinstance(value, Tensor | int | float | str | bool | type(None))


def join_batches(batches: Sequence[Any]) -> Any | None:
    """One batch out of several, tensor by tensor along dimension 0; None where they do not fit together."""
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = {tensor.shape[1:] if isinstance(tensor, Tensor) and tensor.ndim else None for tensor in batches}
        return torch.cat(list(batches)) if len(shapes) == 1 and None not in shapes else None
    if type(first) is dict and all(type(b) is dict and b.keys() == first.keys() for b in batches):
        items: list[Any] = [join_batches([b[key] for b in batches]) for key in first]
        return None if any(item is None for item in items) else dict(zip(first, items, strict=True))
    if type(first) in (tuple, list) and all(type(b) is type(first) and len(b) == len(first) for b in batches):
        items = [join_batches([b[index] for b in batches]) for index in range(len(first))]
        return None if any(item is None for item in items) else type(first)(items)
    return None
