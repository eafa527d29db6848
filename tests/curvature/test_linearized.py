"""The linearised prediction against gradient descent itself, dense matrices, and its own bounds."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import dense_jacobian
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature import (
    LinearizedPrediction,
    MeasurementError,
    ggn_spectrum,
    linearized_trainability,
    ntk_spectrum,
)
from lightning_plasticity.curvature.gram.jacobian import DualOperator, OutputJacobian
from lightning_plasticity.curvature.loss.output_root import DiagonalRoot

METHODS: list[dict[str, Any]] = [{"method": "exact"}, {"method": "lanczos", "lanczos_steps": 60}]


def regression(num_samples: int = 24, size: int = 5, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
    return x, torch.randn(num_samples, outputs, generator=generator, dtype=torch.float64)


def half_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def descend(net: nn.Module, loss: Any, data: tuple[Tensor, Tensor], learning_rate: float, steps: int) -> list[float]:
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), learning_rate)
    losses = []
    for _ in range(steps + 1):
        value = loss(net(data[0]), data[1])
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return losses


def linear(outputs: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, outputs).double()


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


# Against gradient descent


@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(reduction="sum"), half_squared])
def test_linear_model_is_predicted_exactly(options: dict[str, Any], loss: Any, kernel: str) -> None:
    net, data = linear(), regression()
    rate = 0.005 if isinstance(loss, nn.MSELoss) else 0.3
    truth = descend(net, loss, data, rate, 200)
    found = linearized_trainability(net, loss, data, learning_rate=rate, num_steps=200, kernel=kernel, **options)
    assert (found.kernel, found.offset) == (kernel, pytest.approx(0.0, abs=1e-12 * truth[0]))
    for steps in (0, 1, 2, 3, 7, 30, 200):
        estimate = found.loss_after(steps)
        assert estimate.value == pytest.approx(truth[steps], rel=1e-12)
        assert estimate.lower <= truth[steps] * (1 + 1e-12)
        assert estimate.upper >= truth[steps] * (1 - 1e-12)
    target = truth[17]
    assert found.steps_to(target * (1 + 1e-9)).value == 17
    assert found.reaches(truth[200] * 1.001)
    assert not found.reaches(truth[200] * 0.999)


def test_batches_are_one_full_batch() -> None:
    net, (x, y) = linear(), regression()
    truth = descend(net, F.mse_loss, (x, y), 0.3, 10)[10]
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    for options in METHODS:
        found = linearized_trainability(net, F.mse_loss, parts, learning_rate=0.3, num_steps=10, **options)
        assert found.final_loss.value == pytest.approx(truth, rel=1e-12)
        assert (found.num_samples, found.num_rows) == (24, 48)


def test_nonlinear_net_for_a_short_while() -> None:
    net, data = small_net(), regression(outputs=3)
    rate, steps = 1e-3, 50
    truth = descend(net, half_squared, data, rate, steps)
    found = linearized_trainability(net, half_squared, data, learning_rate=rate, num_steps=steps)
    # Outputs move by O(eta T) = 0.05, so the Jacobian does, and so does the rate of the decrease: 5 % of it, at most.
    decrease = truth[0] - truth[steps]
    assert decrease > 0.01 * truth[0]
    assert found.final_loss.value == pytest.approx(truth[steps], abs=0.05 * decrease)
    assert found.loss_after(0).value == pytest.approx(truth[0], rel=1e-12)


# Against gradient descent on the linearised network


SMOOTH = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64), label_smoothing=0.1)


def jacobian_of(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) outputs and their (N C, P) derivatives."""
    outputs = net(x)
    return outputs.detach(), dense_jacobian(outputs, list(net.parameters()))


def descend_linearized(loss: Any, outputs: Tensor, jacobian: Tensor, rate: float, steps: int) -> list[float]:
    """Gradient descent, by autograd, on loss(f + J d) from d = 0."""
    change = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    values = []
    for _ in range(steps + 1):
        value = loss(outputs + (jacobian @ change).view_as(outputs))
        values.append(float(value.detach()))
        (gradient,) = torch.autograd.grad(value, change)
        change = (change - rate * gradient).detach().requires_grad_()
    return values


def quadratic_model(loss: Any, outputs: Tensor) -> Any:
    """The second-order Taylor expansion of the loss in the outputs."""
    value = loss(outputs)
    gradient = torch.autograd.functional.jacobian(loss, outputs).flatten()
    curvature = torch.autograd.functional.hessian(loss, outputs).reshape(outputs.numel(), -1)

    def model(moved: Tensor) -> Tensor:
        change = (moved - outputs).flatten()
        return value + gradient @ change + 0.5 * change @ curvature @ change

    return model


