"""Trainability of plain modules: closed forms of gradient descent, dead and diverging networks, nothing left behind."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from states import changed, state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.trainability import Curve, Trainability, trainability

SGD = partial(torch.optim.SGD, lr=0.1)
GENERATOR = torch.Generator().manual_seed(3)
INPUTS, LABELS = torch.randn(40, 6, generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)
DATA = (INPUTS, LABELS)


def mlp(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


# ---- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "target", "steps"), [(0.25, 0.3, 3), (0.25, 16.0, 0), (0.4, 1e-3, 4), (0.01, 15.0, 2)]
)
def test_steps_to_target_of_a_parabola(rate: float, target: float, steps: int) -> None:
    """L = w^2 from w = 4: w_t = (1 - 2 rate)^t 4."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    net.weight.data.fill_(4.0)
    data = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    sgd = partial(torch.optim.SGD, lr=rate)
    found = trainability(net, F.mse_loss, data, optimizer=sgd, num_steps=6, target="absolute", tau=target, seeds=1)
    expected = [16 * (1 - 2 * rate) ** (2 * t) for t in range(7)]
    assert found.curves[0].losses == pytest.approx(expected, rel=1e-12)
    assert steps == next(t for t, loss in enumerate(expected) if loss <= target)
    estimate = found.steps_to_target
    assert (estimate.value, estimate.lower, estimate.upper) == (steps, steps, steps)
    assert found.reached == 1.0
    assert found.initial_loss.value == 16.0
    assert found.final_loss.value == found.best_loss.value == pytest.approx(expected[-1])
    assert found.area.value == pytest.approx((sum(expected) - (expected[0] + expected[-1]) / 2) / 6)


