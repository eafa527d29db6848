"""The recurrence: its defining identity, orthonormality, breakdown, and the reference coefficients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import dense_hessian, from_vectors
from torch.nn import functional as F

from lightning_plasticity.linalg import lanczos

HESSIANS = ("a_fresh", "a_dead", "b_fresh", "b_rank1", "c_fresh", "c_huge", "d_uneven_batch")


def symmetric(eigenvalues, seed=0, dtype=torch.float64):
    """A dense matrix with these eigenvalues in a random basis."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    matrix = basis @ torch.diag(values) @ basis.T
    return (0.5 * (matrix + matrix.T)).to(dtype)


def start_vector(size, seed=1, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tridiagonal(run):
    return torch.from_numpy(np.diag(run.alpha) + np.diag(run.beta[:-1], 1) + np.diag(run.beta[:-1], -1))


# Hard: outliers over six decades above a clustered bulk, of both signs.
OUTLIERS = np.concatenate([10.0 ** np.linspace(-2, 4, 25), [-300.0, -5.0], np.linspace(-1e-3, 1e-3, 273)])


# A few times the rounding of one dense product, relative to the largest eigenvalue.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_identity_and_orthonormality_on_a_hard_spectrum(dtype, tolerance):
    matrix = symmetric(OUTLIERS, dtype=dtype)
    run = lanczos(lambda v: matrix @ v, start_vector(300, dtype=dtype), 60, keep_basis=True)
    basis = run.basis.double()
    assert run.basis.dtype == dtype
    # In float32 the bulk lies below the rounding of the outliers: the run ends once it has those and one node for it.
    assert len(basis) == 60 if dtype == torch.float64 else 26 <= len(basis) <= 30
    assert run.breakdown == (dtype == torch.float32)
    gram = basis @ basis.T
    assert float((gram - torch.eye(len(basis))).abs().max()) < tolerance
    projected = basis @ matrix.double() @ basis.T
    assert float((projected - tridiagonal(run)).abs().max()) < tolerance * 1e4  # relative to the largest eigenvalue
    # A V = V T + beta_K v_{K+1} e_K^T: all columns but the last are in the span, the last leaves beta_K.
    rest = basis @ matrix.double() - tridiagonal(run) @ basis
    assert float(rest[:-1].norm(dim=1).max()) < tolerance * 1e4
    assert float(rest[-1].norm()) == pytest.approx(run.beta[-1], abs=tolerance * 1e2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-2)])
def test_no_ghosts(dtype, tolerance):
    # Without reorthogonalisation the top eigenvalues converge a second time. Here each of the 20 outliers has one
    # Ritz value within the tolerance (float32: 6e-8 of the largest, 1e3, times tens of steps) and no other.
    outliers = np.linspace(50.0, 1000.0, 20)
    values = np.concatenate([outliers, np.linspace(-1, 1, 280)])
    matrix = symmetric(values, dtype=dtype)
    nodes, _ = lanczos(lambda v: matrix @ v, start_vector(300, dtype=dtype), 100).ritz()
    found = nodes[nodes > 10]
    assert len(found) == len(outliers)
    np.testing.assert_allclose(found, outliers, rtol=0, atol=tolerance)


@given(size=st.integers(1, 25), seed=st.integers(0, 2**16))
def test_full_runs_are_exact(size, seed):
    generator = np.random.default_rng(seed)
    values = np.sort(generator.normal(size=size))
    matrix = symmetric(values, seed)
    run = lanczos(lambda v: matrix @ v, start_vector(size, seed + 1), size, keep_basis=True)
    nodes, vectors = run.ritz()
    assert run.breakdown or run.num_products == size
    # Close pairs may be found as one (a breakdown), so each Ritz value is compared with its nearest eigenvalue.
    assert max(np.abs(values - node).min() for node in nodes) < 1e-10
    # The K moments <v, A^k v> that Lanczos fixes, whatever it found.
    start = start_vector(size, seed + 1)
    start = start / start.norm()
    for power in range(4):
        moment = float(start @ torch.linalg.matrix_power(matrix, power) @ start)
        assert float((vectors[0] ** 2) @ nodes**power) == pytest.approx(moment, abs=1e-9)


