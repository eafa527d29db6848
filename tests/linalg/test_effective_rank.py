"""The differentiable effective rank: values and gradients against vectors, autograd, finite differences, collapse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plasticity.linalg import effective_rank

FOLDER = Path(__file__).parents[1] / "vectors"
FEATURES = np.load(FOLDER / "features.npz", allow_pickle=False)
ER_LOSS = np.load(FOLDER / "er_loss.npz", allow_pickle=False)
FEATURE_NAMES = [str(name) for name in FEATURES["names"]]
LOSS_NAMES = [str(name) for name in ER_LOSS["names"]]
OFFSET = 1e-8  # of the authors' training code


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(matrix: torch.Tensor, log_offset: float = 0.0) -> torch.Tensor:
    leaf = matrix.detach().clone().requires_grad_()
    effective_rank(leaf, log_offset=log_offset).backward()
    assert leaf.grad is not None
    return leaf.grad


def reference(matrix: torch.Tensor, log_offset: float = 0.0) -> torch.Tensor:
    """The formula through PyTorch's own SVD; its gradient is right where all singular values are positive."""
    p = torch.linalg.svdvals(matrix)
    p = p / p.sum()
    return torch.exp(-(p * torch.log(p + log_offset)).sum())


@pytest.mark.parametrize("name", FEATURE_NAMES)
def test_value_matches_the_feature_vectors(name):
    matrix = torch.from_numpy(FEATURES[f"X_{name}"])
    row = FEATURE_NAMES.index(name)
    if name == "all_zero":  # known defect: the authors report 1, and so does a bare exp(entropy); ours is 0
        assert effective_rank(matrix).item() == effective_rank(matrix, log_offset=OFFSET).item() == 0.0
        return
    # All-float64 numbers: up to 23 noise values of about eps64, times log(1 / eps64), or 2e-13.
    assert effective_rank(matrix).item() == pytest.approx(FEATURES["own_f64"][row, 0], rel=2e-13)
    training = FEATURES["authors_training_effective_rank"][row]
    assert effective_rank(matrix, log_offset=OFFSET).item() == pytest.approx(training, rel=2e-13)
    # Rounded to float32 in the file: half an ulp, 2^-24 = 6e-8.
    column = list(FEATURES["authors_columns"]).index("effective_rank(float32)")
    assert effective_rank(matrix).item() == pytest.approx(FEATURES["authors_f64"][row, column], rel=6e-8)
    # Computed in float32: the authors' noise values of eps32 are worth up to 3e-6 on the low-rank matrices.
    assert effective_rank(matrix).item() == pytest.approx(FEATURES["authors_f32"][row, column], rel=3e-6)
    # Our own float32 path: half an ulp of the result and of the input. ill_conditioned has 12 of 24 singular values
    # below the tolerance of 1.5e-6; left out, they are worth 12 * 1.5e-6 * log(1e6).
    tolerance = 2.5e-4 if name == "ill_conditioned" else 2e-7
    assert effective_rank(matrix.float()).item() == pytest.approx(FEATURES["own_f64"][row, 0], rel=tolerance)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_value_and_gradient_match_the_loss_vectors(name):
    matrix = torch.from_numpy(ER_LOSS[f"X_{name}"])
    value = effective_rank(matrix, log_offset=OFFSET).item()
    assert value == pytest.approx(float(ER_LOSS[f"erank_{name}"]), rel=1e-13)  # 10 values, as above
    ours, theirs = gradient(matrix, OFFSET), torch.from_numpy(ER_LOSS[f"grad_{name}"])
    if name in ("orthonormal", "one_row"):  # the maximum, and the only value there is: zero, up to rounding
        assert ours.abs().max() < 1e-14
    elif bool(ER_LOSS[f"unique_{name}"]):
        # Singular vectors are known to eps64 * sigma_1 / gap; spike, with a ratio of 1e3, needs the most.
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
    elif name == "ill_conditioned":
        # Full rank with sigma down to 1e-9: the small singular vectors are known to eps64 / 1e-9, about 1e-7.
        assert (ours - theirs).norm() <= 1e-7 * theirs.norm()
    else:
        # Not unique: ours is the minimum-norm choice, the authors' adds noise in the null directions. They agree on the
        # range of the matrix, and ours has nothing outside. The noise directions are known to 1e-15, their slopes ~10.
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = sigma > 1e-10 * sigma[0]
        rows, columns = u[:, kept] @ u[:, kept].T, vh[kept].T @ vh[kept]
        assert (ours - rows @ theirs @ columns).norm() < 1e-12
        assert ours.norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize("layers", ["all", "last2"])