@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
@pytest.mark.parametrize("options", METHODS)
def test_descent_on_the_linearised_network(options: dict[str, Any], kernel: Any) -> None:
    net, (x, y) = small_net(), regression(outputs=3)
    truth = descend_linearized(lambda outputs: F.mse_loss(outputs, y), *jacobian_of(net, x), 0.4, 150)
    found = linearized_trainability(net, F.mse_loss, (x, y), learning_rate=0.4, num_steps=150, kernel=kernel, **options)
    for steps in (0, 1, 10, 150):
        assert found.loss_after(steps).value == pytest.approx(truth[steps], rel=1e-10)


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("loss", [F.cross_entropy, SMOOTH, nn.CrossEntropyLoss(reduction="sum")])
def test_descent_on_the_quadratic_model_of_a_cross_entropy(options: dict[str, Any], loss: Any) -> None:
    net, (x, _) = small_net(), regression()
    labels = torch.arange(24) % 3
    outputs, jacobian = jacobian_of(net, x)
    rate = 0.02 if getattr(loss, "reduction", "mean") == "sum" else 0.5
    model = quadratic_model(lambda moved: loss(moved, labels), outputs)
    truth = descend_linearized(model, outputs, jacobian, rate, 150)
    found = linearized_trainability(
        net, loss, (x, labels), learning_rate=rate, num_steps=150, kernel="ggn", **options
    )  # fmt: skip
    assert truth[150] < 0.99 * truth[0]
    assert found.num_rows == 24 * 2
    for steps in (0, 1, 10, 150):
        assert found.offset + found.loss_after(steps).value == pytest.approx(truth[steps], rel=1e-10)
    spectrum = ggn_spectrum(net, loss, (x, labels)).eigenvalues
    if options["method"] == "exact":
        torch.testing.assert_close(found.nodes[-20:], spectrum[-20:], rtol=1e-8, atol=0.0)


def test_log_probabilities_are_logits_too() -> None:
    net, (x, _) = small_net(), regression()
    labels, about = torch.arange(24) % 3, {"learning_rate": 0.5, "num_steps": 20, "kernel": "ggn"}
    truth = linearized_trainability(net, F.cross_entropy, (x, labels), **about)  # type: ignore[arg-type]
    log_net = nn.Sequential(net, nn.LogSoftmax(1))
    found = linearized_trainability(log_net, nn.NLLLoss(), (x, labels), **about)  # type: ignore[arg-type]
    assert found.final_loss.value == pytest.approx(truth.final_loss.value, rel=1e-10)


@pytest.mark.parametrize("confidence", [0.0, 3.0, 40.0, 150.0])
def test_weighted_residual_of_a_softmax_by_hand(confidence: float) -> None:
    # 1/2 g^T H^+ g for the softmax is (1 - p_y) / (2 p_y): enormous where the network is sure and wrong.
    net, (x, _) = small_net(), regression()
    with torch.no_grad():
        net[2].bias[0] = confidence
    labels = torch.arange(24) % 3
    log_p = F.log_softmax(net(x), 1).detach()[torch.arange(24), labels]
    found = linearized_trainability(net, F.cross_entropy, (x, labels), learning_rate=1e-9, num_steps=1, kernel="ggn")
    truth = float((-torch.expm1(log_p) / (2 * log_p.exp())).mean())
    assert found.initial_loss == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("loss", [SMOOTH, nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss(reduction="sum")])
def test_uneven_batches_are_one_loss(options: dict[str, Any], kernel: Any, loss: Any) -> None:
    net, (x, _) = small_net(), regression()
    labels = (torch.arange(24) % 3).sort().values
    parts = [(x[:5], labels[:5]), (x[5:9], labels[5:9]), (x[9:], labels[9:])]
    about: dict[str, Any] = {"learning_rate": 0.005, "num_steps": 40, "kernel": kernel} | options
    whole = linearized_trainability(net, loss, (x, labels), **about)
    found = linearized_trainability(net, loss, parts, **about)
    for steps in (0, 1, 40):
        assert found.loss_after(steps).value == pytest.approx(whole.loss_after(steps).value, rel=1e-10)
    assert found.offset == pytest.approx(whole.offset, rel=1e-10)


# Against dense matrices


