"""Active entries by layer: the exact sum, and the closed forms and brute force that cannot share a mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from lightning_plasticity.sparsity import active_counts

SHAPES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.tuples(*[st.integers(1, 8)] * 2, *[st.integers(1, 3)] * 2),
    min_size=1,
    max_size=6,
)
DENSITY = st.floats(0.0, 1.0, exclude_min=True)


def counts_or_none(shapes: list[tuple[int, ...]], density: float, distribution: str) -> list[int] | None:
    try:
        found = active_counts({str(i): s for i, s in enumerate(shapes)}, density, distribution)  # type: ignore[arg-type]
    except ValueError:  # a layer would be left with nothing
        return None
    return list(found.values())


@given(SHAPES, DENSITY, st.sampled_from(["erk", "uniform"]))
def test_the_sum_is_exact_and_no_layer_is_over_full(
    shapes: list[tuple[int, ...]], density: float, distribution: str
) -> None:
    counts = counts_or_none(shapes, density, distribution)
    if counts is not None:
        sizes = [math.prod(shape) for shape in shapes]
        assert sum(counts) == round(density * sum(sizes))
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(SHAPES, DENSITY)
def test_erk_is_the_solution_of_its_equation(shapes: list[tuple[int, ...]], density: float) -> None:
    """sum n_l min(1, eps s_l) = budget, solved by bisection in floating point."""
    counts = counts_or_none(shapes, density, "erk")
    if counts is None:
        return
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=float)
    scores = np.array([sum(shape) for shape in shapes]) / sizes
    budget = round(density * sizes.sum())
    top = 1 / scores.min()
    excess = lambda eps: (sizes * np.minimum(1, eps * scores)).sum() - budget  # noqa: E731
    eps = top if excess(top) <= 0 else brentq(excess, 0, top, xtol=1e-14, rtol=1e-14)
    expected = sizes * np.minimum(1, eps * scores)
    assert np.abs(np.array(counts) - expected).max() < 1 + 1e-6


def test_the_papers_formula_by_hand() -> None:
    # Scores 60/800 and 39/1350: entries in proportion 60 : 39.
    counts = active_counts({"fc": (40, 20), "conv": (15, 10, 3, 3)}, 0.1)
    assert counts["fc"] + counts["conv"] == 215
    assert counts["fc"] == round(215 * 60 / (60 + 15 + 10 + 3 + 3))


def test_a_small_layer_is_dense_and_the_others_take_over() -> None:
    counts = active_counts({"a": (100, 100), "b": (100, 100), "small": (2, 3)}, 0.5)
    assert counts == {"a": 5000, "b": 5000, "small": 3 + 3} or sum(counts.values()) == 10003
    assert counts["small"] == 6
    assert abs(counts["a"] - counts["b"]) <= 1


def test_uniform_is_uniform() -> None:
    assert active_counts({"a": (10, 10), "b": (20, 30), "c": (5, 1)}, 0.2, "uniform") == {"a": 20, "b": 120, "c": 1}


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_density_one_is_dense(distribution: str) -> None:
    found = active_counts({"a": (7, 3), "b": (2, 5, 3)}, 1.0, distribution)  # type: ignore[arg-type]
    assert found == {"a": 21, "b": 30}
