"""Curvature of masked networks on the active coordinates, against dense matrices of unmasked twins in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import HOLDS, active_of, as_parametrization, as_pruning, fill_masked, mask_weights, plain_twin
from problems import assert_same_eigenvalues, classes, cross_entropy, dense_ggn, dense_hessian, dense_ntk, expanded, mlp
from torch import Tensor, nn

from lightning_plasticity.curvature import (
    MeasurementError,
    ggn_spectrum,
    hessian_eigenpairs,
    hessian_spectrum,
    layer_spectra,
    linearized_trainability,
    ntk_spectrum,
)
from lightning_plasticity.curvature.gram import masked, shares


class Averaged(nn.Module):
    """A layer on sequences, whose positions are weighted."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        weights = torch.linspace(1, 2, x.shape[1], dtype=x.dtype)[None, :, None]
        return self.head((weights * torch.tanh(self.layer(x))).mean(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def conv(dimensions=2, groups=1):
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    return nn.Sequential(
        kind(4, 4, 3, padding=1, groups=groups),
        nn.Tanh(),
        kind(4, 2, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(2 * 2**dimensions, 3),
    )


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)), (4,)),
    "conv1d": (lambda: conv(1), (4, 6)),
    "conv2d": (conv, (4, 6, 6)),
    "grouped": (lambda: conv(groups=2), (4, 6, 6)),
    "sequences": (Averaged, (3, 4)),
    "twice": (Twice, (4,)),
}


def example(name, density=0.5, hold=as_parametrization, samples=7, seed=0):
    """A masked network, one without masks at the same weights, which coordinates are active, and data."""
    make, shape = NETS[name]
    torch.manual_seed(seed)
    net = make().double()
    twin = copy.deepcopy(net)
    mask_weights(net, density, hold, seed)
    fill_masked(net)
    twin = plain_twin(net, twin)
    net(torch.randn(1, *shape).double())  # pruned weights are made anew by a forward pass
    data = torch.randn(samples, *shape, dtype=torch.float64), torch.arange(samples) % 3
    return net, plain_twin(net, twin), active_of(net, twin), data


def restricted(matrix: Tensor, active: Tensor) -> Tensor:
    return matrix[active][:, active]


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", NETS)
def test_all_matrices_of_all_layers(name, hold):
    net, twin, active, data = example(name, hold=HOLDS[hold])
    spectrum = hessian_spectrum(net, cross_entropy, data, method="exact")
    assert_same_eigenvalues(spectrum, restricted(dense_hessian(twin, cross_entropy, *data), active), rtol=1e-8)
    assert spectrum.settings["masked_params"] == int((~active).sum())
    ggn = ggn_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(ggn, restricted(dense_ggn(twin, cross_entropy, [data]), active), rtol=1e-7)
    ntk = ntk_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(ntk, restricted(dense_ntk(twin, [data]), active), rtol=1e-7)
    for found in (spectrum, ggn, ntk):
        assert found.num_params == int(active.sum())
        assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    for found in (ggn, ntk):
        assert "general_route" not in found.settings  # the layers kept their shortcut
        assert found.settings["masked_params"] == int((~active).sum())


@pytest.mark.parametrize("route", ["rows", "units"])
@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "grouped", "sequences", "twice"])
def test_both_routes_of_the_gram_matrix(name, route, chunk, monkeypatch):
    net, twin, active, data = example(name)
    taken = []
    other, chosen = ("_add_by_units", "_add_active_rows") if route == "rows" else ("_add_active_rows", "_add_by_units")
    add = getattr(masked, chosen)
    monkeypatch.setattr(masked, other, lambda *args: (taken.append(args), add(*args)))
    monkeypatch.setattr(masked, "ROW_CHUNK", chunk)
    if chunk > 1:  # else no pair of inputs is within the bound, and rows are taken
        monkeypatch.setattr(masked, "INNER_CHUNK", chunk)
    ggn = ggn_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(ggn, restricted(dense_ggn(twin, cross_entropy, [data]), active), rtol=1e-7)


