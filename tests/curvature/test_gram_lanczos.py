"""GGN and NTK estimates: the operators against dense matrices, the intervals against the truth, and which route."""

from decimal import Decimal, localcontext

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

from lightning_plasticity.curvature import (
    LossClosure,
    Measured,
    MeasurementError,
    ggn_spectrum,
    gram_costs,
    gram_plan,
    ntk_spectrum,
)
from lightning_plasticity.curvature.budget import Budget
from lightning_plasticity.curvature.functions import as_batches
from lightning_plasticity.curvature.gram_lanczos import gram_spectrum
from lightning_plasticity.curvature.gram_plan import plan_gram
from lightning_plasticity.curvature.memory import GraphMeter
from lightning_plasticity.curvature.output_jacobian import DualOperator, OutputJacobian, PrimalOperator
from lightning_plasticity.curvature.output_root import SoftmaxRoot

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


def exact_probabilities(logits):
    """By 500 digits."""
    with localcontext() as context:
        context.prec = 500
        powers = [Decimal(value).exp() for value in logits]
        return [power / sum(powers) for power in powers]


# One class has all of the probability but about exp(-28) or exp(-138), 1e-12 or 1e-60, or but the last digit of 1.0.
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("lead", [0.5, 28.0, 37.0, 138.0, 500.0])
def test_softmax_root_is_accurate_in_every_row(lead, place):
    logits = [-0.75, 0.5, -3.0, 0.25]
    logits[place] = lead
    shape = torch.Size((1, 4))
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0)
    root = SoftmaxRoot.of(shape, probabilities.reshape(1, 4, 1), torch.ones(1, 1, dtype=torch.float64))
    found = root.columns()[:, 0].T  # (C, R)
    with localcontext() as context:
        context.prec = 500
        p = exact_probabilities(logits)
        truth = [[p[i] * ((i == j) - p[j]) for j in range(4)] for i in range(4)]
        sizes = [truth[i][i].sqrt() for i in range(4)]
        for i in range(4):
            for j in range(4):
                product = sum(
                    Decimal(a) * Decimal(b) for a, b in zip(found[i].tolist(), found[j].tolist(), strict=True)
                )
                assert abs(product - truth[i][j]) < Decimal("1e-14") * sizes[i] * sizes[j]
        # g^T H^+ g of the gradient p - y is (1 - p_y) / p_y.
        for label in range(4):
            gradient = probabilities - F.one_hot(torch.tensor(label), 4)
            least = root.solve(gradient[None])
            if label != place or lead < 20:  # of the sure and right one the gradient's own digits cancel
                energy = sum(Decimal(value) ** 2 for value in least.flatten().tolist())
                assert abs(energy * p[label] / (1 - p[label]) - 1) < Decimal("1e-11")
            torch.testing.assert_close(root.apply(least)[0], gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["cross entropy", "positions", "mse, sum", "bce", "huber", "all options"])
def test_roots_solve_what_they_are_applied_to(name):
    net, loss_fn, data = loss_problem(name)
    root = LossClosure(net, loss_fn)(data).output_loss.hessian_root()
    generator = torch.Generator().manual_seed(1)
    outputs = root.apply(torch.randn(root.num_columns, root.num_samples, generator=generator, dtype=torch.float64))
    least = root.solve(outputs)
    torch.testing.assert_close(root.apply(least), outputs)
    dense = root.columns().flatten(2).permute(1, 2, 0)  # (N, O, R)
    norm = (torch.linalg.pinv(dense) @ outputs.reshape(root.num_samples, -1, 1)).norm()
    torch.testing.assert_close(least.norm(), norm)


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
        monkeypatch.setattr(gram_costs, "DENSE_ROWS", 0)
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
    monkeypatch.setattr(gram_costs, "DENSE_ROWS", rows)
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
        monkeypatch.setattr(gram_costs, "DENSE_ROWS", rows)
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
    monkeypatch.setattr(gram_costs, "DENSE_ROWS", rows)
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


# Within a budget


def plan_of(net, data, budget, num_steps=40, matrix="ggn"):
    measured = Measured(net, as_batches(data, net), cross_entropy)
    return plan_gram(measured, matrix, measured.parameters(), 10, budget, exact=False, num_steps=num_steps)


def activations(num_samples=256, dim=512):
    """A net whose graphs, 5 activations of 4 KiB a sample in float64, outweigh its few parameters."""
    torch.manual_seed(0)
    layers = [Apply(lambda x: torch.sin(x)) for _ in range(5)]
    net = nn.Sequential(
        nn.Unflatten(1, (1, dim)), nn.Conv1d(1, 1, 3, padding=1), *layers, nn.Flatten(), nn.Linear(dim, 30)
    )
    return net.double(), (torch.randn(num_samples, dim, dtype=torch.float64), torch.randint(30, (num_samples,)))


