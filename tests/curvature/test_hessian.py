"""Hessian-vector products and spectra against dense matrices, and that measuring leaves no trace."""

import random

import numpy as np
import pytest
import torch
from problems import (
    Cube,
    CubeNet,
    CubeOnce,
    assert_same_eigenvalues,
    classes,
    cross_entropy,
    dense_ggn,
    dense_hessian,
    expanded,
    from_vectors,
    mlp,
    trainable,
)
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import (
    HessianOperator,
    Measured,
    MeasurementError,
    ggn_spectrum,
    hessian_spectrum,
    ntk_spectrum,
)

CASES = ("a_fresh", "a_dead", "b_fresh", "b_rank1", "c_fresh", "c_huge", "d_uneven_batch")


def operator_of(net, loss_fn, batches):
    total = sum(len(targets) for _, targets in batches)
    losses = [loss_fn(net(inputs), targets) for inputs, targets in batches]
    return HessianOperator(losses, [len(targets) / total for _, targets in batches], trainable(net))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_reference_hessians(vectors, case):
    arrays = vectors(f"hessian_{case}")
    net, data = from_vectors(arrays)
    operator = operator_of(net, F.cross_entropy, [data])
    product = operator.matvec(torch.from_numpy(arrays["probe"]))
    np.testing.assert_allclose(product, arrays["hvp_exact"], rtol=1e-9, atol=1e-12)
    if "hessian" in arrays:
        dense = operator.dense(torch.ones(operator.num_params, dtype=torch.bool))
        np.testing.assert_allclose(dense, arrays["hessian"], rtol=1e-9, atol=1e-12)
    spectrum = hessian_spectrum(net, F.cross_entropy, data)
    top = np.abs(arrays["hessian_eigs"]).max()
    np.testing.assert_allclose(expanded(spectrum), arrays["hessian_eigs"], rtol=1e-9, atol=1e-13 * top)
    for eps, fraction in zip(arrays["eps_list"], arrays["exact_fraction"], strict=True):
        assert spectrum.epsilon_rank(float(eps)).value / spectrum.num_params == pytest.approx(fraction, rel=1e-12)
    assert spectrum.effective_rank().value == pytest.approx(float(arrays["exact_erank_abs"]), rel=1e-9)