def test_both_routes_are_chosen_by_size(monkeypatch):
    """Many outputs: units; one output: rows."""
    taken = []
    for name in ("_add_active_rows", "_add_by_units"):
        add = getattr(masked, name)
        monkeypatch.setattr(masked, name, lambda *args, name=name, add=add: (taken.append(name), add(*args)))
    torch.manual_seed(0)
    net = mask_weights(nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 10)), 0.5)
    ntk_spectrum(net, cross_entropy, (torch.randn(20, 50), torch.arange(20) % 10))
    assert taken == ["_add_by_units"] * 2
    taken.clear()
    net = mask_weights(nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 1)), 0.5)
    ntk_spectrum(net, nn.MSELoss(), (torch.randn(20, 50), torch.randn(20, 1)))
    assert taken == ["_add_active_rows"] * 2


@pytest.mark.parametrize("name", ["mlp", "conv2d", "sequences"])
def test_a_mask_of_ones_changes_no_bit(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    plain = make().double()
    net = mask_weights(copy.deepcopy(plain), 2.0)
    data = torch.randn(7, *shape, dtype=torch.float64), torch.arange(7) % 3
    for measure in (ggn_spectrum, ntk_spectrum):
        torch.testing.assert_close(
            measure(net, cross_entropy, data).eigenvalues,
            measure(plain, cross_entropy, data).eigenvalues,
            rtol=1e-12,
            atol=1e-15,
        )
    found, truth = (hessian_spectrum(n, cross_entropy, data, method="exact") for n in (net, plain))
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues, rtol=1e-11, atol=1e-15)
    assert found.num_params == truth.num_params
    assert found.settings["masked_params"] == 0


def test_parametrized_and_pruned_agree():
    one, _, _, data = example("mlp", hold=as_parametrization)
    other, _, _, _ = example("mlp", hold=as_pruning)
    for measure in (hessian_spectrum, ggn_spectrum, ntk_spectrum):
        found, truth = measure(one, cross_entropy, data), measure(other, cross_entropy, data)
        torch.testing.assert_close(expanded(found), expanded(truth), rtol=1e-9, atol=1e-14)


def edge_masks():
    empty_unit = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    empty_unit[2] = False
    single = torch.zeros(6, 4, dtype=torch.bool)
    single[3, 1] = True
    return {"nothing": torch.zeros(6, 4, dtype=torch.bool), "one entry": single, "a unit without inputs": empty_unit}


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("which", edge_masks())
@pytest.mark.parametrize("bias", [True, False])
def test_degenerate_masks(which, bias, hold):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(net)
    HOLDS[hold](net[0], edge_masks()[which])
    twin = plain_twin(net, twin)
    active, data = active_of(net, twin), classes(6, 4, 3)
    hessian = restricted(dense_hessian(twin, cross_entropy, *data), active)
    assert_same_eigenvalues(hessian_spectrum(net, cross_entropy, data), hessian, rtol=1e-8)
    ggn = restricted(dense_ggn(twin, cross_entropy, [data]), active)
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, data), ggn, rtol=1e-7)
    layers = layer_spectra(net, cross_entropy, data)
    assert list(layers) == (["2"] if which == "nothing" and not bias else ["0", "2"])
    assert sum(found.num_params for found in layers.values()) == len(ggn)


def test_one_active_entry_in_all_and_none():
    net = nn.Linear(2, 1, bias=False)
    mask = torch.tensor([[False, True]])
    as_parametrization(net, mask)
    data = torch.tensor([[2.0, 3.0]]), torch.zeros(1, 1)
    for measure in (hessian_spectrum, ggn_spectrum):
        found = measure(net, nn.MSELoss(), data)
        assert (found.eigenvalues.tolist(), found.num_params) == ([pytest.approx(18.0)], 1)
    net.parametrizations.weight[0].mask.fill_(False)
    for measure in (hessian_spectrum, ggn_spectrum, ntk_spectrum):
        with pytest.raises(MeasurementError, match="All 2 coordinates are masked"):
            measure(net, nn.MSELoss(), data)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_lanczos_is_on_the_active_coordinates(density):
    """Enough steps give all of them; and the estimate's weights add up over k, not P."""
    net, twin, active, data = example("mlp", density)
    matrix = restricted(dense_hessian(twin, cross_entropy, *data), active)
    found = hessian_spectrum(net, cross_entropy, data, method="lanczos", num_steps=200)
    truth = torch.linalg.eigvalsh(matrix)
    assert found.num_params == len(truth)
    assert float(found.counts.sum()) == pytest.approx(len(truth))
    assert found.quadrature.dim == int((matrix != 0).any(0).sum())
    assert found.lambda_max().value == pytest.approx(float(truth[-1]), rel=1e-9)
    assert found.lambda_min().value == pytest.approx(float(truth[0]), rel=1e-9)