@pytest.mark.parametrize("matrix", ["ggn", "ntk"])
def test_an_estimate_takes_the_samples_whose_graphs_fit(matrix, monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    net, data = activations()
    assert plan_of(net, data, Budget(), matrix=matrix).num_samples == 256
    budget = Budget(max_memory=12 * 2**20)
    plan = plan_of(net, data, budget, matrix=matrix)
    assert 1 < plan.num_samples < 256
    assert plan.why == f"{plan.num_samples} of 256 samples, to stay within 12 MiB"
    function = ggn_spectrum if matrix == "ggn" else ntk_spectrum
    found = function(net, cross_entropy, data, method="lanczos", num_steps=40, max_memory=12 * 2**20)
    assert (found.num_samples, found.settings["budget"]) == (plan.num_samples, plan.why)
    part = [(data[0][: plan.num_samples], data[1][: plan.num_samples])]
    assert found.lambda_max().value == pytest.approx(
        float(function(net, cross_entropy, part, max_rows=None).max_abs), rel=1e-6
    )


def test_the_memory_that_an_estimate_is_said_to_take(monkeypatch):
    # What autograd keeps for the products is weighed here while they are made, and bounded there by a forward pass.
    net, data = activations(32)
    measured = Measured(net, as_batches(data, net), cross_entropy)
    costs = gram_costs.FreeLanczosCosts(gram_costs.problem_of(measured, "ggn", measured.parameters()))
    with measured.open() as closure, GraphMeter(list(net.parameters())) as meter:
        jacobian = OutputJacobian([closure(measured.batches[0]).output_loss.outputs], measured.parameters())
    assert jacobian.num_params == costs.problem.num_params
    assert meter.num_bytes < costs.memory(32, 0) < 3 * meter.num_bytes
    assert costs.memory(16, 0) < 0.75 * costs.memory(32, 0)


@pytest.mark.parametrize(
    ("seconds", "samples", "steps"), [(1e3, 256, None), (20.0, 128, None), (3.0, 32, 20), (1e-6, 8, 20)]
)
def test_an_estimate_gives_up_samples_then_steps_for_time(seconds, samples, steps, monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    # 1 / 256 seconds per sample and step: 40 seconds for all.
    monkeypatch.setattr(
        gram_plan, "free_costs", lambda problem, *rest: gram_costs.FreeLanczosCosts(problem, 0.0, 1 / 256)
    )
    net, data = activations(dim=8)
    plan = plan_of(net, data, Budget(max_seconds=seconds))
    assert (plan.num_samples, plan.num_steps) == (samples, steps)
    assert (f"{samples} of 256 samples" in plan.why) == (samples < 256)
    assert ("20 of 40 Lanczos steps" in plan.why) == (steps is not None)
    found = gram_spectrum(
        Measured(net, as_batches(data, net), cross_entropy),
        "ggn",
        method="lanczos",
        max_rows=10,
        num_steps=40,
        plan=plan,
    )
    assert (found.num_samples, found.settings["num_steps"]) == (samples, steps or 40)


def test_an_estimate_within_real_seconds(monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    monkeypatch.setattr(gram_plan, "SMALL_WORK", 0)
    net, data = activations()
    found = ggn_spectrum(net, cross_entropy, data, method="lanczos", max_seconds=1e-4)
    assert (found.num_samples, found.settings["num_steps"]) == (8, 20)
    many = ggn_spectrum(net, cross_entropy, data, method="lanczos", num_steps=20, max_seconds=1e3)
    assert (many.num_samples, "budget" in many.settings) == (256, False)


def test_lanczos_on_the_gram_matrix_is_planned_from_trials(monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_WORK", 0)
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    net, batches = large(6)
    found = ggn_spectrum(net, cross_entropy, batches, method="lanczos", num_steps=25)
    assert found.settings["route"] == ROUTES["gram"]
    little = ggn_spectrum(net, cross_entropy, batches, method="lanczos", num_steps=25, max_memory=1.4e6)
    assert little.settings["route"] == ROUTES["outputs"]  # a matrix of 200 rows, three times, is a MiB
    assert little.num_samples == 40


class OwnSize(nn.Module):
    """Wants batches of twenty samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4).double()

    def forward(self, x):
        return self.layer(x.view(20, 6))


@pytest.mark.parametrize("budget", [Budget(max_memory=1), Budget(max_seconds=1e-6), Budget(1e-6, 1)])
def test_data_that_cannot_be_cut_is_measured_whole(budget, monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_WORK", 0)
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    plan = plan_of(OwnSize(), [classes(20, 6, 4), classes(20, 6, 4, seed=1)], budget)
    assert (plan.num_samples, plan.cut, plan.why) == (40, None, "")


def test_no_sample_fits_the_memory(monkeypatch):
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    with pytest.raises(MeasurementError, match=r"on one sample, and 0 MiB are allowed. Raise max_memory, or choose"):
        plan_of(*activations(), Budget(max_memory=1000))


def test_samples_that_the_loss_counts_by_positions_are_cut_as_the_data_counts_them(monkeypatch):
    # 12 sequences of 5 positions, flattened: the loss has 60 samples, and half of them are 6 of the data's.
    monkeypatch.setattr(gram_plan, "SMALL_PRODUCTS", 0)
    monkeypatch.setattr(gram_costs, "DENSE_ROWS", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0, 1)).double()
    loss_fn = lambda outputs, targets: F.cross_entropy(outputs, targets.flatten())  # noqa: E731
    data = torch.randn(12, 5, 4, dtype=torch.float64), torch.randint(3, (12, 5))
    measured = Measured(net, [data], loss_fn)
    monkeypatch.setattr(
        gram_plan, "free_costs", lambda problem, *rest: gram_costs.FreeLanczosCosts(problem, 0.0, 1 / 60)
    )
    plan = plan_gram(measured, "ggn", measured.parameters(), 10, Budget(max_seconds=21), exact=False, num_steps=40)
    assert (plan.num_samples, plan.cut) == (30, 6)
    found = gram_spectrum(measured, "ggn", method="lanczos", max_rows=10, num_steps=40, plan=plan)
    assert (found.num_samples, found.settings["rows"]) == (30, 60)
    flat = lambda outputs, targets: F.cross_entropy(outputs, targets.flatten())  # noqa: E731
    truth = dense_ggn(net, flat, [(data[0][:6], data[1][:6])])
    check_intervals(found, torch.linalg.eigvalsh(truth))
