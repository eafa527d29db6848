"""Ranks: reference vectors, closed forms, invariants, degenerate input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plasticity.linalg import (
    approximate_rank,
    effective_rank,
    effective_rank_of,
    feature_rank,
    numerical_rank,
    participation_ratio,
    participation_ratio_of,
    singular_values,
    srank,
    srank_of,
    stable_rank,
    stable_rank_of,
)

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "features.npz", allow_pickle=False)
NAMES = [str(name) for name in VECTORS["names"]]
MATRIX_FUNCTIONS = [
    effective_rank, stable_rank, srank, approximate_rank, feature_rank, numerical_rank, participation_ratio,
]  # fmt: skip
SCALE_INVARIANT = [function for function in MATRIX_FUNCTIONS if function is not feature_rank]
OWN_COLUMNS = {
    "effective_rank": effective_rank,
    "srank_0.01": srank,
    "stable_rank": stable_rank,
    "matrix_rank_default_tol": numerical_rank,
    "lyle_feature_rank_0.01": feature_rank,
    "participation_ratio": participation_ratio,
}
# Two float64 decompositions of a matrix of at most 40 rows differ by some eps64 * sigma_1; 40 * eps64 is 9e-15, and the
# functionals amplify it by no more than log(1 / eps64) = 36 per value.
FLOAT64 = 1e-13
shapes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000))


def matrix_of(name: str) -> torch.Tensor:
    return torch.from_numpy(VECTORS[f"X_{name}"])


def own(name: str, column: str) -> float:
    return float(VECTORS["own_f64"][NAMES.index(name), list(VECTORS["own_columns"]).index(column)])


def authors(name: str, column: str, precision: str = "f64") -> float:
    return float(VECTORS[f"authors_{precision}"][NAMES.index(name), list(VECTORS["authors_columns"]).index(column)])


def random_matrix(shape: tuple[int, int, int]) -> torch.Tensor:
    rows, columns, seed = shape
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_singular_values_match_the_vectors(name):
    sigma, expected = singular_values(matrix_of(name)), torch.from_numpy(VECTORS[f"sv_{name}"])
    torch.testing.assert_close(sigma, expected, rtol=0, atol=FLOAT64 * float(expected[0]))


@pytest.mark.parametrize("column", OWN_COLUMNS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_match_the_vectors(name, column):
    # The vector's effective rank of an all-zero matrix is 1, exp of an empty entropy; here 0 like every other rank.
    expected = 0.0 if name == "all_zero" else own(name, column)
    assert OWN_COLUMNS[column](matrix_of(name)).item() == pytest.approx(expected, rel=FLOAT64)


@pytest.mark.parametrize("name", NAMES)
def test_approximate_ranks_match_the_authors(name):
    # Whole numbers, so exactly. Known defect: the authors' all-zero matrix has ranks of 1, ours of 0.
    squares, plain = approximate_rank(matrix_of(name)).item(), srank(matrix_of(name)).item()
    if name == "all_zero":
        assert (squares, plain) == (0.0, 0.0)
        return
    assert (squares, plain) == (authors(name, "approx_rank_sq"), authors(name, "approx_rank_abs"))
    # Float32 input: ill_conditioned alone may be off by one, as the share of the sum lies near the threshold.
    slack = 1 if name == "ill_conditioned" else 0
    assert abs(approximate_rank(matrix_of(name).float()).item() - authors(name, "approx_rank_sq", "f32")) <= slack
    assert abs(srank(matrix_of(name).float()).item() - authors(name, "approx_rank_abs", "f32")) <= slack


@pytest.mark.parametrize("name", NAMES)
def test_authors_rank_counts_rounding_noise(name):
    # Known defect: the authors count sigma != 0, so a rank-1 matrix reports 24. Where no sigma is noise, we agree.
    rank = numerical_rank(matrix_of(name)).item()
    assert rank <= authors(name, "rank")
    if name not in ("rank1", "rank3", "dup_columns", "zero_columns", "relu_like", "same_row"):
        assert rank == authors(name, "rank")


def test_diagonal_by_hand():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64))[:, :4]
    # p = 1/2, 1/4, 1/8, 1/8 has an entropy of 7/4 bits. Closed forms: only rounding is allowed.
    assert effective_rank(matrix).item() == pytest.approx(2**1.75, rel=FLOAT64)
    assert stable_rank(matrix).item() == pytest.approx(22 / 16, rel=FLOAT64)
    assert participation_ratio(matrix).item() == pytest.approx(22**2 / (256 + 16 + 2), rel=FLOAT64)
    assert srank(matrix, delta=0.25).item() == 2  # 4 + 2 of 8, a tie that counts as reached
    assert srank(matrix, delta=0.24).item() == 3
    assert approximate_rank(matrix, delta=0.1).item() == 2  # 20 of 22 is 0.909
    assert approximate_rank(matrix, delta=0.09).item() == 3
    assert feature_rank(matrix, eps=0.75).item() == 2  # divided by sqrt(4): 2, 1, 0.5, 0.5
    assert numerical_rank(matrix).item() == 4


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_orthonormal_and_rank_one(function):
    q, _ = torch.linalg.qr(random_matrix((9, 5, 0)))
    assert function(q).item() == pytest.approx(5.0, rel=FLOAT64)
    outer = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 4.0)).double()
    assert function(outer).item() == pytest.approx(1.0, rel=FLOAT64)


def test_feature_rank_divides_by_the_number_of_samples():
    features = torch.eye(9, 4, dtype=torch.float64)  # over sqrt(9): the threshold of 0.01 is at 0.03
    assert feature_rank(0.0299 * features).item() == 0.0
    assert feature_rank(0.0301 * features).item() == 4.0


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
@given(shape=shapes)
@settings(max_examples=30, deadline=None)
def test_bounds_and_rotation(function, shape):
    matrix = random_matrix(shape)
    rank = function(matrix).item()
    assert 1 - 1e-12 <= rank <= min(matrix.shape) + 1e-12  # only rounding may pass the bounds
    rotation, _ = torch.linalg.qr(random_matrix((shape[0], shape[0], 1)))
    # A rotation moves every sigma by some eps64 * sigma_1, and random spectra lie nowhere near a threshold.
    assert function(rotation @ matrix).item() == pytest.approx(rank, rel=1e-12)
    assert function(matrix.T @ rotation).item() == pytest.approx(rank, rel=1e-12) or function is feature_rank


@pytest.mark.parametrize("function", SCALE_INVARIANT)
@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e18, 1e300])
@given(shape=shapes)
@settings(max_examples=10, deadline=None)
def test_scale(function, scale, shape):
    matrix = random_matrix(shape)
    # The product with the scale rounds each entry by eps64, no more.
    assert function(scale * matrix).item() == pytest.approx(function(matrix).item(), rel=1e-12)


@given(shape=shapes)
@settings(max_examples=30, deadline=None)
def test_duplicates_keep_the_rank(shape):
    matrix = random_matrix(shape)
    for function in (effective_rank, stable_rank, srank, approximate_rank, participation_ratio, numerical_rank):
        # [F, F] has the singular values sqrt(2) sigma and zeros, which come back as noise of eps64 * sigma_1.
        assert function(torch.cat([matrix, matrix], 1)).item() == pytest.approx(function(matrix).item(), rel=1e-12)


@pytest.mark.parametrize("function", [effective_rank_of, stable_rank_of, srank_of, participation_ratio_of])
@given(data=st.lists(st.tuples(st.floats(0.01, 10.0), st.integers(0, 4)), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_counts_are_repetitions(function, data):
    values, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*data, strict=True))
    repeated = values.repeat_interleave(counts.long())
    expected = function(repeated).item() if len(repeated) else 0.0
    assert function(values, counts).item() == pytest.approx(expected, rel=1e-12)  # sums in another order


def test_fractional_counts():
    values, counts = torch.tensor([1.0, 3.0]), torch.tensor([2.5, 0.5])
    # Mass 4.0: half needs the 0.5 of the value 3 and 0.5 of the value 1, so exactly one; a bit more needs two.
    assert srank_of(values, counts, delta=0.5).item() == 1.0
    assert srank_of(values, counts, delta=0.49).item() == 2.0
    q = torch.tensor([0.25, 0.75], dtype=torch.float64)
    entropy = -(counts.double() * q * q.log()).sum()
    assert effective_rank_of(values, counts).item() == pytest.approx(math.exp(entropy), rel=FLOAT64)
    assert stable_rank_of(values, counts).item() == pytest.approx((2.5 + 4.5) / 9, rel=FLOAT64)


def test_functionals_are_batched():
    values = torch.stack([torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3), torch.tensor([1.0, math.nan, 0.0])])[:, None]
    for function in (effective_rank_of, stable_rank_of, srank_of, participation_ratio_of):
        result = function(values, torch.tensor([1.0, 1.0, 2.0]))
        assert result.shape == (3, 1)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result[:, 0], torch.tensor([2.0, 0.0, math.nan]).double(), equal_nan=True)


def test_srank_tie_does_not_depend_on_scale():
    for scale in (1.0, 1 / 3, 1e-7, 0.1):
        assert srank_of(torch.full((100,), scale, dtype=torch.float64)).item() == 99.0


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_input(function, dtype):
    assert function(torch.zeros(4, 3, dtype=dtype)).item() == 0.0
    for single in (torch.ones(1, 3, dtype=dtype), torch.ones(3, 1, dtype=dtype), torch.ones(4, 3, dtype=dtype)):
        assert function(single).item() == pytest.approx(1.0, rel=1e-6)  # float32 is the least precise result
    for bad in (math.nan, math.inf, -math.inf):
        matrix = torch.ones(4, 3, dtype=dtype)
        matrix[1, 2] = bad
        assert math.isnan(function(matrix).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_noise(dtype):
    # By the epsilon of bfloat16, 256 rows would put the threshold of the numerical rank above sigma_1.
    features = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert numerical_rank(features).item() == 4.0


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_errors_say_what_to_do(function):
    with pytest.raises(ValueError, match=r"shape \(3,\); expected a matrix \(N, D\).*as_feature_matrix"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match=r"empty matrix of shape \(0, 3\)"):
        function(torch.ones(0, 3))
    with pytest.raises(TypeError, match=r"int64; expected floating point.*\.float\(\)"):
        function(torch.ones(2, 3, dtype=torch.long))


def test_settings_are_validated():
    for delta in (0.0, 1.0, -0.1, math.nan):
        for function in (srank, approximate_rank, srank_of):
            with pytest.raises(ValueError, match="delta="):
                function(torch.ones(2, 2), delta=delta)
    with pytest.raises(ValueError, match="eps=-1"):
        feature_rank(torch.ones(2, 2), eps=-1.0)
    with pytest.raises(ValueError, match="negative values or counts"):
        effective_rank_of(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="at least one value"):
        stable_rank_of(torch.ones(3, 0))
