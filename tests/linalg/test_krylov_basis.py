"""The stored basis: orthogonality in full precision and in 16 bits, and the second pass."""

import numpy as np
import pytest
import torch

from lightning_plasticity.linalg import krylov_basis
from lightning_plasticity.linalg.krylov_basis import KrylovBasis

SIZE = 40_000  # more than two blocks of 16-bit vectors


def random_vectors(count, size=SIZE, seed=0, dtype=torch.float32):
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(vectors.T).Q.T.to(dtype)


def filled(vectors, storage=None):
    basis = KrylovBasis(len(vectors) + 2, vectors.shape[1], vectors.dtype, vectors.device, storage)
    for vector in vectors:
        basis.append(vector)
    return basis


# Rounding of one stored vector, relative: 2^-24 and 2^-11 at most for each entry.
@pytest.mark.parametrize(("storage", "rounding"), [(None, 1e-7), (torch.float16, 5e-4)])
def test_vectors_come_back(storage, rounding):
    vectors = random_vectors(5)
    basis = filled(vectors, storage)
    assert len(basis) == 5
    assert basis.vectors().dtype == torch.float32
    assert float((basis.vectors() - vectors).norm(dim=1).max()) < rounding


@pytest.mark.parametrize(("storage", "rounding"), [(None, 1e-6), (torch.float16, 1e-3)])
def test_sweep_takes_out_the_part_in_the_space(storage, rounding):
    vectors = random_vectors(6)
    inside = torch.tensor([3.0, -2.0, 0.5, 0.0, 1.0, -1.0])
    outside = random_vectors(7)[6]
    vector = inside @ vectors + outside
    coefficients = filled(vectors, storage).sweep(vector)
    torch.testing.assert_close(coefficients, inside, atol=4 * rounding, rtol=0)
    # What the sweep leaves is orthogonal up to the rounding of the vectors that are stored.
    assert float((vectors.double() @ vector.double()).abs().max()) < 4 * rounding
    assert float((vector - outside).norm()) < 10 * rounding


def test_what_is_small_before_the_sweep_is_smaller_after_it_in_16_bits_too():
    # The recurrence has subtracted the large parts in full precision: rounding enters in proportion to what is left.
    vectors, outside = random_vectors(6), random_vectors(7)[6]
    vector = 1e-4 * vectors.sum(0) + outside
    filled(vectors, torch.float16).sweep(vector)
    assert float((vectors.double() @ vector.double()).abs().max()) < 1e-6


@pytest.mark.parametrize("left", [0.5, 0.01])
def test_second_pass_only_where_little_is_left(left, monkeypatch):
    passes, once = [], KrylovBasis._pass
    monkeypatch.setattr(KrylovBasis, "_pass", lambda self, vector: passes.append(1) or once(self, vector))
    vectors = random_vectors(7)
    vector = (1 - left**2) ** 0.5 * vectors[0] + left * vectors[6]
    filled(vectors[:6]).sweep(vector)
    assert len(passes) == (1 if left > krylov_basis.SECOND_PASS else 2)
    assert float((vectors[:6].double() @ vector.double()).abs().max()) < 3e-7


@pytest.mark.parametrize("size", [1, 7, 16_384, 16_385])
def test_blocks_of_every_size(size):
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
    basis = filled(unit[None], torch.float16)
    vector = torch.randn(size, generator=generator)
    expected = float(unit.double() @ vector.double())
    assert float(basis.sweep(vector)[0]) == pytest.approx(expected, abs=2e-3 * (1 + abs(expected)))


def test_a_unit_vector_on_one_coordinate_does_not_overflow_16_bits():
    vector = torch.zeros(10**7)
    vector[3] = 1.0  # sqrt(1e7) is 3162, and the largest of 16 bits 65504
    basis = KrylovBasis(1, len(vector), torch.float32, vector.device, torch.float16)
    basis.append(vector)
    assert float(basis.sweep(vector.clone())[0]) == pytest.approx(1.0, rel=1e-3)


def test_16_bits_take_half_the_memory():
    full, half = (KrylovBasis(10, 1000, torch.float32, torch.device("cpu"), dtype) for dtype in (None, torch.float16))
    assert half._stored.untyped_storage().nbytes() * 2 == full._stored.untyped_storage().nbytes()
    assert np.prod(KrylovBasis(0, 1000, torch.float32, torch.device("cpu"))._stored.shape) == 0