@pytest.mark.parametrize("options", METHODS)
def test_cross_entropy_takes_the_residual_and_the_plain_kernel(options: dict[str, Any]) -> None:
    net, (x, _) = small_net(), regression()
    labels = torch.arange(24) % 3
    outputs = net(x)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(out, list(net.parameters()), retain_graph=True)])
            for out in outputs.T.flatten()]  # fmt: skip
    jacobian = torch.stack(rows).numpy()
    residual = (F.one_hot(labels, 3) - outputs.detach().softmax(1)).T.flatten().numpy()
    kernel = jacobian @ jacobian.T / 24
    found = linearized_trainability(net, F.cross_entropy, (x, labels), learning_rate=0.5, num_steps=40, **options)
    for steps in (0, 1, 5, 40):
        left = np.linalg.matrix_power(np.eye(72) - 0.5 * kernel, steps) @ residual
        assert found.loss_after(steps).value == pytest.approx(float(left @ left) / 48, rel=1e-9)


def test_operator_is_the_kernel() -> None:
    net, (x, y) = small_net(), regression(outputs=3)
    net[0].bias.requires_grad_(False)
    parameters = [p for p in net.parameters() if p.requires_grad] + [nn.Parameter(torch.zeros(2).double())]
    shapes = [torch.Size((size, 3)) for size in (10, 14)]
    roots = [DiagonalRoot(shape, torch.full(shape, 24**-0.5, dtype=torch.float64)) for shape in shapes]
    operator = DualOperator(OutputJacobian([net(x[:10]), net(x[10:])], parameters), roots)
    dense = torch.stack([operator.matvec(unit) for unit in torch.eye(72, dtype=torch.float64)])
    torch.testing.assert_close(dense, dense.T)
    exact = ntk_spectrum(net, half_squared, (x, y)).eigenvalues
    torch.testing.assert_close(torch.linalg.eigvalsh(dense)[-30:], exact[-30:], rtol=1e-9, atol=1e-12)


def test_nodes_are_the_ntk_spectrum() -> None:
    net, data = small_net(), regression(outputs=3)
    found = linearized_trainability(net, F.mse_loss, data, learning_rate=0.1, num_steps=5)
    exact = ntk_spectrum(net, F.mse_loss, data)
    torch.testing.assert_close(found.nodes[-20:], 2 / 3 * exact.eigenvalues[-20:])
    assert found.curvature == pytest.approx(2 / 3)
    only = linearized_trainability(net, F.mse_loss, data, learning_rate=0.1, num_steps=5, params="2.*")
    assert float(only.nodes[-1]) < float(found.nodes[-1])


# Lanczos


@pytest.mark.parametrize("lanczos_steps", [1, 2, 5, 9])
@pytest.mark.parametrize("speed", [0.4, 1.99])  # eta lambda_max, from below its limit of 2
@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
def test_lanczos_is_exact_up_to_its_order_and_bounds_beyond(lanczos_steps: int, speed: float, kernel: Any) -> None:
    net, (x, targets) = small_net(), regression(outputs=3)
    loss: Any = F.mse_loss if kernel == "ntk" else F.cross_entropy
    data = x, targets if kernel == "ntk" else torch.arange(24) % 3
    top = float(linearized_trainability(net, loss, data, learning_rate=1e-3, num_steps=1, kernel=kernel).nodes[-1])
    about: dict[str, Any] = {"learning_rate": speed / top, "num_steps": 100, "kernel": kernel}
    exact = linearized_trainability(net, loss, data, method="exact", **about)
    found = linearized_trainability(net, loss, data, method="lanczos", lanczos_steps=lanczos_steps, **about)
    assert found.exact_steps == lanczos_steps - 1
    assert found.num_products == lanczos_steps
    for steps in (*range(lanczos_steps), 20, 100, 10_000):
        truth, estimate = exact.loss_after(steps).value, found.loss_after(steps)
        if steps <= found.exact_steps:
            assert estimate.value == pytest.approx(truth, rel=1e-11)
        assert estimate.value <= truth * (1 + 1e-11)
        assert estimate.lower * (1 - 1e-11) <= truth <= estimate.upper * (1 + 1e-11)
    target = exact.loss_after(37).value
    steps_to = found.steps_to(target * (1 + 1e-9))
    assert steps_to.lower <= 37 <= steps_to.upper


def test_default_lanczos_has_no_quadrature_error() -> None:
    found = linearized_trainability(
        small_net(), F.mse_loss, regression(outputs=3), learning_rate=0.1, num_steps=6, method="lanczos"
    )
    assert found.num_products == 7
    assert found.exact_steps == 6


