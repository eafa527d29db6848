"""GGN and NTK estimates: the operators against dense matrices, the intervals against the truth, and which route."""

import pytest
import torch
from losses import LOSSES
from losses import problem as loss_problem
from problems import (
    Apply,
    assert_same_eigenvalues,
    classes,
    cross_entropy,
    dense_ggn,
    dense_jacobian,
    dense_ntk,
    expanded,
    mlp,
    trainable,
)
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import LossClosure, ggn_spectrum, ntk_spectrum
from lightning_plasticity.curvature.gram import plan as gram_plan
from lightning_plasticity.curvature.gram.jacobian import DualOperator, OutputJacobian, PrimalOperator

ROUTES = {
    "gram": "lanczos on the Gram matrix",
    "outputs": "lanczos by products with the network, in the space of outputs",
    "parameters": "lanczos by products with the network, in the space of parameters",
}


def matrix_of(operator):
    identity = torch.eye(operator.dim, dtype=torch.float64)
    return torch.stack([operator.matvec(column) for column in identity], dim=1)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("nll")])
def test_roots_are_operators(name):
    net, loss_fn, data = loss_problem(name)
    root = LossClosure(net, loss_fn)(data).output_loss.hessian_root()
    columns = root.columns()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(root.num_columns, root.num_samples, generator=generator, dtype=torch.float64)
    outputs = torch.randn(root.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(root.apply(vector), torch.einsum("rn...,rn->n...", columns, vector))
    expected = (columns * outputs).flatten(2).sum(2)
    torch.testing.assert_close(root.transpose(outputs), expected)
    torch.testing.assert_close(root.scaled(0.5).columns(), 0.5 * columns)
    torch.testing.assert_close(root.scaled(0.5).transpose(outputs), 0.5 * expected)


@pytest.mark.parametrize("name", ["cross entropy", "positions", "mse, sum", "bce", "huber", "all options"])
def test_both_operators_are_dense_matrices(name):
    net, loss_fn, data = loss_problem(name)
    loss = LossClosure(net, loss_fn)(data).output_loss
    parameters = trainable(net)
    jacobian, root = OutputJacobian([loss.outputs], parameters), loss.hessian_root()
    truth = dense_ggn(net, loss_fn, [data])
    torch.testing.assert_close(matrix_of(PrimalOperator(jacobian, [root])), truth, rtol=1e-10, atol=1e-14)
    rows = root.columns().flatten(0, 1).flatten(1)  # (R N, O): each at one sample
    full = torch.zeros(len(rows), *loss.outputs.shape, dtype=torch.float64).flatten(2)
    num_samples = len(loss.outputs)
    full[torch.arange(len(rows)), torch.arange(len(rows)) % num_samples] = rows
    factor = full.flatten(1) @ dense_jacobian(loss.outputs, parameters)
    dual = matrix_of(DualOperator(jacobian, [root]))
    torch.testing.assert_close(dual, factor @ factor.T, rtol=1e-10, atol=1e-14)


def large(num_classes, seed=0):
    torch.manual_seed(seed)
    net = mlp(6, 16, num_classes, seed=seed)
    inputs, targets = classes(40, 6, num_classes, seed=seed)
    return net, [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])]


def check_intervals(spectrum, truth):
    """Of seven 95 % (and, the trace's, 99 %) intervals one may miss; two miss in about one spectrum of twenty-five."""
    assert spectrum.num_params == len(truth)
    assert float(spectrum.counts.sum()) == pytest.approx(len(truth))
    top, trace = float(truth.max()), float(truth.sum())
    assert spectrum.lambda_max().lower <= top * (1 + 1e-9)
    assert spectrum.lambda_max().upper >= top * (1 - 1e-9)
    found = [(trace, spectrum.trace())]
    for eps in (1e-8, 1e-4, 1e-3, 1e-2, 0.1, 0.5):
        found.append((int((truth > eps * top).sum()), spectrum.epsilon_rank(eps, relative=True)))
    misses = [
        (value, interval)
        for value, interval in found
        if not interval.lower * (1 - 1e-9) <= value <= interval.upper * (1 + 1e-9)
    ]
    assert len(misses) <= 1, misses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("function", [ggn_spectrum, ntk_spectrum])
