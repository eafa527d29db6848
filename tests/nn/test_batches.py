"""Nested batches: cloned, mapped and joined without losing their types."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_plasticity.nn.batches import (
    batch_size,
    clone_batch,
    is_plain,
    join_batches,
    map_tensors,
    tensors_of,
)

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    name: str
    extra: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Tensor

    def __post_init__(self) -> None:
        assert self.x.ndim  # would refuse what a careless copy passes in


def numbers(start: int = 0, rows: int = 2) -> Tensor:
    return torch.arange(start, start + rows * 3, dtype=torch.float32).reshape(rows, 3)


def nested(start: int = 0, rows: int = 2) -> Any:
    x = numbers(start, rows)
    return (x, {"y": [x + 1, Pair(x + 2, x + 3)], "d": Sample(x + 4, "name"), "f": Frozen(x + 5)}, OrderedDict(o=x + 6))


def test_clone_is_equal_and_independent() -> None:
    batch = nested()
    twin = clone_batch(batch)
    assert [t.tolist() for t in tensors_of(twin)] == [t.tolist() for t in tensors_of(batch)]
    assert len(tensors_of(batch)) == 7
    for tensor in tensors_of(twin):
        tensor.zero_()
    twin[1]["y"].clear()
    twin[1]["d"].name = "other"
    twin[2].clear()
    assert torch.equal(batch[0], numbers())
    assert len(batch[1]["y"]) == 2
    assert batch[1]["d"].name == "name"
    assert list(batch[2]) == ["o"]


def test_clone_drops_the_graph_and_keeps_what_is_no_tensor() -> None:
    array = np.zeros(2)
    batch = [torch.ones(2, requires_grad=True) * 2, array, "text", None, 3, {"set": {1}}]
    twin = clone_batch(batch)
    assert not twin[0].requires_grad
    assert twin[1] is not array
    assert twin[2:] == batch[2:]


@pytest.mark.parametrize(
    "batch",
    [
        nested(),
        Pair(numbers(), None),
        defaultdict(list, {"a": numbers()}),
        OrderedDict(b=numbers(), a=numbers()),
        MappingProxyType({"a": numbers()}),
        pack_sequence([numbers(), numbers(rows=1)]),
        Sample(numbers(), "n", extra=[numbers()]),
        Frozen(numbers()),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_map_keeps_types_and_order(batch: Any) -> None:
    mapped = map_tensors(batch, lambda tensor: tensor * 2)
    assert type(mapped) is type(batch)
    assert [t.tolist() for t in tensors_of(mapped)] == [(2 * t).tolist() for t in tensors_of(batch)]
    if isinstance(batch, dict):
        assert list(mapped) == list(batch)
    if isinstance(batch, defaultdict):
        assert mapped["missing"] == []
        assert "missing" not in batch


def test_a_dataclass_itself_is_no_batch() -> None:
    assert clone_batch(Sample) is Sample


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (nested(rows=5), 5),
        (Sample(numbers(rows=4), "n"), 4),
        ([torch.tensor(1.0), numbers(rows=3)], 3),
        (torch.tensor(1.0), 1),
        ({"a": "text"}, 1),
        (pack_sequence([numbers(rows=4)]), 4),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


def test_join_is_concatenation_tensor_by_tensor() -> None:
    parts = [nested(0, 2), nested(50, 1), nested(90, 3)]
    for part in parts:
        part[1].pop("d")  # its string has no join
    joined = join_batches(parts)
    assert type(joined) is tuple
    assert type(joined[1]["y"][1]) is Pair
    assert type(joined[1]["f"]) is Frozen
    assert type(joined[2]) is OrderedDict
    columns = zip(*(tensors_of(part) for part in parts), strict=True)
    for tensor, column in zip(tensors_of(joined), columns, strict=True):
        assert torch.equal(tensor, torch.cat(column))


def test_join_of_one_is_that_one() -> None:
    batch = ["anything"]
    assert join_batches([batch]) is batch


def test_join_of_one_dataclass_field_each() -> None:
    joined = join_batches([Frozen(numbers()), Frozen(numbers(9))])
    assert isinstance(joined, Frozen)
    assert joined.x.shape == (4, 3)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (numbers(), numbers()[:, :2]),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (numbers(), [numbers()]),
        ([numbers()], numbers()),
        ((numbers(),), [numbers()]),
        ((numbers(),), (numbers(), numbers())),
        ({"a": numbers()}, {"b": numbers()}),
        ({"a": numbers()}, OrderedDict(a=numbers())),
        (Pair(numbers(), numbers()), (numbers(), numbers())),
        (Sample(numbers(), "n"), Sample(numbers(), "n")),
        (["a"], ["b"]),
        (numbers(), None),
        (None, None),
    ],
)
def test_what_does_not_fit_together_is_not_joined(left: Any, right: Any) -> None:
    assert join_batches([left, right]) is None


class Fields(MutableMapping[str, Any]):
    """A mapping of its own making, whose shallow copy shares the items."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def test_a_mapping_without_a_copy_of_its_own_is_not_aliased() -> None:
    x = numbers()
    batch = Fields(x=x)
    clone = clone_batch(batch)
    assert isinstance(clone, Fields)
    assert batch["x"] is x
    assert clone["x"] is not x
    assert torch.equal(clone["x"], x)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": [1, (2.0, None)], 3: torch.ones(1)}, True),
        (np.float64(1.0), False),  # a subclass of float that a weights-only load refuses
        ([np.int64(1)], False),
        ({(1, 2): 3}, False),
        (OrderedDict(a=1), False),
        (Pair(1, 2), False),
        (PackedSequence(numbers(), torch.tensor([1, 1])), False),
        ({1}, False),
    ],
)
def test_is_plain(value: Any, plain: bool) -> None:
    assert is_plain(value) is plain
