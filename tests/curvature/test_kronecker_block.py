"""A Kronecker block against the dense matrix that it stands for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from lightning_plasticity.curvature import KroneckerBlock, KroneckerError, KroneckerSpectrum, Spectrum
from lightning_plasticity.linalg import effective_rank, effective_rank_of, numerical_rank


def factor(size: int, rank: int, seed: int) -> Tensor:
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / max(rank, 1)


def block(a: Tensor, b: Tensor, name: str = "layer") -> KroneckerBlock:
    return KroneckerBlock(name, (f"{name}.weight",), a, b)


sizes = st.integers(1, 7)


@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_lazy_is_dense(size_a: int, rank_a: int, size_b: int, rank_b: int, seed: int) -> None:
    a, b = factor(size_a, min(rank_a, size_a), seed), factor(size_b, min(rank_b, size_b), seed + 1)
    lazy = block(a, b)
    dense = torch.linalg.eigvalsh(torch.kron(b, a)).clamp_min(0.0)
    top = float(dense[-1])
    torch.testing.assert_close(lazy.eigenvalues(), dense, rtol=1e-10, atol=1e-13 * top)
    assert lazy.num_params == size_a * size_b
    assert lazy.rank == min(rank_a, size_a) * min(rank_b, size_b) == int(numerical_rank(torch.kron(b, a)))
    assert lazy.trace().value == pytest.approx(float(torch.trace(torch.kron(a, b))))
    assert lazy.frobenius_norm().value == pytest.approx(float(torch.kron(a, b).norm()))
    assert lazy.lambda_max().value == pytest.approx(top)
    assert lazy.effective_rank().value == pytest.approx(float(effective_rank_of(dense)), rel=1e-9)
    for relative in (0.9, 0.1, 1e-3):
        assert lazy.epsilon_rank(relative, relative=True).value == float((dense > relative * top).sum())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_counts_at_ties(a: list[int], b: list[int]) -> None:
    # Every threshold below is a product, often several times over, and thirds and sevenths round.
    lazy = block(torch.diag(torch.tensor(a).double() / 3), torch.diag(torch.tensor(b).double() / 7))
    products = torch.outer(lazy.input_eigenvalues, lazy.output_eigenvalues).flatten()
    for threshold in {0.0, *products.tolist()}:
        assert lazy.count_above(threshold) == int((products > threshold).sum())
    edges = torch.tensor([0.0, 0.1, 0.2, 10.0], dtype=torch.float64)
    expected = [int(((products > low) & (products <= high)).sum()) for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 10))]
    assert lazy.histogram(edges).tolist() == expected


def test_counts_where_a_quotient_rounds_the_other_way() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(2))
    lazy = block(torch.diag(a), torch.diag(b))
    products = torch.outer(lazy.input_eigenvalues, lazy.output_eigenvalues).flatten()
    for threshold in products.tolist():
        assert lazy.count_above(threshold) == int((products > threshold).sum())


def test_input_factor_has_the_rank_of_the_features() -> None:
    features = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    features = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    found = block(features.T @ features / 40, torch.eye(2, dtype=torch.float64))
    assert found.rank == 2 * int(numerical_rank(features)) == 8
    # Squaring the singular values sharpens their distribution, so A is less spread out than the features are.
    assert float(effective_rank_of(found.input_eigenvalues)) < float(effective_rank(features))


def test_zero_factor() -> None:
    dead = block(factor(4, 4, 0), torch.zeros(3, 3, dtype=torch.float64))
    assert (dead.rank, dead.trace().value, dead.effective_rank().value, dead.stable_rank().value) == (0, 0.0, 0.0, 0.0)
    assert dead.epsilon_rank(0.0).value == 0
    assert dead.epsilon_rank(0.1, relative=True).value == 0
    together = KroneckerSpectrum({"dead": dead}, {}, 1)
    assert together.effective_rank().value == 0.0
    assert together.spectrum().trace().value == 0.0


def test_negative_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="expected eps >= 0"):
        block(torch.eye(2).double(), torch.eye(2).double()).epsilon_rank(-1.0)


def three_blocks() -> KroneckerSpectrum:
    blocks = {
        "one": block(factor(5, 3, 0), factor(4, 4, 1), "one"),
        "two": block(factor(3, 3, 2), factor(2, 1, 3), "two"),
    }
    dead = {"dead": block(factor(2, 2, 4), torch.zeros(2, 2, dtype=torch.float64), "dead")}
    return KroneckerSpectrum(blocks | dead, {"norm": "a norm"}, num_samples=10)


def test_result_answers_like_its_spectrum() -> None:
    lazy = three_blocks()
    spectrum = lazy.spectrum()
    assert spectrum.matrix == "kronecker"
    assert spectrum.num_params == lazy.num_params == 20 + 6 + 4
    assert lazy.rank == 12 + 3
    for name in ("effective_rank", "trace", "lambda_max", "lambda_min", "stable_rank", "participation_ratio", "srank"):
        assert getattr(lazy, name)().value == pytest.approx(getattr(spectrum, name)().value, rel=1e-10), name
    for eps in (0.0, 1e-3, 0.1, 1.0, 3.0):
        assert lazy.epsilon_rank(eps) == spectrum.epsilon_rank(eps)
        assert lazy.epsilon_rank(eps, relative=True) == spectrum.epsilon_rank(eps, relative=True)


def test_errors_against() -> None:
    lazy = three_blocks()
    exact = {
        "one": Spectrum.from_eigenvalues(0.5 * lazy.layers["one"].eigenvalues(), 20, num_samples=10),
        "dead": Spectrum.from_eigenvalues(torch.zeros(1), 4, num_samples=10),
        "whole": lazy.spectrum(),
    }
    errors = lazy.errors_against(exact)
    assert errors["one"].trace == pytest.approx(1.0)
    assert errors["one"].lambda_max == pytest.approx(1.0)
    assert errors["dead"] == KroneckerError(0.0, 0.0)
    assert errors["whole"].trace == pytest.approx(0.0, abs=1e-12)
    assert errors["whole"].lambda_max == pytest.approx(0.0, abs=1e-12)
    alive = {"dead": Spectrum.from_eigenvalues(torch.ones(1), 4, num_samples=10)}
    assert lazy.errors_against(alive)["dead"] == KroneckerError(-1.0, -1.0)
    with pytest.raises(ValueError, match="over 20 coordinates and 3 samples"):
        lazy.errors_against({"one": Spectrum.from_eigenvalues(torch.ones(1), 20, num_samples=3)})
    with pytest.raises(ValueError, match="layers: one, two, dead"):
        lazy.errors_against({"none": exact["one"]})