def test_batches_are_weighted_by_their_size(vectors):
    # 100 and 30 samples. The reference's mean of batch means is off by 16 %, here as there.
    arrays = vectors("hessian_d_uneven_batch")
    net, (inputs, targets) = from_vectors(arrays)
    batches = [(inputs[:100], targets[:100]), (inputs[100:], targets[100:])]
    probe, exact = torch.from_numpy(arrays["probe"]), torch.from_numpy(arrays["hvp_exact"])
    torch.testing.assert_close(operator_of(net, F.cross_entropy, batches).matvec(probe), exact, rtol=1e-9, atol=1e-12)
    losses = [F.cross_entropy(net(x), y) for x, y in batches]
    equal = HessianOperator(losses, [0.5, 0.5], trainable(net)).matvec(probe)
    np.testing.assert_allclose(equal, arrays["hvp_authors"], rtol=1e-9, atol=1e-12)
    assert float((equal - exact).abs().max() / exact.abs().max()) == pytest.approx(0.159, abs=1e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_products_equal_the_dense_hessian(activation):
    net, data = mlp(4, 6, 5, 3, activation=activation), classes(20, 4, 3)
    operator, dense = operator_of(net, F.cross_entropy, [data]), dense_hessian(net, F.cross_entropy, *data)
    vectors = torch.randn(40, len(dense), generator=generator(), dtype=torch.float64)
    together = operator.matmat(vectors)
    torch.testing.assert_close(together, vectors @ dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together, torch.stack([operator.matvec(v) for v in vectors]), rtol=1e-12, atol=1e-14)
    assert operator.num_products == 80
    assert_same_eigenvalues(hessian_spectrum(net, F.cross_entropy, data), dense, rtol=1e-9)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_not_taken_for_a_wrong_double_backward(dtype, method):
    torch.manual_seed(0)
    inputs, targets = classes(20, 4, 3)
    data = inputs.to(dtype), targets
    smooth = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3))
    normed = nn.Sequential(
        nn.Linear(4, 20), nn.ReLU(), nn.LayerNorm(20), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    for net in (smooth, normed, CubeNet(Cube)):
        hessian_spectrum(net.to(dtype), F.cross_entropy, data, method=method, num_steps=20)
    with pytest.raises(MeasurementError, match="not symmetric"):
        hessian_spectrum(CubeNet(CubeOnce).to(dtype), F.cross_entropy, data, method=method, num_steps=20)


def test_a_loss_without_a_second_derivative_is_named():
    net, (inputs, targets) = mlp(4, 5, 3), classes(9, 4, 3)
    message = r"cannot be differentiated twice: derivative for aten::multi_margin_loss_backward is not implemented\."
    for measure in (hessian_spectrum, ggn_spectrum):
        with pytest.raises(MeasurementError, match=message):
            measure(net, nn.MultiMarginLoss(), (inputs, targets))
    assert ntk_spectrum(net, nn.MultiMarginLoss(), (inputs, targets)).max_abs > 0  # as the message says


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrong_double_backward_is_refused(dtype):
    torch.manual_seed(0)
    inputs, targets = classes(9, 4, 3)
    data = inputs.to(dtype), targets
    hessian_spectrum(CubeNet(Cube).to(dtype), F.cross_entropy, data)
    with pytest.raises(MeasurementError, match=r"not symmetric .*once_differentiable.*Define curvature_loss"):
        hessian_spectrum(CubeNet(CubeOnce).to(dtype), F.cross_entropy, data)
    with pytest.raises(MeasurementError, match="not symmetric"):  # here in the recurrence, there in the dense matrix
        hessian_spectrum(CubeNet(CubeOnce).to(dtype), F.cross_entropy, data, method="lanczos")
    # Also where the outputs are not known.
    net = CubeNet(CubeOnce).to(dtype)
    with pytest.raises(MeasurementError, match="not symmetric"):
        hessian_spectrum(Stepping(net), None, data)


class Stepping(nn.Module):
    """A training step of no known loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return self.net(batch[0]).logsumexp(1).mean()


def test_dead_units_are_zero_rows():
    # Theory, invariant (ii): exactly zero for incoming weights, bias and outgoing weights of a unit that is never on.
    net, data = mlp(4, 6, 5, 3, activation=nn.ReLU), classes(30, 4, 3)
    net[0].bias.data[[1, 4]] = -100.0
    data[0][:, 2] = 0.0  # a constant input too
    data[0][:, 3] *= 1e-9  # small is not zero
    dense = dense_hessian(net, F.cross_entropy, *data)
    for single in (False, True):
        net, inputs = (net.float(), data[0].float()) if single else (net, data[0])
        live = operator_of(net, F.cross_entropy, [(inputs, data[1])]).live_coordinates(generator())
        assert torch.equal(live, (dense != 0).any(1))
    dead = 2 * (4 + 1 + 5) + 4  # two units, and the other four units' weights on the constant input
    spectrum = hessian_spectrum(net, F.cross_entropy, (data[0].float(), data[1]))
    assert spectrum.settings["live_coordinates"] <= spectrum.num_params - dead
    assert spectrum.epsilon_rank(0.0).value <= spectrum.num_params - dead


def test_invariants():
    net, data = mlp(4, 6, 5, 3, activation=nn.ReLU), classes(40, 4, 3)
    hessian, ggn = dense_hessian(net, F.cross_entropy, *data), dense_ggn(net, F.cross_entropy, [data])
    mine = operator_of(net, F.cross_entropy, [data]).dense(torch.ones(len(hessian), dtype=torch.bool))
    # (i) Piecewise linear: within a layer H and G agree; between layers they do not.
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (net[0], net[2], net[4])]
    start = 0
    for size in sizes:
        block = slice(start, start + size)
        torch.testing.assert_close(mine[block, block], ggn[block, block], rtol=1e-10, atol=1e-13)
        start += size
    assert float((mine - ggn).abs().max()) > 1e-2
    spectrum, ggn_found = hessian_spectrum(net, F.cross_entropy, data), ggn_spectrum(net, F.cross_entropy, data)
    assert spectrum.trace().value == pytest.approx(ggn_found.trace().value, rel=1e-10)  # so their traces agree
    # (iii) The shifts of the logits: as many zero eigenvalues as inputs of the last layer, and one for its bias.
    assert spectrum.epsilon_rank(1e-12, relative=True).value <= spectrum.num_params - (5 + 1)
    # (iv) The trace by Hutchinson: 400 Rademacher probes with a standard error of sqrt(2 |offdiagonal|^2 / 400).
    probes = torch.randint(2, (400, len(mine)), generator=generator()).double() * 2 - 1
    estimate = float((operator_of(net, F.cross_entropy, [data]).matmat(probes) * probes).sum(1).mean())
    error = float((2 * (mine.square().sum() - mine.diagonal().square().sum()) / 400).sqrt())
    assert abs(estimate - spectrum.trace().value) < 4 * error
    # (v) Rescaling two layers leaves the function, and not the spectrum.
    before = net(data[0]).detach()
    for parameter in net[0].parameters():
        parameter.data *= 3
    net[2].weight.data /= 3
    torch.testing.assert_close(net(data[0]).detach(), before, rtol=1e-12, atol=1e-14)
    assert hessian_spectrum(net, F.cross_entropy, data).max_abs > 1.5 * spectrum.max_abs


def test_exact_and_lanczos():
    net, data = mlp(8, 20, 15, 4), classes(50, 8, 4)
    exact = hessian_spectrum(net, F.cross_entropy, data)
    estimate = hessian_spectrum(net, F.cross_entropy, data, method="lanczos", num_steps=100)
    assert (exact.method, exact.exact, estimate.method, estimate.exact) == ("exact", True, "lanczos", False)
    assert exact.num_params == estimate.num_params == 559
    assert exact.num_samples == estimate.num_samples == 50
    # The product that finds dead coordinates is the first of them, except in the range.
    assert estimate.num_products == 100 + ("range_dimensions" in estimate.settings)
    assert estimate.lambda_max().value == pytest.approx(exact.lambda_max().value, rel=1e-9)
    assert estimate.lambda_min().value == pytest.approx(exact.lambda_min().value, rel=1e-6)
    for rho in (0.3, 0.1, 0.01):
        truth, found = exact.epsilon_rank(rho, relative=True).value, estimate.epsilon_rank(rho, relative=True)
        assert found.lower <= truth <= found.upper
    assert not hessian_spectrum(mlp(20, 60, 4), F.cross_entropy, classes(20, 20, 4)).exact  # 1504 coordinates
    # As many steps as coordinates: every eigenvalue.
    full = hessian_spectrum(mlp(3, 4, 2), F.cross_entropy, classes(9, 3, 2), method="lanczos", num_steps=1000)
    truth = dense_hessian(mlp(3, 4, 2), F.cross_entropy, *classes(9, 3, 2))
    assert full.epsilon_rank(1e-6).lower <= (torch.linalg.eigvalsh(truth).abs() > 1e-6).sum()
    with pytest.raises(ValueError, match="method='slq', expected one of"):
        hessian_spectrum(net, F.cross_entropy, data, method="slq")


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_unusual_networks(method):
    one = nn.Linear(1, 1, bias=False).double()
    inputs = torch.tensor([[3.0]], dtype=torch.float64)
    square = hessian_spectrum(one, F.mse_loss, (inputs, torch.zeros(1, 1, dtype=torch.float64)), method=method)
    assert expanded(square).tolist() == pytest.approx([18.0])  # one parameter, one sample: 2 x^2
    # A loss that is linear in the parameters has no Hessian.
    linear = hessian_spectrum(one, lambda o, t: o.mean(), (inputs, inputs), method=method)
    assert (linear.max_abs, linear.num_params, linear.exact) == (0.0, 1, True)
    assert linear.epsilon_rank(0.0).value == 0
    assert linear.effective_rank().value == 0
    # A dead network: only the last bias has curvature.
    net, data = mlp(4, 5, 3, activation=nn.ReLU), classes(12, 4, 3)
    net[0].bias.data.fill_(-100)
    dead = hessian_spectrum(net, F.cross_entropy, data, method=method)
    assert dead.settings["live_coordinates"] == 3
    assert dead.epsilon_rank(1e-9).value == 2  # C - 1
    assert_same_eigenvalues(
        hessian_spectrum(net, F.cross_entropy, data), dense_hessian(net, F.cross_entropy, *data), rtol=1e-9
    )


def test_what_cannot_be_measured_says_why():
    net, data = mlp(4, 5, 3), classes(12, 4, 3)
    with pytest.raises(MeasurementError, match="no trainable parameter"):
        hessian_spectrum(nn.Flatten(), F.cross_entropy, data)
    for function in (hessian_spectrum, ggn_spectrum, ntk_spectrum):
        with pytest.raises(MeasurementError, match=r"does not depend on any trainable parameter.*Unfreeze"):
            function(net, lambda o, t: F.cross_entropy(o.detach(), t), data)
        with pytest.raises(ValueError, match=r"params=\['lay\*'\] match nothing; those that exist: 0\.weight, 0\.bias"):
            function(net, F.cross_entropy, data, params=["0.*", "lay*"])
        with pytest.raises(ValueError, match="match nothing"):
            function(net, F.cross_entropy, data, params=[])
        with pytest.raises(MeasurementError, match="no batch"):
            function(net, F.cross_entropy, [])
        with pytest.raises(TypeError, match=r"expected \(inputs, targets\)"):
            function(net, F.cross_entropy, 3)
        with pytest.raises(ValueError, match="mode='train'"):
            function(net, F.cross_entropy, data, mode="train")
    net[0].weight.data[0, 0] = float("nan")
    for function in (hessian_spectrum, ggn_spectrum, ntk_spectrum):
        with pytest.raises(MeasurementError, match="loss on the probe data is nan; look for NaN or inf"):
            function(net, F.cross_entropy, data)


def test_no_probe_data():
    with pytest.raises(MeasurementError, match="There is no probe data"):
        Measured(mlp(4, 3), [])


def test_infinite_curvature_is_refused():
    # A finite loss whose second derivative is not: x^1.5 at zero.
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.zero_()
    data = (torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    with pytest.raises(MeasurementError, match="not finite"):
        hessian_spectrum(net, lambda o, t: o.abs().pow(1.5).mean(), data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_params_choose_a_block(dtype):
    net, data = mlp(4, 5, 3), classes(12, 4, 3)
    dense = dense_hessian(net, F.cross_entropy, *data)
    spectrum = hessian_spectrum(net.to(dtype), F.cross_entropy, (data[0].to(dtype), data[1]), params="2.*")
    truth = torch.linalg.eigvalsh(dense[25:, 25:])
    # float32: one product's rounding, relative to the largest eigenvalue, as `resolution` says.
    atol = 1e-14 if dtype == torch.float64 else spectrum.resolution
    torch.testing.assert_close(expanded(spectrum), truth, rtol=1e-9, atol=atol)


def state_of(net):
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    return (
        [tensor.detach().clone() for tensor in tensors],
        [(module.training, [p.requires_grad for p in module.parameters()]) for module in net.modules()],
        [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))],
        random.getstate(),
        [sorted(module.__dict__) for module in net.modules()],
        [len(module._forward_hooks) for module in net.modules()],
    )


def assert_same_state(before, after):
    for first, second in zip([*before[0], *before[2]], [*after[0], *after[2]], strict=True):
        assert torch.equal(first, second)
    assert before[1] == after[1]
    assert before[3:] == after[3:]


@pytest.mark.parametrize("mode", ["frozen", "as_is", "eval"])
@pytest.mark.parametrize("function", [hessian_spectrum, ggn_spectrum, ntk_spectrum])
def test_nothing_has_changed_after(function, mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(6, 3))
    data = torch.randn(10, 4), torch.randint(3, (10,))
    F.cross_entropy(net(data[0]), data[1]).backward()
    net[1].eval()
    inputs, before = data[0].clone(), state_of(net)
    first = function(net, cross_entropy, data, mode=mode, seed=3)
    assert_same_state(before, state_of(net))
    assert torch.equal(inputs, data[0])
    torch.rand(7)
    assert torch.equal(first.eigenvalues, function(net, cross_entropy, data, mode=mode, seed=3).eigenvalues)

    before = state_of(net)
    with pytest.raises(ZeroDivisionError):
        function(net, lambda outputs, targets: 1 / 0, data)
    assert_same_state(before, state_of(net))


def test_settings_below_one_are_refused():
    net, data = mlp(4, 3), classes(9, 4, 3)
    with pytest.raises(ValueError, match="num_steps=0, expected at least 1"):
        hessian_spectrum(net, F.cross_entropy, data, num_steps=0)
    with pytest.raises(ValueError, match="max_rows=0, expected at least 1 row"):
        ggn_spectrum(net, F.cross_entropy, data, max_rows=0)


def test_a_rank_is_given_where_only_rounding_is_open():
    torch.manual_seed(0)
    net, (inputs, targets) = mlp(5, 6, 3, activation=nn.ReLU).float(), classes(9, 5, 3)
    net[0].bias.data.fill_(-100.0)
    data = inputs.float(), targets
    truth = ggn_spectrum(net, F.cross_entropy, data, method="exact").effective_rank().value
    found = ggn_spectrum(net, F.cross_entropy, data, method="lanczos").effective_rank()
    assert found.value == pytest.approx(truth, rel=1e-4)
    assert found.lower <= found.value <= found.upper
