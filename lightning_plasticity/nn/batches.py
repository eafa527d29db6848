"""Nested batches (tensors in tuples, lists, dicts, dataclasses): clone, move, join."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a nested batch; containers are made anew, all else is deep-copied."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return _like(batch, {key: map_tensors(value, function) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return _with_fields(batch, [map_tensors(value, function) for value in _values(batch)])
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
    """First dimension of the first tensor that has one, and any rows (a field may be empty); 1 when none has one."""
    sizes = [tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim]
    return next(filter(None, sizes), 0) if sizes else 1


def is_plain(value: Any) -> bool:
    """Whether a nested value holds only tensors and plain Python, so that a checkpoint can hold it."""
    if type(value) is dict:
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list):
        return all(is_plain(item) for item in value)
    return type(value) in (int, float, str, bool, type(None)) or isinstance(value, Tensor)


def join_batches(batches: Sequence[Any]) -> Any | None:
    """One batch out of several, tensor by tensor along dimension 0; None where they do not fit together."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        shapes = {tensor.shape[1:] if isinstance(tensor, Tensor) and tensor.ndim else None for tensor in batches}
        return torch.cat(list(batches)) if len(shapes) == 1 and None not in shapes else None
    if any(type(batch) is not type(first) for batch in batches):
        return None
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            return None
        joined = _join_each([[batch[key] for key in first] for batch in batches])
        return None if joined is None else _like(first, dict(zip(first, joined, strict=True)))
    if isinstance(first, tuple | list):
        joined = _join_each(batches)
        if joined is None:
            return None
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if is_dataclass(first):
        joined = _join_each([_values(batch) for batch in batches])
        return None if joined is None else _with_fields(first, joined)
    return None


def _join_each(rows: Sequence[Sequence[Any]]) -> list[Any] | None:
    if len({len(row) for row in rows}) != 1:
        return None
    items = [join_batches(list(column)) for column in zip(*rows, strict=True)]
    return None if any(item is None for item in items) else items


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """The items in a mapping of the same type."""
    if type(mapping) is dict:
        return items
    if isinstance(mapping, MutableMapping):
        # A copy keeps what the constructor of a defaultdict, say, was told; only a dict's is known to share no items.
        safe = isinstance(mapping, dict) or hasattr(type(mapping), "__copy__")
        twin = copy.copy(mapping) if safe else copy.deepcopy(mapping)
        twin.update(items)
        return twin
    return type(mapping)(items)  # type: ignore[call-arg]


def _values(batch: Any) -> list[Any]:
    return [getattr(batch, field.name) for field in fields(batch)]


def _with_fields(batch: Any, values: Sequence[Any]) -> Any:
    """A copy of a dataclass with other values, frozen or not, without running its ``__init__``."""
    twin = copy.copy(batch)
    for field, value in zip(fields(batch), values, strict=True):
        object.__setattr__(twin, field.name, value)
    return twin