@pytest.mark.parametrize("memory", [None, 6e5, 1.2e6])
def test_the_range_route_and_tight_budgets(memory):
    """A wide stack on few samples, where the route through the Hessian's range would be taken without masks."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3)).double()
    data = classes(4, 40, 3)
    assert "range_dimensions" in hessian_spectrum(plain, cross_entropy, data, method="lanczos").settings
    net = mask_weights(copy.deepcopy(plain), 0.5)
    twin = plain_twin(net, copy.deepcopy(plain))
    found = hessian_spectrum(net, cross_entropy, data, method="lanczos", max_memory=memory)
    assert "range_dimensions" not in found.settings
    assert found.num_params == int(active_of(net, twin).sum())
    top = hessian_eigenpairs(net, cross_entropy, data, 1, which="largest")
    assert found.lambda_max().value == pytest.approx(float(top.values), rel=1e-3)


@pytest.mark.parametrize("samples", [5, 60])
def test_estimated_ggn(samples, monkeypatch):
    """Few samples: on the Gram matrix; many: in the space of the active parameters, without it."""
    net, twin, active, data = example("mlp", 0.5, samples=samples)
    truth = torch.linalg.eigvalsh(restricted(dense_ggn(twin, cross_entropy, [data]), active))
    found = ggn_spectrum(net, cross_entropy, data, method="lanczos", num_steps=200)
    assert ("parameters" in found.settings["route"]) == (samples == 60)
    assert found.num_params == len(truth)
    assert found.quadrature.dim <= len(truth)
    assert found.trace().value == pytest.approx(float(truth.sum()), rel=0.2)
    assert found.lambda_max().value == pytest.approx(float(truth[-1]), rel=1e-8)


@pytest.mark.parametrize("k", [3, 10_000])
@pytest.mark.parametrize("which", ["magnitude", "smallest"])
def test_eigenpairs(k, which):
    net, twin, active, data = example("mlp", 0.3)
    found = hessian_eigenpairs(net, cross_entropy, data, k, which=which)
    size = int(active.sum())
    assert len(found.values) == min(k, size)
    truth = torch.linalg.eigvalsh(restricted(dense_hessian(twin, cross_entropy, *data), active))
    order = truth.abs().argsort(descending=True) if which == "magnitude" else truth.argsort()
    torch.testing.assert_close(found.values, truth[order][: len(found.values)], rtol=1e-8, atol=1e-10)
    assert set(found.shapes) == set(dict(twin.named_parameters()))
    for index in range(len(found.values)):
        vector = found.named(index)
        assert not torch.cat([vector[name].flatten() for name, _ in twin.named_parameters()])[~active].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    net, twin, active, (inputs, targets) = example("mlp")
    truth = torch.linalg.eigvalsh(restricted(dense_ggn(twin, cross_entropy, [(inputs, targets)]), active))
    found = ggn_spectrum(net.to(dtype), cross_entropy, (inputs.to(dtype), targets))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(expanded(found), truth, rtol=0, atol=tolerance * float(truth.max()))


def test_several_batches_and_chosen_parameters():
    net, twin, active, (inputs, targets) = example("mlp")
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    plain = [p for name, p in twin.named_parameters() if name in ("0.weight", "2.bias")]
    chosen = torch.cat(
        [torch.full((p.numel(),), name in ("0.weight", "2.bias")) for name, p in twin.named_parameters()]
    )
    matrix = restricted(dense_ggn(twin, cross_entropy, batches, plain), active[chosen])
    for params in (["0.weight", "2.bias"], ["0.parametrizations.*", "2.bias"]):
        assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches, params=params), matrix, rtol=1e-7)


def test_layers_by_their_names():
    net, twin, active, data = example("mlp")
    names, sizes = zip(*((name, p.numel()) for name, p in twin.named_parameters()), strict=True)
    masks = dict(zip(names, active.split(sizes), strict=True))
    for matrix, dense in (("ggn", None), ("hessian", dense_hessian(twin, cross_entropy, *data))):
        found = layer_spectra(net, cross_entropy, data, matrix=matrix)
        assert list(found) == ["0", "2", "4"]
        if dense is None:
            dense = dense_ggn(twin, cross_entropy, [data])
        for name, spectrum in found.items():
            own = torch.cat([m if n.startswith(f"{name}.") else torch.zeros_like(m) for n, m in masks.items()])
            assert_same_eigenvalues(spectrum, restricted(dense, own), rtol=1e-7)


def test_one_weight_under_two_masks():
    """A parameter counts where any of its layers uses it; its rows are explicit then."""
    torch.manual_seed(0)
    net = Twice().double()
    net.second = nn.Linear(4, 4).double()
    net.forward = lambda x: net.head(torch.tanh(net.second(torch.tanh(net.layer(x)))))
    masks = torch.rand(2, 4, 4) < 0.4
    as_parametrization(net.layer, masks[0])
    as_parametrization(net.second, masks[1])
    net.second.parametrizations.weight.original = net.layer.parametrizations.weight.original
    data = classes(6, 4, 3)
    parameters = list(net.parameters())
    union = torch.cat(
        [
            (masks[0] | masks[1]).flatten()
            if p is net.layer.parametrizations.weight.original
            else torch.ones(p.numel(), dtype=torch.bool)
            for p in parameters
        ]
    )
    found = ggn_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(found, restricted(dense_ggn(net, cross_entropy, [data]), union), rtol=1e-7)
    assert found.settings["general_route"] == ["layer.weight"]


@pytest.mark.parametrize("role", ["bias", "weight"])
def test_masks_of_other_kinds(role):
    """A masked norm and a masked bias take the general route, and count their active entries."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(net)
    as_parametrization(net[1] if role == "weight" else net[0], torch.tensor([True, False, True, True, False]), role)
    twin = plain_twin(net, twin)
    active, data = active_of(net, twin), classes(6, 4, 3)
    truth = restricted(dense_ggn(twin, cross_entropy, [data]), active)
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, data), truth, rtol=1e-7)