def test_intervals_hold_on_every_route(function, route, seed, monkeypatch):
    # 40 samples of 6 or 30 classes, 16 * 7 + 17 * C parameters: 200 rows of 214, or 1160 of 622.
    net, batches = large(30 if route == "parameters" else 6, seed)
    if route == "outputs":
        monkeypatch.setattr(gram_plan, "DENSE_ROWS", 0)
    if function is ntk_spectrum and route != "parameters":  # 240 rows
        net = mlp(6, 20, 6, seed=seed)
    spectrum = function(net, cross_entropy, batches, method="lanczos", num_steps=25, seed=seed)
    assert spectrum.settings["route"] == ROUTES[route]
    assert (spectrum.exact, spectrum.method, spectrum.num_samples) == (False, "lanczos", 40)
    dense = dense_ggn(net, cross_entropy, batches) if function is ggn_spectrum else dense_ntk(net, batches)
    check_intervals(spectrum, torch.linalg.eigvalsh(dense))


@pytest.mark.parametrize("rows", [0, 10**6])
def test_all_steps_are_the_exact_spectrum(rows, monkeypatch):
    # As many steps as dimensions: nothing is left to estimate, and the padding is zeros exactly.
    monkeypatch.setattr(gram_plan, "DENSE_ROWS", rows)
    net, data = mlp(5, 6, 4), classes(7, 5, 4)
    spectrum = ggn_spectrum(net, cross_entropy, data, method="lanczos")
    assert spectrum.exact
    truth = torch.linalg.eigvalsh(dense_ggn(net, cross_entropy, [data]))
    torch.testing.assert_close(expanded(spectrum), truth, rtol=1e-8, atol=1e-13)


def test_sequences_of_several_lengths_by_both_dual_routes(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3), Apply(lambda x: x.mT)).double()
    batches = [(torch.randn(3, t, 4, dtype=torch.float64), torch.randint(3, (3, t))) for t in (4, 6, 3)]
    total = sum(targets.numel() for _, targets in batches)
    dense = sum(batch[1].numel() / total * dense_ggn(net, cross_entropy, [batch]) for batch in batches)
    for rows in (0, 10**6):
        monkeypatch.setattr(gram_plan, "DENSE_ROWS", rows)
        check_intervals(
            ggn_spectrum(net, cross_entropy, batches, method="lanczos", num_steps=40), torch.linalg.eigvalsh(dense)
        )


def test_thousand_classes_on_all_samples():
    # 40 * 999 rows: a Gram matrix of 12 GiB that is never formed, nor is a factor of 40 * 999 * 1000.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 1000))
    data = torch.randn(40, 8), torch.randint(1000, (40,))
    spectrum = ggn_spectrum(net, nn.CrossEntropyLoss(), data, num_steps=30)
    assert spectrum.settings["reason"] == "lanczos: the rows of only 5 of 40 samples fit max_rows=5000"
    assert spectrum.settings["rows"] == 39960
    assert spectrum.num_params == 270 + 31000
    # The trace without any of this: the mean over samples of sum_c p_c |J_c - mean_p J|^2, for the last layer in closed
    # form, h the features: (1 - |p|^2) (|h|^2 + 1).
    head = ggn_spectrum(net, nn.CrossEntropyLoss(), data, params="2.*", method="lanczos", num_steps=30)
    features, p = torch.tanh(net[0](data[0])).double().detach(), torch.softmax(net(data[0]).double(), 1).detach()
    trace = float(((1 - p.square().sum(1)) * (features.square().sum(1) + 1)).mean())
    assert head.trace().lower <= trace <= head.trace().upper
    assert head.trace().value == pytest.approx(trace, rel=0.1)
    assert head.lambda_max().value <= spectrum.lambda_max().value * (1 + 1e-5)


