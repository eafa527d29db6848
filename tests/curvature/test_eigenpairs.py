"""Eigenpairs of the Hessian against dense eigendecompositions, and where one start vector does not see them all."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import numpy as np
import problems
import pytest
import torch
from states import changed, state
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_plasticity.curvature.hessian.eigenpairs as eigenpairs
from lightning_plasticity.curvature import Eigenpairs, MeasurementError, hessian_eigenpairs
from lightning_plasticity.curvature.hessian.arpack import ORDERS, ArpackIteration

WHICH = tuple(ORDERS)


def dense(net: nn.Module, loss: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    matrix = problems.dense_hessian(net, loss, *data)
    return 0.5 * (matrix + matrix.T)


def expected(matrix: Tensor, k: int, which: str) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    order = torch.from_numpy(ORDERS[which][0](values.numpy())).argsort(descending=True, stable=True)[:k]
    return values[order], vectors.T[order]


def check(found: Eigenpairs, matrix: Tensor, k: int, which: str, tolerance: float = 1e-9) -> None:
    """Values, residuals and orthonormality; ``tolerance`` relative to the largest eigenvalue."""
    values, _ = expected(matrix, k, which)
    top = float(torch.linalg.eigvalsh(matrix).abs().max())
    vectors = found.vectors.double()
    # By what decides: of two values +x and -x either may come first. The residuals vouch for the signs.
    key = ORDERS[which][0]
    np.testing.assert_allclose(key(found.values.numpy()), key(values.numpy()), rtol=0, atol=tolerance * top)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(values)).double(), rtol=0, atol=1e-6)
    residuals = (vectors @ matrix - found.values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=tolerance * top)


def tanh_net() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return problems.mlp(12, 16, 4), problems.classes(60, 12, 4)  # 276 parameters


@pytest.fixture
def iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense matrix, however small."""
    monkeypatch.setattr(eigenpairs, "DENSE_LIMIT", 0)


# Against dense matrices


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("method", ["arpack", "dense"])
def test_pairs_are_those_of_the_dense_matrix(method: str, which: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenpairs, "DENSE_LIMIT", 0 if method == "arpack" else 1000)
    net, data = tanh_net()
    matrix = dense(net, F.cross_entropy, data)
    found = hessian_eigenpairs(net, F.cross_entropy, data, k=6, which=which)
    assert found.settings["method"] == method
    check(found, matrix, 6, which)
    assert bool(found.converged.all())
    # Both subspaces are the same: every principal angle has cosine 1, up to residual over gap.
    overlap = torch.linalg.svdvals(found.vectors @ expected(matrix, 6, which)[1].T)
    assert float(overlap.min()) > 1 - 1e-6


@pytest.mark.parametrize("which", WHICH)
def test_float32(which: Any) -> None:
    net, (x, y) = tanh_net()
    matrix = dense(net, F.cross_entropy, (x, y))
    found = hessian_eigenpairs(copy.deepcopy(net).float(), F.cross_entropy, (x.float(), y), k=6, which=which)
    assert (found.settings["method"], found.vectors.dtype, found.values.dtype) == (
        "arpack",
        torch.float32,
        torch.float64,
    )
    check(found, matrix, 6, which, tolerance=2e-6)
    assert bool(found.converged.all())


def test_reference_eigenvalues(vectors: Any, iterate: None) -> None:
    for case in ("a_fresh", "a_dead", "d_uneven_batch"):
        arrays = vectors(f"hessian_{case}")
        net, data = problems.from_vectors(arrays)
        found = hessian_eigenpairs(net, F.cross_entropy, data, k=5, which="largest")
        np.testing.assert_allclose(found.values, arrays["hessian_eigs"][::-1][:5], rtol=1e-9)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_copy_of_a_repeated_eigenvalue_is_found(which: Any, dtype: torch.dtype, iterate: None) -> None:
    # H = 2 / C (X^T X / N) (x) I_C: every eigenvalue ten times over. One start vector sees one direction of each ten.
    torch.manual_seed(0)
    x, y = torch.randn(100, 29, dtype=torch.float64), torch.randn(100, 10, dtype=torch.float64)
    net = nn.Linear(29, 10).double()
    values, _ = expected(dense(net, F.mse_loss, (x, y)), 15, which)
    data = x.to(dtype), y.to(dtype)
    found = hessian_eigenpairs(net.to(dtype), F.mse_loss, data, k=15, which=which)
    assert found.settings["method"] == "arpack"
    assert found.num_products < 1000
    torch.testing.assert_close(found.values, values, rtol=0, atol=2e-6 * float(values.abs().max()))
    assert bool(found.converged.all())