def test_linear_regression_follows_the_eigenvalues() -> None:
    """Full-batch descent on a least-squares problem, each eigendirection at its own rate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    found = trainability(
        net, F.mse_loss, (x, y), optimizer=SGD, num_steps=30, target="relative", tau=0.01, seeds=2, fresh=False
    )
    values, vectors = torch.linalg.eigh(2 * x.T @ x / 20)
    away = vectors.T @ (net.weight.detach() - torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)).T
    losses = [float((values * ((1 - 0.1 * values) ** (2 * t)) * away[:, 0] ** 2).sum() / 2) for t in range(31)]
    for curve in found.curves:  # one batch is all the data: seeds do not differ
        assert curve.losses == pytest.approx(losses, rel=1e-9)
    assert found.target_loss.value == pytest.approx(0.01 * losses[0])
    assert found.steps_to_target.value == next(t for t, loss in enumerate(losses) if loss <= 0.01 * losses[0])


def test_minibatches_equal_a_loop_by_hand() -> None:
    net, options = mlp(), {"num_steps": 12, "batch_size": 16, "evaluate_every": 5, "seed": 7}
    found = trainability(net, F.cross_entropy, DATA, target="absolute", fresh=False, **options)  # type: ignore[arg-type]
    for number, curve in enumerate(found.curves):
        copy = mlp()
        copy.load_state_dict(net.state_dict())
        optimizer = torch.optim.Adam(copy.parameters())
        order = torch.Generator().manual_seed(7 + number)
        losses, whole = [], {0: float(F.cross_entropy(copy(INPUTS), LABELS).detach())}
        for step in range(12):
            if step % 2 == 0:  # 40 samples are two whole minibatches of 16
                indices = torch.randperm(40, generator=order)
            chosen = indices[16 * (step % 2) : 16 * (step % 2) + 16]
            loss = F.cross_entropy(copy(INPUTS[chosen]), LABELS[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            whole[step + 1] = float(F.cross_entropy(copy(INPUTS), LABELS).detach())
        assert curve.step_losses == tuple(losses)
        assert curve.steps == (0, 5, 10, 12)
        assert curve.losses == tuple(whole[t] for t in curve.steps)
    assert found.curves[0].step_losses != found.curves[1].step_losses


def test_clipping_is_that_of_torch() -> None:
    for clip, function in (((0.05, "norm"), "clip_grad_norm_"), ((0.01, "value"), "clip_grad_value_")):
        found = trainability(
            mlp(), F.cross_entropy, DATA, optimizer=SGD, clip=clip, num_steps=3, seeds=1, target="absolute", fresh=False
        )
        copy = mlp()
        losses = []
        for _ in range(4):
            copy.zero_grad()
            loss = F.cross_entropy(copy(INPUTS), LABELS)
            loss.backward()
            getattr(nn.utils, function)(copy.parameters(), clip[0])
            with torch.no_grad():
                for p in copy.parameters():
                    assert p.grad is not None
                    p.sub_(0.1 * p.grad)
            losses.append(float(loss.detach()))
        assert found.curves[0].losses == pytest.approx(losses, rel=1e-6)


def test_an_optimizer_that_evaluates_the_loss_itself() -> None:
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=5)
    net = mlp()
    found = trainability(
        net, F.cross_entropy, DATA, optimizer=lbfgs, num_steps=3, target="absolute", seeds=1, fresh=False
    )
    optimizer = lbfgs(net.parameters())
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(INPUTS), LABELS)
        loss.backward()
        return loss

    for _ in range(3):
        losses.append(float(F.cross_entropy(net(INPUTS), LABELS).detach()))
        optimizer.step(closure)  # type: ignore[arg-type]
    assert found.curves[0].step_losses == pytest.approx(losses, rel=1e-6)


# ---- fresh networks ------------------------------------------------------------------------------------------------


def test_a_network_that_is_fresh_itself_has_no_gap() -> None:
    net = mlp()
    torch.manual_seed(5)
    for layer in reversed(net):  # as the probe does
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    found = trainability(net, F.cross_entropy, DATA, num_steps=20, batch_size=8, seeds=1, seed=5)
    assert found.curves == found.fresh_curves
    assert found.gap_to_fresh.value == 0.0
    assert found.target_loss.value == pytest.approx(1.1 * found.fresh_best_loss.value)
    assert found.reached == 1.0
    other = trainability(mlp(), F.cross_entropy, DATA, num_steps=40, batch_size=8, seeds=4)
    gap = other.gap_to_fresh
    assert gap.lower < 0.1 * other.fresh_best_loss.value  # fresh networks differ by less than the tolerance, about
    assert abs(gap.value) < 0.15 * other.fresh_best_loss.value


def entropy_of_labels() -> float:
    """The least cross-entropy of outputs that do not depend on the input."""
    shares = torch.bincount(LABELS) / len(LABELS)
    return float(-(shares * shares.log()).sum())


def test_a_dead_network_never_gets_there() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # type: ignore[union-attr,operator]
        net[0].weight.mul_(0.01)  # type: ignore[union-attr,operator]
    found = trainability(net, F.cross_entropy, DATA, optimizer=SGD, num_steps=60, batch_size=20, seeds=2)
    steps = found.steps_to_target
    assert math.isnan(steps.value)
    assert (steps.lower, steps.upper) == (61.0, math.inf)
    assert not steps.resolved
    assert found.reached == 0.0
    assert found.gap_to_fresh.lower > 0
    assert found.best_loss.lower >= entropy_of_labels() - 1e-6  # only the output bias moves


def test_weights_that_are_zero_everywhere() -> None:
    net = mlp()
    for p in net.parameters():
        p.data.zero_()
    found = trainability(net, F.cross_entropy, DATA, optimizer=SGD, num_steps=100, seeds=1)
    assert found.initial_loss.value == pytest.approx(math.log(3))
    assert found.best_loss.value == pytest.approx(entropy_of_labels(), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(bad: float) -> None:
    net = mlp()
    net[2].bias.data[0] = bad  # type: ignore[union-attr,index,operator]
    with pytest.raises(MeasurementError, match=r"loss on the probe data is not finite.*weights and data"):
        trainability(net, F.cross_entropy, DATA)
    with pytest.raises(MeasurementError, match="not finite"):
        trainability(net, F.cross_entropy, DATA, batch_size=8)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_divergence_counts_as_an_infinite_loss(batch_size: int | None) -> None:
    net = nn.Linear(6, 1)
    sgd = partial(torch.optim.SGD, lr=1e9)
    data = (INPUTS, torch.zeros(40, 1))
    found = trainability(
        net,
        F.mse_loss,
        data,
        optimizer=sgd,
        num_steps=50,
        batch_size=batch_size,
        target="absolute",
        tau=0.0,
        fresh=False,
    )
    assert found.final_loss.value == math.inf
    assert found.area.value == math.inf
    assert found.best_loss.value == found.initial_loss.value
    assert math.isnan(found.steps_to_target.value)


def test_a_batch_of_one() -> None:
    data = (INPUTS[:1], LABELS[:1])
    found = trainability(mlp(), F.cross_entropy, data, optimizer=SGD, num_steps=100, batch_size=16, target="relative")
    assert found.num_samples == 1
    assert found.reached == 1.0


def test_batches_that_cannot_be_joined_come_as_they_are() -> None:
    lengths = [(torch.ones(2, 3, 5), torch.zeros(2, 3, 2)), (torch.ones(2, 4, 5), torch.zeros(2, 4, 2))]
    found = trainability(nn.Linear(5, 2), F.mse_loss, lengths, num_steps=5, batch_size=2, shuffle=False)
    assert found.num_samples == 4
    assert len(found.curves[0].step_losses) == 5


# ---- nothing is left behind ----------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.PReLU(), nn.LayerNorm(8), nn.Linear(8, 3)
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        hidden = self.net[:5](x).unsqueeze(1)
        return self.net[5](hidden + self.attention(hidden, hidden, hidden)[0])[:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["as_is", "frozen", "eval"])
def test_everything_is_put_back(mode: Any) -> None:
    net = Everything()
    F.cross_entropy(net(INPUTS), LABELS).backward()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    before, moments = state(net), repr(optimizer.state_dict())
    options: dict[str, Any] = {"optimizer": optimizer, "num_steps": 6, "batch_size": 8, "mode": mode}
    for carry_state in (False, True):
        found = trainability(net, F.cross_entropy, DATA, carry_state=carry_state, **options)
        assert len(found.curves) == len(found.fresh_curves) == 2
    assert changed(before, state(net)) == []
    assert moments == repr(optimizer.state_dict())
    again = trainability(net, F.cross_entropy, DATA, **options)
    first = trainability(net, F.cross_entropy, DATA, **options)
    assert again.curves == first.curves
    assert again.fresh_curves == first.fresh_curves


def test_a_carried_state_is_that_of_going_on() -> None:
    net = mlp()
    optimizer = torch.optim.Adam(
        [{"params": net[0].parameters(), "lr": 0.03}, {"params": net[2].parameters()}], lr=0.01
    )

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = F.cross_entropy(net(INPUTS), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    train(10)
    options: dict[str, Any] = {"num_steps": 8, "seeds": 1, "target": "absolute", "fresh": False}
    carried = trainability(net, F.cross_entropy, DATA, optimizer=optimizer, carry_state=True, **options)
    fresh = trainability(net, F.cross_entropy, DATA, optimizer=optimizer, **options)
    assert carried.curves[0].step_losses == tuple(train(8))
    assert fresh.curves[0].step_losses != carried.curves[0].step_losses


def test_an_optimizer_inside_another_is_refused() -> None:
    class Lookahead(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.base = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)

    net = mlp()
    with pytest.raises(MeasurementError, match=r"Lookahead holds another optimizer \(base\).*pass optimizer="):
        trainability(net, F.cross_entropy, DATA, optimizer=Lookahead(net.parameters()))


# ---- budget and settings -------------------------------------------------------------------------------------------


def test_a_short_time_cuts_the_steps_of_all_runs_alike() -> None:
    found = trainability(mlp(), F.cross_entropy, DATA, num_steps=10**6, batch_size=8, max_seconds=0.2)
    assert 1 <= found.num_steps < 10**5
    assert {len(curve.step_losses) for curve in found.curves + found.fresh_curves} == {found.num_steps}
    assert found.settings["budget"] == f"{found.num_steps} of 1000000 steps, to keep to 0.2 seconds"
    assert found.seconds < 10
    whole = trainability(mlp(), F.cross_entropy, DATA, num_steps=3, max_seconds=100.0)
    assert whole.num_steps == 3
    assert "budget" not in whole.settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"target": "best"}, "target='best', expected one of"),
        ({"tau": -1.0}, "tau=-1.0"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"fresh": False}, "target='fresh' needs fresh runs"),
        ({"fresh": "new"}, "fresh='new', expected a function"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trainability(mlp(), F.cross_entropy, DATA, **settings)


def test_lazy_modules_and_frozen_ones_are_told() -> None:
    with pytest.raises(MeasurementError, match=r"0\.weight, 0\.bias are not initialised yet"):
        trainability(nn.Sequential(nn.LazyLinear(3)), F.cross_entropy, DATA)
    with pytest.raises(MeasurementError, match="no trainable parameter"):
        trainability(mlp().requires_grad_(False), F.cross_entropy, DATA)


# ---- the result ----------------------------------------------------------------------------------------------------


def result(*curves: Curve, target: Any = "absolute", tau: float = 1.0, fresh: tuple[Curve, ...] = ()) -> Trainability:
    return Trainability(curves, fresh, target, tau, num_steps=10, num_samples=1)


def test_steps_are_known_to_the_grid_of_evaluations_and_summed_up_by_their_median() -> None:
    fast, slow, never = (Curve((0, 5, 10), losses) for losses in ((3.0, 0.9, 2.0), (3.0, 2.0, 1.0), (3.0, 2.0, 1.1)))
    steps = result(fast).steps_to_target
    assert (steps.value, steps.lower, steps.upper) == (5.0, 1.0, 5.0)
    steps = result(fast, slow, never).steps_to_target
    assert (steps.value, steps.lower, steps.upper) == (10.0, 1.0, math.inf)
    assert result(fast, slow, never).reached == pytest.approx(2 / 3)
    steps = result(fast, never).steps_to_target
    assert math.isnan(steps.value)
    assert (steps.lower, steps.upper) == (1.0, math.inf)
    assert result(fast, slow).best_loss.value == pytest.approx(0.95)
    assert (result(fast, slow).best_loss.lower, result(fast, slow).best_loss.upper) == (0.9, 1.0)


def test_targets_where_losses_are_negative() -> None:
    old, new = Curve((0, 1), (-1.0, -2.0)), Curve((0, 1), (0.0, -2.1))
    assert result(old, target="fresh", tau=0.1, fresh=(new,)).target_loss.value == pytest.approx(-1.89)
    with pytest.raises(MeasurementError, match="loss starts at -1, of which no share is a target"):
        _ = result(old, target="relative").target_loss
    with pytest.raises(MeasurementError, match="no runs from fresh"):
        _ = result(old, target="fresh").steps_to_target
