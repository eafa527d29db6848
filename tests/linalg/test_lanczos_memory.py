"""Runs that keep a 16-bit basis or none, the first product, and ending early, beside runs in float64 and the truth."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from lightning_plasticity.linalg import LanczosQuadrature, lanczos

SIZE = 600
COPIES = 2e-5
# Like a Hessian: outliers over a decade, a bulk over six, many zeros, some negative.
VALUES = np.concatenate(
    [np.linspace(3, 40, 12), 10.0 ** np.linspace(-5, 0, 188), -(10.0 ** np.linspace(-5, -1, 100)), np.zeros(300)]
)


def dense(seed=0, dtype=torch.float32):
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    matrix = basis @ torch.diag(torch.from_numpy(VALUES)) @ basis.T
    return (0.5 * (matrix + matrix.T)).to(dtype)


MATRIX = dense(dtype=torch.float64)


def probe(seed, dtype=torch.float32):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(seed=0, num_steps=120, dtype=torch.float32, **options):
    matrix = MATRIX.to(dtype)
    return lanczos(matrix.mv, probe(seed, dtype), num_steps, **options)


def quadrature(found, merge=0.0):
    return LanczosQuadrature(found.alpha, found.beta, SIZE, found.breakdown, merge)


# A float32 basis is orthonormal up to its rounding; one of 16 bits up to that of its entries, which is what it keeps.
@pytest.mark.parametrize(("storage", "tolerance"), [(None, 1e-5), (torch.float16, 2e-3)])
def test_orthogonality(storage, tolerance):
    basis = run(storage=storage, keep_basis=True).basis.double()
    gram = basis @ basis.T
    assert float((gram - torch.eye(len(basis))).abs().max()) < tolerance


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [60, 120])
def test_counts_in_16_bits_are_those_of_float64(seed, num_steps):
    truth = quadrature(run(seed, num_steps, torch.float64))
    found = quadrature(run(seed, num_steps, storage=torch.float16))
    for eps in (10.0, 2.0, 0.11, 1e-2):
        assert found.count_above(eps).value == pytest.approx(truth.count_above(eps).value, rel=5e-3, nan_ok=True)
    # No ghost: as many outliers as there are, each where it is.
    np.testing.assert_allclose(found.nodes[found.nodes > 2.5], VALUES[VALUES > 2.5], atol=1e-4)


@pytest.mark.parametrize("num_steps", [60, 150, 300])
def test_without_a_basis_copies_are_merged(num_steps):
    found = run(num_steps=num_steps, reorthogonalise=False)
    raw, merged = quadrature(found), quadrature(found, COPIES)
    outliers = VALUES[VALUES > 2.5]
    if num_steps >= 150:  # the premise: ghosts do come
        assert (raw.nodes > 2.5).sum() > len(outliers)
    np.testing.assert_allclose(merged.nodes[merged.nodes > 2.5], outliers, rtol=2e-5)
    assert merged.count_above(2.5).value == len(outliers)
    assert merged.masses.sum() == pytest.approx(1.0, abs=1e-4)
    assert merged.counts.sum() == pytest.approx(SIZE)


@pytest.mark.parametrize("num_steps", [60, 120, 300])
def test_intervals_hold_without_a_basis(num_steps):
    thresholds = (10.0, 2.5, 0.3, 1e-2, 1e-3)
    truth = [(np.abs(VALUES) > eps).sum() for eps in thresholds]
    repetitions = 25
    hits = np.zeros(len(thresholds))
    for seed in range(repetitions):
        found = quadrature(run(seed, num_steps, reorthogonalise=False), COPIES)
        for column, eps in enumerate(thresholds):
            count = found.count_above(eps)
            hits[column] += count.lower <= truth[column] <= count.upper
    assert (hits >= binom.ppf(1e-4, repetitions, 0.95)).all(), hits


def test_without_a_basis_no_vector_is_kept():
    held = []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.empty:
                held.append(tuple(result.shape))
            return result

    with Noting():
        run(num_steps=50, reorthogonalise=False)
    assert held == [(0, SIZE)]
    with pytest.raises(ValueError, match="keep_basis=True needs reorthogonalise=True"):
        run(reorthogonalise=False, keep_basis=True)


@pytest.mark.parametrize("options", [{}, {"storage": torch.float16}, {"reorthogonalise": False}])
@pytest.mark.parametrize("size", [5, SIZE])
def test_asymmetry_shows(options, size):
    generator = torch.Generator().manual_seed(3)
    skew = torch.randn(size, size, generator=generator)
    symmetric = skew + skew.T
    start = torch.randn(size, generator=generator)
    good = lanczos(symmetric.mv, start, 30, **options)
    bad = lanczos((symmetric + 0.3 * (skew - skew.T)).mv, start, 30, **options)
    assert good.asymmetry < 1e-3
    assert bad.asymmetry > 1e-2


@pytest.mark.parametrize("options", [{}, {"storage": torch.float16}, {"reorthogonalise": False}])
def test_the_first_product_saves_one_application_and_nothing_else(options):
    calls = []
    matrix, start = MATRIX.float(), probe(0) * 37.0

    def matvec(vector):
        calls.append(1)
        return matrix @ vector

    plain = lanczos(matvec, start, 20, **options)
    applications = len(calls)
    product = matrix @ start
    kept = product.clone()
    known = lanczos(matvec, start, 20, first_product=product, **options)
    assert (applications, len(calls) - applications) == (20, 19)
    assert plain.num_products == known.num_products == 20
    assert torch.equal(product, kept)
    # Not bit for bit: one product is of the vector before, the other after it was normalised. Without a basis that
    # rounding grows by as much as a Ritz value is from converged: 4e-5 here with torch 2.6, below 1e-5 with 2.14.
    np.testing.assert_allclose(known.alpha[:8], plain.alpha[:8], rtol=1e-4, atol=1e-4)
    # A copy of the largest that is just forming, as without a basis, is no eigenvalue yet.
    largest = 1 if options.get("reorthogonalise") is False else 3
    np.testing.assert_allclose(known.ritz()[0][-largest:], plain.ritz()[0][-largest:], rtol=1e-4)


def test_stop_is_asked_before_each_step_but_the_first():
    asked = []

    def stop(done):
        asked.append(done)
        return done == 7

    found = run(num_steps=30, stop=stop)
    whole = run(num_steps=30)
    assert asked == [1, 2, 3, 4, 5, 6, 7]
    assert found.num_products == len(found.alpha) == 7
    assert not found.breakdown
    np.testing.assert_array_equal(found.alpha, whole.alpha[:7])
    np.testing.assert_array_equal(found.beta, whole.beta[:7])
    assert run(num_steps=30, stop=lambda done: True).num_products == 1


def test_one_coordinate_without_a_basis():
    found = lanczos(lambda v: 3 * v, torch.ones(1), 5, reorthogonalise=False)
    assert (found.num_products, found.breakdown) == (1, True)
    merged = LanczosQuadrature(found.alpha, found.beta, 1, True, COPIES)
    assert merged.count_above(1.0).value == 1


def test_zero_matrix_without_a_basis():
    found = lanczos(lambda v: 0 * v, torch.ones(9), 5, reorthogonalise=False)
    merged = LanczosQuadrature(found.alpha, found.beta, 9, found.breakdown, COPIES)
    assert (merged.count_above(0.0).value, float(merged.counts.sum())) == (0, 9)
