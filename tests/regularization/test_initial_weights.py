"""L2Init and Wasserstein: closed forms, which weights are held, and for how long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plasticity import L2Init, Wasserstein
from lightning_plasticity.regularization import RegularizationEngine

BOTH = pytest.mark.parametrize("kind", [L2Init, Wasserstein])


def linear(*weights: float) -> nn.Linear:
    net = nn.Linear(len(weights), 1, bias=False)
    net.weight.data.copy_(torch.tensor([weights]))
    return net


def penalty_and_gradient(engine: RegularizationEngine, net: nn.Module) -> tuple[float, list[float]]:
    net.zero_grad()
    penalty = engine.penalty(net)
    assert penalty is not None
    penalty.backward()
    return penalty.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).tolist()


def moved(kind: Any, before: list[float], after: list[float]) -> tuple[float, list[float]]:
    net, engine = linear(*before), RegularizationEngine([kind(0.5)])
    engine.hold_initial_weights(net)
    net.weight.data.copy_(torch.tensor([after]))
    return penalty_and_gradient(engine, net)


def test_l2_init_by_hand() -> None:
    # 0.5 * (1 + 4 + 0), gradient 2 * 0.5 * difference.
    assert moved(L2Init, [1.0, 2.0, 3.0], [2.0, 0.0, 3.0]) == (2.5, [1.0, -2.0, 0.0])


def test_wasserstein_by_hand() -> None:
    # Sorted: (1, 2, 3) and (0, 2, 7): 0.5 * (1 + 0 + 16); 7 pairs with 3, 0 with 1, wherever they are.
    assert moved(Wasserstein, [3.0, 1.0, 2.0], [0.0, 7.0, 2.0]) == (8.5, [-1.0, 4.0, 0.0])
    assert moved(Wasserstein, [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == (0.0, [0.0, 0.0, 0.0])


@given(st.lists(st.tuples(*[st.floats(-5, 5, width=32)] * 2), min_size=1, max_size=6))
def test_wasserstein_is_the_least_l2_init_over_all_orders(pairs: list[tuple[float, float]]) -> None:
    from itertools import permutations

    before, after = [p[0] for p in pairs], [p[1] for p in pairs]
    found = moved(Wasserstein, before, after)[0]
    least = min(sum((a - b) ** 2 for a, b in zip(before, order, strict=True)) for order in permutations(after)) / 2
    assert found == pytest.approx(least, rel=1e-5, abs=1e-5)
    assert found <= moved(L2Init, before, after)[0] * (1 + 1e-5) + 1e-12


@BOTH
def test_each_tensor_is_sorted_for_itself_and_penalties_add_up(kind: Any) -> None:
    net, engine = nn.Sequential(linear(1.0, 2.0), nn.Linear(1, 1)), RegularizationEngine([kind(1.0), kind(0.5)])
    engine.hold_initial_weights(net)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    expected = 1.5 * sum(float((p.detach() - b).square().sum()) for p, b in zip(net.parameters(), before, strict=True))
    assert penalty_and_gradient(engine, net)[0] == pytest.approx(expected)  # a shift keeps the order


@BOTH
def test_the_first_penalty_takes_the_weights_when_nobody_has(kind: Any) -> None:
    net, engine = linear(1.0, 2.0), RegularizationEngine([kind(1.0)])
    assert penalty_and_gradient(engine, net) == (0.0, [0.0, 0.0])
    net.weight.data.add_(1.0)
    assert penalty_and_gradient(engine, net)[0] == 2.0
    engine.initial_weights.clear()
    assert penalty_and_gradient(engine, net)[0] == 0.0


@BOTH
def test_new_regularisers_of_a_later_fit_go_on_with_the_same_weights(kind: Any) -> None:
    net, engine = linear(1.0), RegularizationEngine([kind(1.0)])
    engine.hold_initial_weights(net)
    net.weight.data.add_(3.0)
    engine.begin_fit(net, [kind(2.0)])
    engine.hold_initial_weights(net)
    assert penalty_and_gradient(engine, net)[0] == 18.0
    other = RegularizationEngine([kind(2.0)])
    other.load_state_dict(engine.state_dict())
    assert penalty_and_gradient(other, net)[0] == 18.0
    other.load_state_dict({"num_steps": 0, "window": []})  # of version 0.1
    assert penalty_and_gradient(other, net)[0] == 0.0


@BOTH
def test_a_parameter_of_another_shape_is_refused(kind: Any) -> None:
    net, engine = nn.Sequential(linear(1.0, 2.0), nn.Linear(1, 2)), RegularizationEngine([kind(1.0)])
    engine.hold_initial_weights(net)
    net[1] = nn.Linear(1, 3)
    with pytest.raises(ValueError, match=rf"1\.weight has shape \(3, 1\).*{kind.__name__} holds, has \(2, 1\).*params"):
        engine.hold_initial_weights(net)
    with pytest.raises(ValueError, match=r"1\.weight has shape"):
        engine.penalty(net)
    engine.begin_fit(net, [kind(1.0, params=["0.*"])])
    engine.hold_initial_weights(net)
    assert penalty_and_gradient(engine, net)[0] == 0.0


@BOTH
def test_layers_added_later_are_held_from_then_on(kind: Any) -> None:
    net, engine = nn.Sequential(linear(1.0)), RegularizationEngine([kind(1.0)])
    engine.hold_initial_weights(net)
    net.append(linear(5.0))
    engine.hold_initial_weights(net)
    for layer in net:
        layer.weight.data.add_(2.0)  # type: ignore[operator,union-attr]
    assert penalty_and_gradient(engine, net)[0] == 8.0


@BOTH
def test_lazy_parameters_are_taken_as_soon_as_they_exist(kind: Any) -> None:
    net, engine = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1)), RegularizationEngine([kind(1.0)])
    engine.hold_initial_weights(net)
    net(torch.ones(1, 3))
    first = penalty_and_gradient(engine, net)
    assert first == (0.0, [0.0] * 11)
    net[0].weight.data.add_(1.0)  # type: ignore[operator,union-attr]
    assert penalty_and_gradient(engine, net)[0] == pytest.approx(6.0)


@BOTH
def test_frozen_parameters_are_left_alone_and_parameters_are_chosen_by_name(kind: Any) -> None:
    net = nn.Sequential(linear(1.0), linear(1.0), linear(1.0))
    net[1].requires_grad_(False)
    engine = RegularizationEngine([kind(1.0, params=["0.*", "1.*"])])
    engine.hold_initial_weights(net)
    for layer in net:
        layer.weight.data.add_(1.0)  # type: ignore[operator,union-attr]
    assert penalty_and_gradient(engine, net) == (1.0, [2.0])
    with pytest.raises(ValueError, match=r"params=\['head\.\*'\] match no parameter; those that exist: 0\.weight, 1"):
        engine.begin_fit(net, [kind(1.0, params=["head.*", "0.*"])])


@BOTH
@pytest.mark.parametrize("params", ["net.*", 3, [1]])
def test_choices_of_parameters_that_are_none_are_refused(kind: Any, params: Any) -> None:
    with pytest.raises(TypeError, match=r"params=.*expected a list of names"):
        kind(params=params)
    with pytest.raises(ValueError, match=r"params is empty"):
        kind(params=[])


@BOTH
def test_strength_zero_holds_nothing(kind: Any) -> None:
    net, engine = linear(1.0), RegularizationEngine([kind(0.0)])
    engine.hold_initial_weights(net)
    assert engine.penalty(net) is None
    assert engine.state_dict()["initial_weights"] == {}


@BOTH
def test_tied_weights_count_once_and_compiled_modules_keep_their_names(kind: Any) -> None:
    net, engine = nn.Sequential(linear(1.0), linear(1.0)), RegularizationEngine([kind(1.0)])
    net[1].weight = net[0].weight
    engine.hold_initial_weights(net)
    net[0].weight.data.add_(1.0)  # type: ignore[operator,union-attr]
    assert engine.penalty(net).item() == 1.0  # type: ignore[union-attr]
    wrapped = nn.Module()
    wrapped._orig_mod = net  # what torch.compile makes of names
    assert engine.penalty(wrapped).item() == 1.0  # type: ignore[union-attr]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_compared_in_float32(kind: Any, dtype: torch.dtype) -> None:
    net, engine = nn.Linear(100, 1, bias=False).to(dtype), RegularizationEngine([kind(1.0)])
    net.weight.data.fill_(1.0)
    engine.hold_initial_weights(net)
    net.weight.data.fill_(40.0)
    penalty = engine.penalty(net)
    assert isinstance(penalty, Tensor)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 100 * 39**2  # beyond float16
