"""The effective-rank regulariser by itself: the separate step, the penalty, degenerate features, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_fits import Net, batches, fit, weights

from lightning_plasticity import EffectiveRank, Regularization
from lightning_plasticity.linalg import effective_rank
from lightning_plasticity.regularization import RegularizationEngine


def mlp(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    return Net().net.to(dtype)


def mean_rank(net: torch.nn.Module, x: torch.Tensor, layers: tuple[int, ...] = (1, 3)) -> torch.Tensor:
    """From PyTorch's own singular values, by the formula of the public training code."""
    ranks = []
    for index, layer in enumerate(net.children()):
        x = layer(x)
        if index in layers:
            p = torch.linalg.svdvals(x.flatten(1))
            p = p / p.sum()
            ranks.append(torch.exp(-(p * torch.log(p + 1e-8)).sum()))
    return torch.stack(ranks).mean()


def inputs(rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_separate_step_is_a_plain_gradient_step_and_raises_the_rank() -> None:
    net, expected, x = mlp(), mlp(), inputs()
    gradients = torch.autograd.grad(mean_rank(expected, x), list(expected.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter += 0.01 * gradient
    before = mean_rank(net, x).item()
    engine = RegularizationEngine([EffectiveRank(0.01)])
    engine.separate_steps(net, [x[:10], x[10:]], net)
    # Both in float64; the features have full rank and no clustered singular values.
    torch.testing.assert_close(weights(net), weights(expected), rtol=1e-10, atol=1e-12)
    assert gradients[-1] is None  # the output layer is not moved
    squared = sum(float(g.square().sum()) for g in gradients if g is not None)
    assert mean_rank(net, x).item() - before == pytest.approx(0.01 * squared, rel=0.1)  # first order in the step


def test_penalty_has_the_gradient_of_loss_minus_strength_times_rank() -> None:
    x, y = inputs(), torch.arange(24) % 3
    net, expected = mlp(), mlp()
    loss = torch.nn.functional.cross_entropy(expected(x), y) - 0.5 * mean_rank(expected, x)
    loss.backward()
    engine = RegularizationEngine([EffectiveRank(0.5, mode="loss", every_n_steps=1)])
    with engine.tapped(net, lambda: net(x)):
        ours = torch.nn.functional.cross_entropy(net(x), y)
        penalty = engine.penalty(net)
    assert penalty is not None
    (ours + penalty).backward()
    torch.testing.assert_close(ours + penalty, loss, rtol=1e-12, atol=0)
    for own, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "mode", "needs_features", "takes_steps"),
    [
        (0.0, "loss", False, False),
        (0.1, "loss", True, False),
        (0.0, "separate", False, False),
        (0.1, "separate", False, True),
    ],
)
def test_work_is_asked_for_only_where_there_is_some(
    strength: float, mode: Any, needs_features: bool, takes_steps: bool
) -> None:
    regularizer = EffectiveRank(strength, mode=mode)
    assert (regularizer.needs_features, regularizer.takes_steps) == (needs_features, takes_steps)


def test_penalty_acts_on_steps_0_n_2n() -> None:
    net, x = mlp(), inputs()
    engine = RegularizationEngine([EffectiveRank(0.5, mode="loss", every_n_steps=3)])
    acted = []
    for _ in range(7):
        with engine.tapped(net, lambda: net(x)):
            net(x)
            acted.append(engine.penalty(net) is not None)
        engine.after_step(net, net)
    assert acted == [True, False, False, True, False, False, True]


def test_separate_step_leaves_the_optimizer_buffers_gradients_and_random_states_alone() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    )
    optimizer = torch.optim.Adam(net.parameters())
    x = inputs().float()
    net(x).square().mean().backward()
    optimizer.step()
    state = {k: v.clone() for p in optimizer.state.values() for k, v in p.items() if isinstance(v, torch.Tensor)}
    buffers = [buffer.clone() for buffer in net.buffers()]
    gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    random, start = torch.random.get_rng_state(), weights(net)

    RegularizationEngine([EffectiveRank(0.1)]).separate_steps(net, [x], net)

    assert not torch.equal(weights(net), start)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True) if p.grad is not None)
    after = {k: v for p in optimizer.state.values() for k, v in p.items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_frozen_parameters_are_not_moved() -> None:
    net, x = mlp(), inputs()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    RegularizationEngine([EffectiveRank(0.1)]).separate_steps(net, [x], net)
    assert torch.equal(net[0].weight, before)
    assert not torch.equal(net[0].bias, mlp()[0].bias)


@pytest.mark.parametrize("mode", ["separate", "loss"])
def test_dead_features_give_no_gradient_and_no_nan(mode: Any) -> None:
    net, plain = Net(), Net()
    for module in (net, plain):
        torch.nn.init.constant_(module.net[0].bias, -100.0)  # every hidden unit of the first layer is dead
        torch.nn.init.constant_(module.net[2].bias, -100.0)  # and of the second
    fit(net, callbacks=[Regularization([EffectiveRank(1.0, every_n_steps=2, mode=mode)])])
    fit(plain)
    assert torch.equal(weights(net), weights(plain))


def test_features_that_are_nan_skip_the_step_with_one_warning() -> None:
    net, x = mlp(), inputs()
    x[0, 0] = float("nan")
    start = weights(net)
    engine = RegularizationEngine([EffectiveRank(0.1)])
    with pytest.warns(UserWarning, match="not finite"):
        engine.separate_steps(net, [x], net)
    engine.separate_steps(net, [x], net)  # a second warning would be an error
    assert torch.equal(weights(net), start)
    engine.separate_steps(net, [inputs()], net)
    assert not torch.equal(weights(net), start)


def test_a_network_without_hidden_layers_is_told_once() -> None:
    net = torch.nn.Linear(4, 3)
    engine = RegularizationEngine([EffectiveRank(0.1)])
    with pytest.warns(UserWarning, match="no hidden layer"):
        engine.separate_steps(net, [torch.ones(5, 4)], net)
    engine.separate_steps(net, [torch.ones(5, 4)], net)  # a second warning would be an error


@pytest.mark.parametrize(
    ("layers", "indices"),
    [(None, (1, 3)), (1, (3,)), (5, (1, 3)), (["1"], (1,)), (("3",), (3,)), (["0"], (0,))],
)
def test_choice_of_layers(layers: Any, indices: tuple[int, ...]) -> None:
    net, x = mlp(), inputs()
    engine = RegularizationEngine([EffectiveRank(0.01, layers=layers)])
    expected = torch.autograd.grad(mean_rank(net, x, indices), net[0].weight)[0]
    before = net[0].weight.detach().clone()
    engine.separate_steps(net, [x], net)
    torch.testing.assert_close(net[0].weight.detach() - before, 0.01 * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("conv", ["positions", "flatten"])
def test_convolutional_features(conv: Any, dims: int) -> None:
    layer = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[dims]
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(layer(2, 3, 3), torch.nn.ReLU(), layer(3, 2, 2)).double()
    x = torch.randn(5, 2, *[6] * dims, generator=generator, dtype=torch.float64)
    hidden = net[1](net[0](x))
    matrix = hidden.flatten(1) if conv == "flatten" else hidden.transpose(0, 1).flatten(1).T  # rows: samples, positions
    expected = torch.autograd.grad(effective_rank(matrix, log_offset=1e-8), net[0].weight)[0]
    before = net[0].weight.detach().clone()
    RegularizationEngine([EffectiveRank(0.01, conv=conv)]).separate_steps(net, [x], net)
    torch.testing.assert_close(net[0].weight.detach() - before, 0.01 * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [["net.1", "nets.*"], ["net.9"]])
@pytest.mark.parametrize("mode", ["separate", "loss"])
def test_unknown_layers_are_refused_before_training_with_those_that_exist(layers: list[str], mode: Any) -> None:
    net = Net()
    start = weights(net)
    with pytest.raises(ValueError, match=r"matches no layer of Net.*net\.0, net\.1, net\.2, net\.3, net\.4"):
        fit(net, callbacks=[Regularization([EffectiveRank(0.1, layers=layers, mode=mode)])])
    assert torch.equal(weights(net), start)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0, expected a whole number >= 1"),
        ({"every_n_steps": -3}, ValueError, "every_n_steps=-3"),
        ({"every_n_steps": 2.0}, ValueError, "every_n_steps=2.0"),
        ({"every_n_steps": True}, ValueError, "every_n_steps=True"),
        ({"mode": "sep"}, ValueError, "mode='sep', expected 'separate'"),
        ({"mode": None}, ValueError, "mode=None"),
        ({"conv": "flat"}, ValueError, "conv='flat', expected 'positions' or 'flatten'"),
        ({"layers": "net.1"}, TypeError, r"write layers=\['net.1'\]"),
        ({"layers": 0}, ValueError, "layers=0"),
        ({"layers": -1}, ValueError, "layers=-1"),
        ({"layers": []}, ValueError, r"layers=\[\]"),
        ({"layers": True}, TypeError, "layers=True"),
        ({"layers": 1.0}, TypeError, "layers=1.0"),
        ({"layers": ["a", 1]}, TypeError, "expected a list of names"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EffectiveRank(**options)


def test_what_is_no_regularizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Got 0\.1 among the regularizers, expected instances"):
        Regularization([0.1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected instances"):
        Regularization([EffectiveRank])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="regularizers is empty"):
        Regularization([])


def test_one_rank_step_sees_the_minibatches_as_one() -> None:
    """The rank of the joined batch is not the mean of the ranks: the samples are put together first."""
    together, apart = mlp(), mlp()
    rows = [next(iter(batch)).double() for batch in batches(count=3)]
    RegularizationEngine([EffectiveRank(0.01)]).separate_steps(together, rows, together)
    RegularizationEngine([EffectiveRank(0.01)]).separate_steps(apart, [torch.cat(rows)], apart)
    torch.testing.assert_close(weights(together), weights(apart), rtol=1e-12, atol=1e-14)
