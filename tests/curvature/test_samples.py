"""Fewer samples and other batches of nested data."""

from collections import namedtuple

import pytest
import torch
from problems import classes, cross_entropy, mlp

from lightning_plasticity.curvature import Measured, MeasurementError
from lightning_plasticity.curvature.measured import on_few
from lightning_plasticity.curvature.samples import first_samples, in_parts, in_whole_batches, num_samples

Pair = namedtuple("Pair", "x y")


def batch(start, stop):
    rows = torch.arange(start, stop)
    return {"x": rows[:, None].repeat(1, 3), "more": [rows, Pair(rows, torch.tensor(7))], "name": "kept"}


BATCHES = [batch(0, 5), batch(5, 6), batch(6, 13)]


def rows_of(batches):
    found = [[part["x"][:, 0], part["more"][0], part["more"][1].x] for part in batches]
    for parts in found:
        assert all(torch.equal(parts[0], part) for part in parts[1:])
    return torch.cat([parts[0] for parts in found]).tolist() if found else []


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 6, 7, 12, 13, 99])
def test_the_first_samples_of_nested_batches(limit):
    found = first_samples(BATCHES, limit)
    assert rows_of(found) == list(range(min(limit, 13)))
    assert num_samples(found) == min(limit, 13)
    assert all(part["name"] == "kept" and part["more"][1].y == 7 for part in found)
    if limit == 99:
        assert all(mine is theirs for mine, theirs in zip(found, BATCHES, strict=True))  # nothing is copied


@pytest.mark.parametrize("size", [1, 2, 5, 6, 99])
def test_parts_hold_every_sample_once(size):
    parts = in_parts(BATCHES, size)
    assert rows_of(parts) == list(range(13))
    assert max(num_samples([part]) for part in parts) <= size


def test_whole_batches():
    assert [in_whole_batches(BATCHES, limit) for limit in (1, 5, 6, 12, 13, 99)] == [5, 5, 6, 6, 13, 13]


def test_no_samples_at_all_are_refused():
    measured = Measured(mlp(4, 3), [classes(6, 4, 3)], cross_entropy)
    assert measured.first(2).batches[0][0].shape == (2, 4)
    with pytest.raises(MeasurementError, match="no probe data"):
        measured.first(0)


def test_a_function_of_few_samples_or_of_a_whole_batch():
    measured = Measured(mlp(4, 3), [classes(6, 4, 3), classes(2, 4, 3)], cross_entropy)
    size = lambda few: num_samples(few.batches)  # noqa: E731
    assert on_few(measured, (2, 7), size) == ([2, 7], True)
    assert on_few(measured, (6, 99), size) == ([6, 8], False)  # at the ends of batches: nothing was cut

    def picky(few):
        if size(few) != 6:
            raise RuntimeError("a batch of 6")
        return size(few)

    assert on_few(measured, (2, 4), picky) == ([6], False)
    with pytest.raises(RuntimeError, match="a batch of 6"):
        on_few(measured.first(5), (2, 4), picky)