# Batches, parameters, modules


def test_uneven_batches_are_one_loss(iterate: None) -> None:
    net, (x, y) = tanh_net()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64), ignore_index=3)
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = hessian_eigenpairs(net, weighted, parts, k=4)
    torch.testing.assert_close(found.values, hessian_eigenpairs(net, weighted, (x, y), k=4).values)
    assert found.num_samples == 60


def test_vectors_by_name() -> None:
    net, data = tanh_net()
    net[0].bias.requires_grad_(False)
    found = hessian_eigenpairs(net, F.cross_entropy, data, k=2)
    named = found.named(1)
    assert {name: value.shape for name, value in named.items()} == {
        name: parameter.shape for name, parameter in net.named_parameters() if parameter.requires_grad
    }
    torch.testing.assert_close(torch.cat([value.flatten() for value in named.values()]), found.vectors[1])
    # Along the vector the loss is curved by the eigenvalue: a second difference, h^2 off by the fourth derivative.
    values = []
    for step in (-1e-3, 0.0, 1e-3):
        moved = {name: p + step * named.get(name, 0.0) for name, p in net.named_parameters()}
        outputs = torch.func.functional_call(net, moved, (data[0],))
        values.append(float(F.cross_entropy(outputs, data[1]).detach()))
    assert (values[0] - 2 * values[1] + values[2]) / 1e-6 == pytest.approx(float(found.values[1]), rel=1e-4)


def test_chosen_parameters() -> None:
    net, data = tanh_net()
    found = hessian_eigenpairs(net, F.cross_entropy, data, k=3, params="2.*")
    assert list(found.shapes) == ["2.weight", "2.bias"]
    check(found, dense(net, F.cross_entropy, data)[-68:, -68:], 3, "magnitude")


def test_a_training_step_is_enough() -> None:
    class Stepping(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = problems.mlp(6, 5, 3)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module, data = Stepping(), problems.classes(20, 6, 3)
    found = hessian_eigenpairs(module, None, data, k=3)
    assert next(iter(found.shapes)) == "net.0.weight"
    torch.testing.assert_close(found.values, hessian_eigenpairs(module.net, F.cross_entropy, data, k=3).values)


@pytest.mark.parametrize("limit", [0, 1000])
def test_module_is_left_as_it_was(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenpairs, "DENSE_LIMIT", limit)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 3))
    x, y = problems.classes(20, 6, 3)
    F.cross_entropy(net(x.float()), y).backward()
    before = state(net)
    hessian_eigenpairs(net, F.cross_entropy, (x.float(), y), k=3)
    assert changed(before, state(net)) == []


def test_a_seed_repeats(iterate: None) -> None:
    net, data = tanh_net()
    first, second = (hessian_eigenpairs(net, F.cross_entropy, data, k=3, seed=4) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)


# Degenerate cases


@pytest.mark.parametrize("which", WHICH)
def test_a_zero_hessian(which: Any) -> None:
    net, data = nn.Linear(3, 1), torch.randn(4, 3)
    found = hessian_eigenpairs(net, lambda out, y: out.mean() + 0 * y.sum(), (data, torch.zeros(4)), k=2, which=which)
    assert found.values.tolist() == found.residuals.tolist() == [0.0, 0.0]
    assert bool(found.converged.all())
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(2))


def test_dead_coordinates_come_before_negative_eigenvalues() -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0], [2.0, -1.0, 0.0, 0.0]])
    net = nn.Linear(4, 1, bias=False)
    found = hessian_eigenpairs(net, lambda out, y: -out.square().mean(), (x, torch.zeros(2)), k=3, which="largest")
    assert found.settings["live_coordinates"] == 2
    torch.testing.assert_close(found.values, torch.tensor([0.0, 0.0, -5.0], dtype=torch.float64))
    assert found.vectors[:2, :2].abs().max() == 0