@pytest.mark.parametrize("share_chunk", [3, shares.ROW_CHUNK])
def test_linearized_trainability(share_chunk, monkeypatch):
    """The prediction is that of a linear model of the active weights: least squares on the active inputs."""
    monkeypatch.setattr(masked, "ROW_CHUNK", share_chunk)
    torch.manual_seed(0)
    net = nn.Linear(6, 1, bias=False).double()
    as_parametrization(net, torch.tensor([[True, False, True, False, False, True]]))
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    found = linearized_trainability(net, nn.MSELoss(), (x, y), learning_rate=0.1, num_steps=30)
    weights = net.weight.detach().clone()
    for _ in range(30):
        gradient = 2 * (x @ weights.T - y).T @ x / 9
        weights -= 0.1 * gradient * net.parametrizations.weight[0].mask
    assert found.final_loss.value == pytest.approx(float((x @ weights.T - y).square().mean()), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(density=st.floats(0.05, 1.0), seed=st.integers(0, 1000), eps=st.sampled_from([1e-6, 1e-3, 1e-1]))
def test_interlacing(density, seed, eps):
    """Cauchy: lambda_i(H) >= lambda_i(H_m) >= lambda_{i+P-k}(H) at the same weights, so ranks cannot grow."""
    torch.manual_seed(seed)
    net = mlp(4, 5, 3, seed=seed)
    twin = copy.deepcopy(net)
    mask_weights(net, density, seed=seed)
    twin, data = plain_twin(net, twin), classes(5, 4, 3, seed=seed)
    for measure in (hessian_spectrum, ggn_spectrum):
        part = measure(net, cross_entropy, data)
        whole = measure(twin, cross_entropy, data)
        small, large = expanded(part).flip(0), expanded(whole).flip(0)
        slack = 1e-12 * float(large.abs().max())
        assert bool((large[: len(small)] >= small - slack).all())
        assert bool((small >= large[len(large) - len(small) :] - slack).all())
        bound = min(part.num_params, whole.epsilon_rank(eps).upper)
        assert part.epsilon_rank(eps).lower <= bound