@given(size=st.integers(2, 40), num_steps=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_orthonormal_for_all_sizes(size, num_steps, seed):
    matrix = symmetric(np.random.default_rng(seed).standard_t(2, size=size), seed)
    run = lanczos(lambda v: matrix @ v, start_vector(size, seed), num_steps, keep_basis=True)
    assert run.num_products == len(run.alpha) == len(run.beta) == len(run.basis) <= min(size, num_steps)
    torch.testing.assert_close(
        run.basis @ run.basis.T, torch.eye(len(run.basis), dtype=torch.float64), atol=1e-12, rtol=0
    )
    scale = float(torch.linalg.matrix_norm(matrix, 2))
    torch.testing.assert_close(run.basis @ matrix @ run.basis.T, tridiagonal(run), atol=1e-12 * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([0.0] * 50, 1),  # the zero matrix
        ([3.0] * 50, 1),  # a multiple of the identity
        ([7.0], 1),  # size 1
        ([5.0, -2.0, 1.0] + [0.0] * 47, 4),  # rank 3 and the null space
        ([2.0] * 20 + [-1.0] * 30, 2),  # repeated eigenvalues
        ([1e6] + [0.0] * 49, 2),  # one outlier alone
    ],
)
def test_breakdown(values, steps, dtype):
    # Diagonal matrices, so that the eigenvalues are exact in float32 too.
    diagonal = torch.tensor(values, dtype=dtype)
    run = lanczos(lambda v: diagonal * v, start_vector(len(values), dtype=dtype), 30)
    assert run.breakdown
    assert run.num_products == steps
    nodes, vectors = run.ritz()
    scale = max(abs(np.array(values)).max(), 1.0)
    # The distinct eigenvalues, and on each the weight of the start vector in its eigenspace.
    np.testing.assert_allclose(nodes, np.unique(values), rtol=0, atol=2e-6 * scale)
    start = start_vector(len(values), dtype=dtype).double().numpy()
    weights = [(start[np.array(values) == node] ** 2).sum() / (start**2).sum() for node in np.unique(values)]
    np.testing.assert_allclose(vectors[0] ** 2, weights, rtol=1e-5)


def test_no_breakdown_is_reported_where_there_is_none():
    matrix = symmetric(np.linspace(-1, 1, 40))
    assert not lanczos(lambda v: matrix @ v, start_vector(40), 20).breakdown
    assert lanczos(lambda v: matrix @ v, start_vector(40), 40).breakdown


def test_more_steps_than_coordinates_are_not_done():
    diagonal = torch.arange(1.0, 6.0, dtype=torch.float64)
    run = lanczos(lambda v: diagonal * v, torch.ones(5, dtype=torch.float64), 100)
    assert run.num_products == 5
    np.testing.assert_allclose(run.ritz()[0], [1, 2, 3, 4, 5], rtol=1e-12)


def test_the_start_vector_is_normalised_and_left_alone():
    diagonal, start = torch.arange(1.0, 9.0, dtype=torch.float64), start_vector(8)
    before = start.clone()
    small, large = (lanczos(lambda v: diagonal * v, factor * start, 5) for factor in (1e-30, 1e30))
    np.testing.assert_allclose(small.alpha, large.alpha, rtol=1e-12)
    assert torch.equal(start, before)
    assert small.basis is None


def test_bad_arguments():
    ones = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"num_steps=0, expected at least 1; 60 is"):
        lanczos(lambda v: v, ones, 0)
    with pytest.raises(ValueError, match="finite nonzero vector"):
        lanczos(lambda v: v, 0 * ones, 3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite nonzero vector"):
            lanczos(lambda v: v, bad * ones, 3)
        with pytest.raises(ValueError, match="Product 1 of the operator is not finite"):
            lanczos(lambda v, bad=bad: bad * v, ones, 3)


def reference_operator(arrays, case):
    """The exact Hessian; for the uneven batches the mean of the two batches' Hessians, which the reference runs on."""
    net, (inputs, targets) = from_vectors(arrays)
    if case != "d_uneven_batch":
        return dense_hessian(net, F.cross_entropy, inputs, targets)
    parts = [
        dense_hessian(net, F.cross_entropy, inputs[part], targets[part]) for part in (slice(100), slice(100, None))
    ]
    return 0.5 * (parts[0] + parts[1])


@pytest.mark.parametrize("case", HESSIANS)
def test_reference_runs(vectors, case):
    arrays = vectors(f"hessian_{case}")
    hessian, start = reference_operator(arrays, case), torch.from_numpy(arrays["lanczos_init"])
    # The README of the vectors: coefficients at the small order to a relative 1e-8 (some of them are nearly zero).
    small = lanczos(lambda v: hessian @ v, start, 8)
    top = np.abs(arrays["hessian_eigs"]).max()
    np.testing.assert_allclose(small.alpha, arrays["m8_alpha"], rtol=1e-8, atol=1e-10 * top)
    np.testing.assert_allclose(small.beta[:-1], arrays["m8_beta"], rtol=1e-8)
    np.testing.assert_allclose(small.ritz()[0], arrays["m8_ritz"], rtol=1e-8, atol=1e-10 * top)
    # At the large order sums only: the coefficients are sensitive to rounding.
    order = 30 if case == "d_uneven_batch" else 40
    nodes, basis = lanczos(lambda v: hessian @ v, start, order).ritz()
    for function in (np.ones_like, lambda x: x, np.abs, np.square):
        theirs = arrays[f"m{order}_weights"] @ function(arrays[f"m{order}_ritz"])
        # |x| is not smooth at zero, where the nodes of the null space wander by 1e-8 of the largest or so.
        assert basis[0] ** 2 @ function(nodes) == pytest.approx(theirs, rel=1e-8, abs=1e-8 * top)
    np.testing.assert_allclose(nodes[[0, -1]], arrays[f"m{order}_ritz"][[0, -1]], rtol=1e-8)
