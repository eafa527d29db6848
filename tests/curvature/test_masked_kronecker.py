"""Kronecker blocks of masked layers: per output unit, by both backends, on the active coordinates."""

from __future__ import annotations

import copy

import pytest
import torch
from masked import HOLDS, as_parametrization, mask_weights
from problems import cross_entropy, dense_ggn, expanded
from torch import nn

from lightning_plasticity.curvature import MaskedBlock, MeasurementError, kronecker_spectrum


def network(hold=as_parametrization, density=0.5, conv=False, groups=1):
    torch.manual_seed(0)
    if conv:
        net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    else:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    data = torch.randn(8, *((2, 4, 4) if conv else (4,)), dtype=torch.float64), torch.arange(8) % 3
    twin = copy.deepcopy(net)
    if density:
        mask_weights(net, density, hold)
        with torch.no_grad():
            for layer, masked_layer in zip(twin, net, strict=True):
                if hasattr(layer, "weight"):
                    layer.weight.copy_(masked_layer.weight)
    return net, twin, data


def by_units(block, mask):
    """Eigenvalues of the restricted blocks of each output unit, formed one by one."""
    values = []
    for unit, row in enumerate(mask):
        entries = torch.cat([row.flatten(), torch.ones(1, dtype=torch.bool)])  # and the bias
        own = block.output_factor[unit, unit] * block.input_factor[entries][:, entries]
        values.append(torch.linalg.eigvalsh(own))
    return torch.cat(values).sort().values


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("conv", "groups"), [(False, 1), (True, 1), (True, 2)])
def test_per_unit_rule(conv, groups, hold):
    """The factors are those of the twin at the same weights; the spectrum that of each unit's restricted block."""
    net, twin, data = network(HOLDS[hold], conv=conv, groups=groups)
    found, whole = (kronecker_spectrum(n, cross_entropy, data) for n in (net, twin))
    assert list(found.layers) == list(whole.layers)
    assert not found.skipped
    assert found.settings["per_unit"] == sorted({block.name for block in found.layers.values()})
    assert set(found.parameters) == set(dict(twin.named_parameters()))
    for name, block in found.layers.items():
        truth = whole.layers[name]
        torch.testing.assert_close(block.input_factor, truth.input_factor, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(block.output_factor, truth.output_factor, rtol=1e-9, atol=1e-12)
        mask = net.get_submodule(block.name).weight != 0
        if block.group is not None:
            mask = mask.chunk(groups)[block.group]
        values = by_units(truth, mask)
        torch.testing.assert_close(block.eigenvalues(), values, rtol=1e-9, atol=1e-12)
        assert block.num_params == len(values)
        assert block.trace().value == pytest.approx(float(values.sum()))
        assert block.count_above(1e-3) == int((values > 1e-3).sum())
        assert block.frobenius_norm().value == pytest.approx(float(values.norm()))
    assert found.num_params == found.spectrum().num_params == len(expanded(found.spectrum()))
    assert found.num_params + found.settings["masked_params"] == whole.num_params


@pytest.mark.parametrize("factors", ["kflr", "kfra"])
def test_backends(factors):
    """BackPACK works on a copy with plain weights; the module keeps its masks."""
    net, twin, data = network()
    before = copy.deepcopy(net.state_dict())
    found = kronecker_spectrum(net, cross_entropy, data, factors=factors, backend="backpack")
    truth = kronecker_spectrum(twin, cross_entropy, data, factors=factors, backend="backpack")
    hooks = kronecker_spectrum(net, cross_entropy, data, backend="hooks")
    for name, block in found.layers.items():
        assert isinstance(block, MaskedBlock)
        assert block.source == f"backpack:{factors}"
        torch.testing.assert_close(block.output_factor, truth.layers[name].output_factor, rtol=1e-9, atol=1e-12)
        if factors == "kflr":
            torch.testing.assert_close(block.eigenvalues(), hooks.layers[name].eigenvalues(), rtol=1e-9, atol=1e-12)
    assert {key: bool(torch.equal(value, before[key])) for key, value in net.state_dict().items()} == dict.fromkeys(
        before, True
    )


@pytest.mark.parametrize("conv", [False, True])
def test_errors_are_against_the_restricted_ggn(conv):
    """One sample: the trace of each block is exact, and so is the largest eigenvalue's bound."""
    net, _, (inputs, targets) = network(conv=conv)
    found = kronecker_spectrum(net, cross_entropy, (inputs[:1], targets[:1]), check=True)
    last = list(found.layers)[-1]
    assert found.errors[last].trace == pytest.approx(0.0, abs=1e-9)
    assert found.errors[last].lambda_max <= 1e-9  # diagonal blocks only


def test_exact_for_a_squared_loss_at_the_last_layer():
    """B is a multiple of the identity there, so that no terms between units are left out."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3).double()
    as_parametrization(net, torch.rand(3, 5) < 0.5)
    data = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    active = torch.cat(
        [
            net.parametrizations.weight[0].mask.flatten() if p.ndim == 2 else torch.ones(p.numel(), dtype=torch.bool)
            for p in net.parameters()
        ]
    )
    truth = torch.linalg.eigvalsh(dense_ggn(net, nn.MSELoss(), [data])[active][:, active])
    found = kronecker_spectrum(net, nn.MSELoss(), data)
    torch.testing.assert_close(expanded(found.spectrum()), truth, rtol=1e-9, atol=1e-12)
    assert found.spectrum().num_params == len(truth)


def test_all_active_is_the_dense_block():
    net, _, data = network(density=2.0)
    plain, _, _ = network(density=None)
    found, truth = (kronecker_spectrum(n, cross_entropy, data) for n in (net, plain))
    torch.testing.assert_close(found.spectrum().eigenvalues, truth.spectrum().eigenvalues, rtol=1e-12, atol=1e-15)
    assert "per_unit" not in found.settings


def test_layers_without_active_entries():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    as_parametrization(net[0], torch.zeros(6, 4, dtype=torch.bool))
    data = torch.randn(8, 4), torch.arange(8) % 3
    found = kronecker_spectrum(net, cross_entropy, data)
    assert list(found.layers) == ["2"]
    assert "masked" in found.skipped["0"]
    with pytest.raises(MeasurementError):
        kronecker_spectrum(net[:1], cross_entropy, data)
    # A unit without active inputs, and with its bias alone.
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    for layer in (net[0], net[2]):
        mask = torch.ones_like(layer.weight, dtype=torch.bool)
        mask[1] = False
        as_parametrization(layer, mask)
    found = kronecker_spectrum(net, cross_entropy, (data[0].double(), data[1]))
    assert {name: block.num_params for name, block in found.layers.items()} == {"0": 26, "2": 12}


def test_a_masked_bias_is_skipped():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    as_parametrization(net[0], torch.arange(6) > 2, "bias")
    found = kronecker_spectrum(net, cross_entropy, (torch.randn(8, 4), torch.arange(8) % 3))
    assert found.skipped == {"0": "its bias is masked."}