@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
def test_float32_interval_holds_the_truth(kernel: Any) -> None:
    net, (x, y) = small_net(), regression(outputs=3)
    about: dict[str, Any] = {"learning_rate": 0.4, "num_steps": 300, "kernel": kernel}
    exact = linearized_trainability(net, F.mse_loss, (x, y), **about)
    single = copy.deepcopy(net).float(), F.mse_loss, (x.float(), y.float())
    for options in METHODS:
        found = linearized_trainability(*single, **about, **options)
        for steps in (1, 30, 300):
            truth, estimate = exact.loss_after(steps).value, found.loss_after(steps)
            # The interval covers the eigenvalues' rounding; 1e-6 more for that of the residual.
            assert estimate.lower * (1 - 1e-6) <= truth <= estimate.upper * (1 + 1e-6)


# What a target needs


def test_bounds_hold() -> None:
    found = linearized_trainability(small_net(), F.mse_loss, regression(outputs=3), learning_rate=0.4, num_steps=60)
    for steps in (1, 60, 500):
        for eps in (1e-3, 0.03, 0.3, 1 / (0.4 * steps)):
            if 0.4 * eps > 1:
                continue
            loss = found.loss_after(steps).value
            bound = found.initial_loss * (1 - 0.4 * eps) ** (2 * steps) * found.share_below(eps)
            assert loss >= bound * (1 - 1e-12)
            # The loss that is reached is one that the share allows.
            assert found.share_below(eps) <= found.share_allowed(loss, eps, steps) * (1 + 1e-12)
    assert found.eps == pytest.approx(1 / (0.4 * 60))


def test_required_rank_by_hand() -> None:
    found = LinearizedPrediction(
        torch.tensor([0.0, 0.0, 1.0, 1.0]).double(), torch.ones(4).double(),
        learning_rate=0.5, num_steps=10, num_samples=2, num_rows=4,
    )  # fmt: skip
    assert found.initial_loss == 1.0
    # A flat residual, and no time to move what is below eps = 0: half the loss goes with half the eigenvalues.
    assert found.required_rank(0.5, eps=0.0) == pytest.approx(2.0)
    assert found.required_rank(1.0) == 0.0
    assert found.required_rank(0.0) == 4.0
    assert found.share_allowed(0.1, eps=0.02) == pytest.approx(0.1 * 0.99**-20)
    assert found.required_rank(0.5, eps=2.0) == 0.0  # eta eps = 1: such directions are learned in one step
    with pytest.raises(ValueError, match="not in \\[0, 1\\]; lower eps"):
        found.required_rank(0.5, eps=3.0)


def test_steps_to_is_the_first() -> None:
    found = linearized_trainability(small_net(), F.mse_loss, regression(outputs=3), learning_rate=0.4, num_steps=60)
    for target in (0.9, 0.5, 0.3):
        steps = int(found.steps_to(target * found.initial_loss).value)
        assert found.loss_after(steps).value <= target * found.initial_loss < found.loss_after(steps - 1).value
    assert found.steps_to(2 * found.initial_loss).value == 0


def test_null_space_is_never_learned() -> None:
    net, data = linear(), regression()  # 24 samples, 6 weights for each output
    for options in METHODS:
        found = linearized_trainability(net, F.mse_loss, data, learning_rate=0.3, num_steps=10, **options)
        x = torch.cat([data[0], torch.ones(24, 1, dtype=torch.float64)], dim=1)
        left = data[1] - x @ torch.linalg.lstsq(x, data[1]).solution
        floor = float(left.square().mean())
        assert found.steps_to(0.99 * floor).value == math.inf
        assert found.loss_after(10**6).value == pytest.approx(floor, rel=1e-9)


# Degenerate cases and refusals


@pytest.mark.parametrize("options", METHODS)
def test_degenerate_networks(options: dict[str, Any]) -> None:
    net, (x, y) = linear(), regression()
    fitted = linearized_trainability(net, F.mse_loss, (x, net(x).detach()), learning_rate=0.1, num_steps=3, **options)
    assert fitted.final_loss.value == fitted.initial_loss == 0.0
    assert fitted.steps_to(0.0).value == 0
    dead = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    nn.init.constant_(dead[0].bias, -1e3)
    stuck = linearized_trainability(dead, F.mse_loss, (x, y), learning_rate=0.1, num_steps=3, **options)
    assert stuck.final_loss.value == pytest.approx(float(y.square().mean()))
    assert stuck.steps_to(0.5 * stuck.initial_loss).value == math.inf
    one = linearized_trainability(net, F.mse_loss, (x[:1], y[:1]), learning_rate=0.1, num_steps=3, **options)
    assert one.final_loss.value == pytest.approx(descend(net, F.mse_loss, (x[:1], y[:1]), 0.1, 3)[3], rel=1e-12)