@pytest.mark.parametrize("which", ["smallest", "largest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_null_space_converges(which: Any, dtype: torch.dtype, iterate: None) -> None:
    # Relative to themselves eigenvalues of zero converge late or never; relative to the largest they do at once.
    torch.manual_seed(0)
    net, data = (
        nn.Linear(240, 1, bias=False).to(dtype),
        (torch.randn(40, 240, dtype=dtype), torch.zeros(40, 1).to(dtype)),
    )
    sign = 1.0 if which == "smallest" else -1.0
    found = hessian_eigenpairs(net, lambda out, y: sign * (out - y).square().mean(), data, k=5, which=which)
    assert bool(found.converged.all())
    assert found.num_products < 350  # without a shift 390 in float64, 860 in float32
    torch.testing.assert_close(found.values, torch.zeros(5).double(), rtol=0, atol=1e-5)


def test_what_arpack_gives_up_on_is_left_to_lanczos(iterate: None) -> None:
    # Two hundred eigenvalues crowd at zero, a factor of 1.07 apart: too close for restarts with twenty vectors.
    torch.manual_seed(0)
    x = torch.randn(400, 240, dtype=torch.float64) * torch.logspace(0, -7, 240, dtype=torch.float64)
    net = nn.Linear(240, 1, bias=False).double()
    data = x, torch.zeros(400, 1).double()
    found = hessian_eigenpairs(net, F.mse_loss, data, k=5, which="smallest", max_products=600)
    top = float(torch.linalg.eigvalsh(dense(net, F.mse_loss, data))[-1])
    assert float(found.values.abs().max()) < 1e-5 * top
    assert torch.equal(found.converged, found.residuals <= 1e-6 * top)


def test_one_parameter_and_fewer_parameters_than_pairs() -> None:
    net = nn.Linear(1, 1, bias=False)
    found = hessian_eigenpairs(net, F.mse_loss, (torch.full((1, 1), 3.0), torch.zeros(1, 1)), k=10)
    assert found.values.tolist() == [18.0]
    assert found.vectors.abs().tolist() == [[1.0]]
    assert found.residuals.tolist() == [0.0]


@pytest.mark.parametrize("limit", [0, 1000])
@pytest.mark.parametrize("which", WHICH)
def test_one_sample_and_a_dead_layer(which: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 30 of 48 hidden units are dead: their coordinates are eigenvectors of eigenvalue zero, before negative ones.
    monkeypatch.setattr(eigenpairs, "DENSE_LIMIT", limit)
    net, (x, y) = problems.mlp(10, 48, 3, activation=nn.ReLU), problems.classes(1, 10, 3)
    with torch.no_grad():
        net[0].bias[:30] = -1e3
    found = hessian_eigenpairs(net, F.cross_entropy, (x, y), k=8, which=which)
    assert found.settings["live_coordinates"] < 678 - 30 * 14 + 1
    check(found, dense(net, F.cross_entropy, (x, y)), 8, which, tolerance=1e-8)
    assert bool(found.converged.all())


def test_a_spent_budget_is_flagged(iterate: None) -> None:
    net, data = tanh_net()
    found = hessian_eigenpairs(net, F.cross_entropy, data, k=6, max_products=1)
    matrix = dense(net, F.cross_entropy, data)
    assert len(found.values) == len(found.vectors) == 6
    assert not bool(found.converged.all())
    assert found.num_products < 120
    # Not converged, but an eigenvalue is within the residual of each value (Weyl), and the vectors are orthonormal.
    nearest = (found.values[:, None] - torch.linalg.eigvalsh(matrix)).abs().min(dim=1).values
    assert bool((nearest <= found.residuals + 1e-12).all())
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(6).double())


def test_the_fallback_finds_all_of_a_multiple_of_the_identity(iterate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every Lanczos run ends after one step, in an invariant subspace.
    monkeypatch.setattr(ArpackIteration, "_pass", lambda self, k, tol: (np.empty(0), np.empty((0, 120))))
    net, x = nn.Linear(120, 1, bias=False).double(), torch.eye(120, dtype=torch.float64)
    loss = lambda out, y: 1.5 * (out - y).square().sum()  # noqa: E731
    found = hessian_eigenpairs(net, loss, (x, torch.zeros(120, 1).double()), k=8)
    torch.testing.assert_close(found.values, torch.full((8,), 3.0).double())
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(8).double())
    assert bool(found.converged.all())


def test_nan_is_a_measurement_error() -> None:
    net, (x, y) = tanh_net()
    x[0] = torch.nan
    with pytest.raises(MeasurementError, match="nan"):
        hessian_eigenpairs(net, F.cross_entropy, (x, y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0, expected at least one"),
        ({"which": "LM"}, "which='LM', expected one of"),
        ({"tol": 0.0}, r"tol=0\.0, expected a relative residual"),
        ({"max_products": 0}, "max_products=0, expected at least 1"),
        ({"params": "no.such"}, "match nothing"),
    ],
)
def test_settings_are_refused(options: dict[str, Any], message: str) -> None:
    net, data = tanh_net()
    with pytest.raises(ValueError, match=message):
        hessian_eigenpairs(net, F.cross_entropy, data, **options)