def test_auto_chooses_and_says_why():
    net, (inputs, targets) = mlp(5, 6, 4), classes(50, 5, 4)
    for max_rows, num_samples, method, reason in [
        (None, 50, "gram", "exact: max_rows sets no bound"),
        (150, 50, "gram", "exact: the rows of all 50 samples fit max_rows=150"),
        (100, 33, "gram", "exact: the rows of the first 33 of 50 samples fit max_rows=100"),
        (95, 50, "lanczos", "lanczos: the rows of only 31 of 50 samples fit max_rows=95"),
    ]:
        spectrum = ggn_spectrum(net, cross_entropy, (inputs, targets), max_rows=max_rows)
        assert (spectrum.num_samples, spectrum.method) == (num_samples, method)
        assert spectrum.settings["reason"] == reason
        route = "eigenvalues of the Gram matrix" if method == "gram" else ROUTES["parameters"]  # 64 for 150 rows
        assert spectrum.settings["route"] == route
    few = ggn_spectrum(net, cross_entropy, (inputs[:3], targets[:3]), max_rows=9)
    assert few.settings["reason"] == "exact: the rows of all 3 samples fit max_rows=9"
    first = dense_ggn(net, cross_entropy, [(inputs[:33], targets[:33])])
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, (inputs, targets), max_rows=100), first)


def test_layers_without_a_shortcut_are_estimated_matrix_free():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Flatten(), nn.Linear(28, 3)).double()
    data = torch.randn(12, 2, 5, dtype=torch.float64), torch.randint(3, (12,))
    spectrum = ggn_spectrum(net, cross_entropy, data, method="lanczos", num_steps=10)
    assert spectrum.settings["route"] == ROUTES["outputs"]
    check_intervals(spectrum, torch.linalg.eigvalsh(dense_ggn(net, cross_entropy, [data])))


@pytest.mark.parametrize("rows", [0, 10**6])
@pytest.mark.parametrize("function", [ggn_spectrum, ntk_spectrum])
def test_degenerate_networks(function, rows, monkeypatch):
    monkeypatch.setattr(gram_plan, "DENSE_ROWS", rows)
    dead = mlp(4, 8, 3, activation=nn.ReLU)
    dead[0].bias.data.fill_(-100)
    inputs, targets = classes(9, 4, 3)
    spectrum = function(dead, cross_entropy, (inputs, targets), method="lanczos")
    dense = dense_ggn(dead, cross_entropy, [(inputs, targets)])
    dense = dense if function is ggn_spectrum else dense_ntk(dead, [(inputs, targets)])
    if function is ggn_spectrum:  # all samples have the same output: only the last bias has curvature
        found = spectrum.epsilon_rank(1e-6, relative=True)
        assert found.lower <= 2 <= found.upper
    assert spectrum.lambda_max().value == pytest.approx(float(torch.linalg.eigvalsh(dense).max()))
    one = nn.Linear(1, 1, bias=False).double()
    pair = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    single = function(one, F.mse_loss, pair, method="lanczos")
    assert single.exact
    assert expanded(single).tolist() == pytest.approx([2.0 if function is ggn_spectrum else 1.0])
    zero = function(one, F.mse_loss, (torch.zeros(3, 1).double(), torch.zeros(3, 1).double()), method="lanczos")
    assert zero.max_abs == 0.0


def test_no_curvature_at_all():
    data = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    spectrum = ggn_spectrum(mlp(3, 4, 1), cross_entropy, data, method="lanczos")
    assert (spectrum.num_params, spectrum.max_abs, spectrum.exact) == (21, 0.0, True)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method='quick', expected one of \('auto', 'exact', 'lanczos'\)"):
        ggn_spectrum(mlp(3, 2), cross_entropy, classes(4, 3, 2), method="quick")