@pytest.mark.parametrize("options", METHODS)
def test_a_divergent_learning_rate_is_refused(options: dict[str, Any]) -> None:
    net, data = linear(), regression()
    top = float(linearized_trainability(net, F.mse_loss, data, learning_rate=1e-3, num_steps=1).nodes[-1])
    linearized_trainability(net, F.mse_loss, data, learning_rate=1.99 / top, num_steps=5, **options)
    with pytest.raises(MeasurementError, match=f"diverges. Pass learning_rate < {2 / top:.3g}"):
        linearized_trainability(net, F.mse_loss, data, learning_rate=2.01 / top, num_steps=5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0, expected a positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan, expected a positive"),
        ({"num_steps": 0}, "num_steps=0, expected at least 1"),
        ({"kernel": "fisher"}, "kernel='fisher', expected one of"),
        ({"method": "dense"}, "method='dense', expected one of"),
        ({"lanczos_steps": 0}, "lanczos_steps=0, expected at least 1"),
    ],
)
def test_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearized_trainability(linear(), F.mse_loss, regression(), **{"learning_rate": 0.1, "num_steps": 1} | options)


def test_questions_are_refused() -> None:
    found = linearized_trainability(linear(), F.mse_loss, regression(), learning_rate=0.1, num_steps=3)
    with pytest.raises(ValueError, match="steps=-1, expected at least 0"):
        found.loss_after(-1)
    with pytest.raises(ValueError, match=r"target=-1\.0, expected a loss"):
        found.steps_to(-1.0)


def test_unequal_batches_of_a_summed_loss_are_one_loss() -> None:
    net, (x, y) = linear(), regression()
    truth = descend(net, nn.MSELoss(reduction="sum"), (x, y), 0.005, 10)[10]
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = linearized_trainability(net, nn.MSELoss(reduction="sum"), parts, learning_rate=0.005, num_steps=10)
    assert found.final_loss.value == pytest.approx(truth, rel=1e-12)


def test_batches_of_several_lengths_are_refused() -> None:
    x, parts = torch.randn(2, 4, 5), [torch.zeros(2, 4, 2), torch.zeros(2, 3, 2)]
    with pytest.raises(MeasurementError, match="batches of one length"):
        linearized_trainability(
            linear().float(), F.mse_loss, [(x, parts[0]), (x[:, 1:], parts[1])], learning_rate=1e-3, num_steps=1
        )


def test_a_quadratic_model_without_a_minimum_is_refused() -> None:
    net, (x, y) = small_net(), regression(outputs=3)
    about: dict[str, Any] = {"learning_rate": 1e-3, "num_steps": 1, "kernel": "ggn"}
    with pytest.raises(MeasurementError, match=r"no minimum. Pass kernel='ntk'"):
        linearized_trainability(net, nn.HuberLoss(delta=0.1), (x, y), **about)
    with torch.no_grad():
        net[2].bias[0] = 2e3  # the probabilities of the other classes are exactly zero
    labels = torch.ones(24, dtype=torch.long)
    with pytest.raises(MeasurementError, match=r"no minimum. Pass kernel='ntk'"):
        linearized_trainability(net, F.cross_entropy, (x, labels), **about)
    fitted = linearized_trainability(net, F.cross_entropy, (x, 0 * labels), **about)
    assert fitted.final_loss.value == fitted.offset == 0.0


def test_one_class_has_nothing_to_learn() -> None:
    net, (x, _) = linear(outputs=1), regression()
    found = linearized_trainability(
        net, F.cross_entropy, (x, torch.zeros(24, dtype=torch.long)), learning_rate=1.0, num_steps=5, kernel="ggn"
    )
    assert (found.num_rows, found.final_loss.value, found.offset) == (0, 0.0, 0.0)


def test_nan_is_a_measurement_error() -> None:
    x, y = regression()
    x[0] = torch.nan
    with pytest.raises(MeasurementError, match="nan"):
        linearized_trainability(linear(), F.mse_loss, (x, y), learning_rate=0.1, num_steps=1)


@pytest.mark.parametrize("kernel", ["ntk", "ggn"])
@pytest.mark.parametrize("options", METHODS)
def test_module_is_left_as_it_was(options: dict[str, Any], kernel: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)).double()
    before, state = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    linearized_trainability(net, F.mse_loss, regression(), learning_rate=0.1, num_steps=3, kernel=kernel, **options)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in net.modules())