def test_network_gradient_matches_the_vectors(layers):
    params = [torch.from_numpy(ER_LOSS[f"net_param_{i}"]).requires_grad_() for i in range(8)]
    hidden, x = [], torch.from_numpy(ER_LOSS["net_x"])
    for weight, bias in zip(params[:6:2], params[1:6:2], strict=True):
        x = torch.relu(x @ weight.T + bias)
        hidden.append(x)
    chosen = hidden if layers == "all" else hidden[-2:]
    loss = -torch.stack([effective_rank(h, log_offset=OFFSET) for h in chosen]).mean()
    # Three layers of float64 arithmetic on matrices of at most 30 rows.
    assert loss.item() == pytest.approx(float(ER_LOSS[f"net_loss_{layers}"]), rel=1e-13)
    gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    for i, ours in enumerate(gradients):
        theirs = torch.from_numpy(ER_LOSS[f"net_grad_{layers}_{i}"])
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()  # exactly zero for the output layer


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (1, 3), (6, 1)])
@pytest.mark.parametrize("log_offset", [0.0, OFFSET, 0.1])
def test_gradcheck(shape, log_offset):
    # Central differences in float64 of step 1e-6: error 1e-12 from curvature, 1e-10 from rounding.
    matrix = gaussian(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: effective_rank(m, log_offset=log_offset), matrix, atol=1e-8, rtol=1e-6)


# (rows, columns): the Gram matrix from either side, and the float32 SVD beyond 256.
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60), (300, 290)])
@pytest.mark.parametrize("log_offset", [0.0, OFFSET, 0.1])
def test_float32_routes_against_float64_autograd(shape, log_offset):
    matrix = gaussian(*shape, dtype=torch.float32)
    exact = matrix.double().requires_grad_()
    value = reference(exact, log_offset)
    value.backward()
    assert effective_rank(matrix, log_offset=log_offset).item() == pytest.approx(value.item(), rel=1e-6)
    # Gram: the result is only rounded to float32, 6e-8. SVD: noise of some eps32 * sigma_1 / sigma_q.
    tolerance = 2e-7 if min(shape) <= 256 else 1e-4
    assert (gradient(matrix, log_offset) - exact.grad).norm() <= tolerance * exact.grad.norm()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_gradient_identities(rows, columns, seed):
    matrix = gaussian(rows, columns, seed)
    slope = gradient(matrix)
    # Scale invariance: the gradient is orthogonal to F and scales inversely. Rounding relative to |g| |F| = O(10).
    assert abs((slope * matrix).sum().item()) < 1e-11
    torch.testing.assert_close(gradient(4.0 * matrix), slope / 4.0, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(matrix.T), slope.T, rtol=1e-9, atol=1e-10)


def test_ascent_raises_the_rank():
    # The sign: small singular values are pushed up and large ones down.
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    slope = gradient(matrix).diagonal()
    assert slope[0] < 0 < slope[2]
    assert effective_rank(matrix + 0.1 * gradient(matrix)) > effective_rank(matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [6, 260])
def test_collapse_has_no_gradient(dtype, size):
    # Exactly zero, not small: noise of an SVD would be a random push that differs between processes.
    zero = torch.zeros(size, size, dtype=dtype)
    assert effective_rank(zero).item() == 0.0
    assert torch.count_nonzero(gradient(zero)) == 0
    constant = torch.full((size, size), 0.7, dtype=dtype)
    assert effective_rank(constant).item() == pytest.approx(1.0, rel=1e-6)  # float32 result
    assert gradient(constant).abs().max() * 0.7 < 1e-6  # slope times size, against O(1) for noise directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_columns_get_no_gradient(dtype):
    features = torch.relu(gaussian(20, 8, dtype=dtype))
    alive = gradient(features)
    padded = torch.cat([features, torch.zeros(20, 30, dtype=dtype)], 1)
    slope = gradient(padded)
    # The same numbers up to the rounding of the dtype, and nothing of noise in the new directions.
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(slope[:, :8], alive, rtol=rounding, atol=rounding)
    assert slope[:, 8:].abs().max() <= rounding


@pytest.mark.parametrize("size", [5, 260])
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_extreme_scales_in_float32(size, scale):
    matrix = gaussian(size, size + 40, dtype=torch.float32)
    scaled = matrix * scale
    # The scaling rounds the entries by eps32 = 1e-7; singular values of these matrices are within a factor of 20.
    assert effective_rank(scaled).item() == pytest.approx(effective_rank(matrix).item(), rel=1e-5)
    torch.testing.assert_close(gradient(scaled) * scale, gradient(matrix), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [4, 260])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_visible_and_does_not_raise(dtype, size, bad):
    matrix = torch.ones(size, size, dtype=dtype)
    matrix[1, 2] = bad
    assert math.isnan(effective_rank(matrix).item())
    assert gradient(matrix).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    features = gaussian(12, 8).to(dtype)
    expected = reference(features.double())
    assert effective_rank(features).dtype == torch.float32
    assert gradient(features).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for matrix in (features, features.float(), features.double()):
            # The entries are taken as exact, so the result has the precision of float32.
            assert effective_rank(matrix).item() == pytest.approx(expected.item(), rel=2e-7)
        inside = gradient(features.float())
    assert torch.equal(inside, gradient(features.float()))


def test_differentiable_once_and_only_when_asked():
    assert not effective_rank(gaussian(4, 3)).requires_grad
    with torch.no_grad():
        assert not effective_rank(gaussian(4, 3).requires_grad_()).requires_grad
    leaf = gaussian(4, 3).requires_grad_()
    (slope,) = torch.autograd.grad(effective_rank(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*svdvals"):
        slope.sum().backward()


def test_log_offset_is_validated():
    for bad in (-1e-8, math.nan, math.inf):
        with pytest.raises(ValueError, match="log_offset="):
            effective_rank(torch.eye(2), log_offset=bad)
