"""GGN and NTK where little is left: one sample, one parameter, low rank, dead units; and random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same_eigenvalues, classes, cross_entropy, dense_ggn, dense_ntk, expanded, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import MeasurementError, ggn_spectrum, layer_spectra, ntk_spectrum


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.Identity]),
    squared=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_by_every_method(widths, sizes, activation, squared, seed):
    net = mlp(*widths, activation=activation, seed=seed)
    inputs, targets = classes(sum(sizes), widths[0], widths[-1], seed=seed)
    if squared:
        targets = torch.randn(len(targets), widths[-1], dtype=torch.float64)
    loss_fn = F.mse_loss if squared else cross_entropy
    batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    for function, truth in (
        (ggn_spectrum, dense_ggn(net, loss_fn, batches)),
        (ntk_spectrum, dense_ntk(net, batches)),
    ):
        spectrum = function(net, loss_fn, batches)
        values, top = torch.linalg.eigvalsh(truth), float(torch.linalg.eigvalsh(truth).max())
        torch.testing.assert_close(expanded(spectrum), values, rtol=1e-9, atol=1e-13 * max(top, 1e-3))
        estimate = function(net, loss_fn, batches, method="lanczos")
        assert estimate.num_params == len(values)
        assert float(estimate.counts.sum()) == pytest.approx(len(values))
        assert estimate.lambda_max().value == pytest.approx(top, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_one_parameter(method):
    # f = w x with squared loss: the GGN is 2 mean x^2.
    net = nn.Linear(1, 1, bias=False).double()
    inputs = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    spectrum = ggn_spectrum(net, F.mse_loss, (inputs, torch.zeros_like(inputs)), method=method)
    assert expanded(spectrum).tolist() == pytest.approx([2 * 14 / 3])


def test_one_sample_has_at_most_as_many_directions_as_outputs():
    net, data = mlp(4, 6, 3), classes(1, 4, 3)
    ggn, ntk = ggn_spectrum(net, cross_entropy, data), ntk_spectrum(net, cross_entropy, data)
    assert (ggn.epsilon_rank(1e-12).value, ntk.epsilon_rank(1e-12).value) == (2, 3)
    assert_same_eigenvalues(ggn, dense_ggn(net, cross_entropy, [data]))


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_a_sample_add_no_rank(copies):
    net, (inputs, targets) = mlp(4, 6, 3), classes(3, 4, 3)
    once = ggn_spectrum(net, cross_entropy, (inputs, targets))
    repeated = ggn_spectrum(net, cross_entropy, (inputs.repeat(copies, 1), targets.repeat(copies)))
    torch.testing.assert_close(expanded(repeated), expanded(once), rtol=1e-10, atol=1e-14 * once.max_abs)


def test_dead_network_in_closed_form():
    # Outputs are the last bias: p is the same for all samples, and the GGN is diag p - p p^T on that bias.
    net = mlp(4, 8, 3, activation=nn.ReLU)
    net[0].bias.data.fill_(-100)
    data = classes(9, 4, 3)
    p = torch.softmax(net[2].bias.detach(), 0)
    expected = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p))[1:]
    found = expanded(ggn_spectrum(net, cross_entropy, data))
    torch.testing.assert_close(found[-2:], expected)
    assert float(found[:-2].max()) < 1e-15
    layers = layer_spectra(net, cross_entropy, data)
    assert layers["0"].max_abs == 0.0
    assert layers["2"].max_abs == pytest.approx(float(expected.max()))
    kernel = expanded(ntk_spectrum(net, cross_entropy, data))
    assert kernel[-3:].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_constant_outputs_have_no_curvature():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    net[0].bias.data.fill_(-100)
    data = classes(5, 3, 2)
    for function in (ggn_spectrum, ntk_spectrum):
        for method in ("exact", "lanczos"):
            assert function(net, cross_entropy, data, method=method).max_abs == 0.0


def test_a_batch_without_a_target_is_refused():
    data = torch.randn(3, 4, dtype=torch.float64), torch.full((3,), -100)
    with pytest.raises(MeasurementError, match="The loss on the probe data is nan"):
        ggn_spectrum(mlp(4, 3), cross_entropy, data)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_weights_that_are_not_finite(method):
    net = mlp(4, 5, 3)
    net[2].weight.data[0, 0] = float("inf")
    with pytest.raises(MeasurementError, match="NaN or inf"):
        ggn_spectrum(net, cross_entropy, classes(5, 4, 3), method=method)


def test_the_module_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    for run in (
        lambda data: ggn_spectrum(net, cross_entropy, data, method="lanczos", num_steps=5),
        lambda data: layer_spectra(net, cross_entropy, data),
    ):
        run(classes(6, 4, 3))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in net.modules())
        assert all(parameter.grad is None for parameter in net.parameters())
