"""Counts through LDL^T against all eigenvalues."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plasticity.linalg import count_above


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = basis * values @ basis.T
    return 0.5 * (matrix + matrix.T)


@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 1e-6, 0.5, 2.0, 2.0, 1e3]), min_size=1, max_size=30),
    st.lists(st.sampled_from([-4.0, -2.0, -0.5, 1e-8, 1e-3, 1.0, 10.0, 1e4]), max_size=4),
    st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_the_eigenvalues(eigenvalues, thresholds, seed):
    # Thresholds keep away from eigenvalues by more than rounding, 30 * 2e-16 * 1e3; repeated and zero ones are allowed.
    expected = [sum(value > threshold for value in eigenvalues) for threshold in thresholds]
    assert count_above(symmetric(eigenvalues, seed), thresholds) == expected


@pytest.mark.parametrize("size", [1, 2, 17, 120])
def test_indefinite_matrices_that_need_blocks(size):
    # A zero diagonal: no 1 x 1 pivot can begin, and the diagonal of D says nothing.
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    matrix.fill_diagonal_(0.0)
    values = torch.linalg.eigvalsh(matrix)
    thresholds = [-1.5, -1e-9, 1e-9, 0.7]
    assert count_above(matrix, thresholds) == [int((values > threshold).sum()) for threshold in thresholds]
    factors, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
    assert size == 1 or bool((pivots < 0).any())
    if size == 2:  # reading the diagonal only would not have done
        assert int((factors.diagonal() > 0).sum()) == 0


def test_low_rank_and_zero():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    assert count_above(rows @ rows.T, [1e-10]) == [3]
    assert count_above(torch.zeros(5, 5), [-1.0, 0.0, 1.0]) == [5, 0, 0]
    assert count_above(torch.zeros(0, 0), [1.0]) == [0]
    assert count_above(torch.eye(4, dtype=torch.float64), []) == []


def test_only_the_lower_triangle_is_read_and_nothing_written():
    matrix = torch.tensor([[2.0, 99.0], [0.0, 3.0]], dtype=torch.float64)
    before = matrix.clone()
    assert count_above(matrix, [2.5]) == [1]
    assert torch.equal(matrix, before)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(n, n\)"):
        count_above(torch.zeros(2, 3), [0.0])
    with pytest.raises(ValueError, match="NaN or inf"):
        count_above(torch.full((2, 2), float("nan")), [0.0])
    with pytest.raises(ValueError, match="NaN or inf"):
        count_above(torch.eye(2), [float("nan")])
