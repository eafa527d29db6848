"""Fewer samples, larger or smaller batches of the same probe data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_plasticity.nn.batches import batch_size, map_tensors


def num_samples(batches: Sequence[Any]) -> int:
    """Of all batches together."""
    return sum(batch_size(batch) for batch in batches)


def first_samples(batches: Sequence[Any], limit: int) -> list[Any]:
    """The first ``limit`` samples; the last batch is cut where it has to be."""
    chosen: list[Any] = []
    for batch in batches:
        size = batch_size(batch)
        if limit < size:
            return [*chosen, _part(batch, size, 0, limit)] if limit else chosen
        chosen.append(batch)
        limit -= size
    return chosen


def in_whole_batches(batches: Sequence[Any], limit: int) -> int:
    """How many samples the first batches hold that together have at most ``limit``; at least those of the first."""
    total = batch_size(batches[0])
    for batch in batches[1:]:
        if total + batch_size(batch) > limit:
            break
        total += batch_size(batch)
    return total


def in_parts(batches: Sequence[Any], size: int) -> list[Any]:
    """The same samples in batches of at most ``size``."""
    parts: list[Any] = []
    for batch in batches:
        total = batch_size(batch)
        if total <= size:
            parts.append(batch)
        else:
            parts += [_part(batch, total, start, min(start + size, total)) for start in range(0, total, size)]
    return parts


def chosen_samples(batch: Any, indices: Tensor) -> Any:
    """These samples of a batch, in this order: of every tensor whose first dimension counts samples."""
    total = batch_size(batch)
    return map_tensors(
        batch, lambda tensor: tensor[indices.to(tensor.device)] if tensor.shape[:1] == (total,) else tensor
    )


def _part(batch: Any, total: int, start: int, stop: int) -> Any:
    """Samples start to stop of every tensor whose first dimension counts samples."""
    return map_tensors(batch, lambda tensor: tensor[start:stop] if tensor.shape[:1] == (total,) else tensor)
