"""Continual backpropagation: recorded runs of the authors' code, the formulas by hand, and what a reset must leave."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_plasticity.interventions import ContinualBackpropEngine, UnitResets, unit_reset
from lightning_plasticity.interventions.activations import joined
from lightning_plasticity.nn import Wiring, find_wiring

Vectors = Callable[[str], dict[str, np.ndarray]]


def wired(net: nn.Module, x: Tensor) -> Wiring:
    return find_wiring(net, lambda: net(x))


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(sizes):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


# ---- the authors' runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("utility", ["contribution", "adaptable"])
def test_reference_trace(utility: Any, vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = vectors(f"cbp_trace_{utility}_sgd")
    config = json.loads(str(trace["config"]))
    values = [torch.from_numpy(trace[f"param_{i}"]) for i in range(6)]
    net = mlp(values[0].shape[1], *(bias.shape[0] for bias in values[1::2]))
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(value)
    x, y = torch.from_numpy(trace["x"]), torch.from_numpy(trace["y"])
    draws = list(trace["new_input_weights"])
    monkeypatch.setattr(
        unit_reset, "fresh_rows", lambda layer, *_: torch.from_numpy(draws.pop(0)[: layer.in_features])[None]
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
    engine = ContinualBackpropEngine(
        net,
        wired(net, x[:1]),
        [optimizer],
        replacement_rate=config["replacement_rate"],
        maturity=config["maturity_threshold"],
        decay=config["decay_rate"],
        utility=utility,
        correct_bias=False,  # the released code does not
    )
    names, size, replaced = list(engine.wiring.layers), config["minibatch"], []
    for step in range(config["steps"]):
        batch = slice(step * size, (step + 1) * size)
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        assert float(loss.detach()) == pytest.approx(trace["loss"][step], abs=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = engine.step()
        replaced += [[step, names.index(name), int(unit)] for name, units in done.items() for unit in units]
        for index, name in enumerate(names):
            own = engine.statistics(name)
            kept = torch.ones(len(own["age"]), dtype=torch.bool)
            kept[done.get(name, torch.zeros(0, dtype=torch.long))] = False  # recorded before they were cleared
            for mine, theirs in (
                ("utility", "util"),
                ("mean_activation", "mean_feature_act"),
                ("age", "ages"),
                ("corrected_utility", "bias_corrected_util"),
            ):
                expected = torch.from_numpy(trace[theirs][step, index]).double()
                where = kept if mine == "corrected_utility" else torch.ones_like(kept)
                torch.testing.assert_close(own[mine][where], expected[where], rtol=0, atol=1e-10)
        if step in trace["flat_steps"]:
            flat = torch.from_numpy(trace["flat"][list(trace["flat_steps"]).index(step)])
            torch.testing.assert_close(parameters_to_vector(net.parameters()).detach(), flat, rtol=0, atol=1e-10)
    assert replaced == trace["replaced"].tolist()
    assert draws == []
    assert sum(engine.num_reset.values()) == len(replaced)


# ---- utilities by hand ---------------------------------------------------------------------------------------------


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2)
    ).double()


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable"])
def test_utility_of_channels(utility: Any) -> None:
    torch.manual_seed(0)
    net, x = convnet(), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    engine = ContinualBackpropEngine(net, wired(net, x), decay=0.9, utility=utility, replacement_rate=0.0)
    expected, mean = torch.zeros(4).double(), torch.zeros(4).double()
    for step in range(1, 4):
        batch = torch.randn(6, 2, 5, 5, dtype=torch.float64)
        for part in batch.split(2):  # as with gradient accumulation
            net(part)
        engine.step()
        h = torch.tanh(net[0](batch)).detach()
        mean = 0.9 * mean + 0.1 * h.mean((0, 2, 3))
        if utility != "contribution":
            h = h - (mean / (1 - 0.9**step)).reshape(1, 4, 1, 1)
        new = h.abs().mean((0, 2, 3)) * net[2].weight.abs().mean((0, 2, 3))
        if utility == "adaptable":
            new = new / net[0].weight.abs().mean((1, 2, 3))
        expected = 0.9 * expected + 0.1 * new.detach()
        own = engine.statistics("0")
        torch.testing.assert_close(own["utility"], expected)
        torch.testing.assert_close(own["corrected_utility"], expected / (1 - 0.9**step))
        torch.testing.assert_close(own["mean_activation"], mean)


def test_utility_of_a_channel_that_a_linear_reads_in_a_block() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5)).double()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    engine = ContinualBackpropEngine(net, wired(net, x), decay=0.0)
    net(x)
    engine.step()
    h = torch.relu(net[0](x))
    expected = h.abs().mean((0, 2, 3)) * net[3].weight.abs().mean(0).reshape(3, 16).mean(1)
    torch.testing.assert_close(engine.statistics("0")["utility"], expected.detach())


class TwoReaders(nn.Module):
    """Two weights read one hidden layer, each through a nonlinearity of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.one(torch.relu(h)).sum(1) + self.two(torch.sigmoid(h)).sum(1)


def test_utility_of_a_unit_with_two_readers_is_the_mean_over_outgoing_weights() -> None:
    torch.manual_seed(0)
    net, x = TwoReaders().double(), torch.randn(6, 4, dtype=torch.float64)
    engine = ContinualBackpropEngine(net, wired(net, x), decay=0.0)
    net(x)
    engine.step()
    h = net.first(x)
    flows = [torch.relu(h).mean(0) * net.one.weight.abs(), torch.sigmoid(h).mean(0) * net.two.weight.abs()]
    torch.testing.assert_close(engine.statistics("first")["utility"], torch.cat(flows).mean(0).detach())


# ---- what a reset leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_reset_takes_the_unit_out_and_nothing_else(optimizer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.LayerNorm(6), nn.Tanh(),
        nn.Linear(6, 3),
    ).double()  # fmt: skip
    x = torch.randn(7, 2, 5, 5, dtype=torch.float64)
    kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.1)}
    own = kinds[optimizer](net.parameters())
    for _ in range(3):
        own.zero_grad()
        net(x).square().sum().backward()
        own.step()
    wiring = wired(net, x)
    resets = UnitResets(net, wiring, [own])
    net.eval()
    with torch.no_grad():  # what the network computes with the activation of channel 2 set to zero
        h = torch.relu(net[1](net[0](x)))
        h[:, 2] = 0.0
        expected = net[4:](h.flatten(1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    new = resets.reset("0", torch.tensor([2]))
    torch.testing.assert_close(net(x), expected)
    assert torch.equal(net[0].weight[2], new[0])
    assert float(new.abs().max()) <= 1 / 18**0.5
    assert net[0].bias[2] == 0
    assert [v[2].item() for v in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var)] == [1, 0, 0, 1]
    assert (net[4].weight[:, 18:27] == 0).all()
    changed = {name: (value != before[name]) for name, value in net.state_dict().items()}
    assert changed["0.weight"].flatten(1).any(1).nonzero().tolist() == [[2]]
    assert changed["4.weight"].any(0).nonzero().reshape(-1).tolist() == list(range(18, 27))
    assert {name for name, value in changed.items() if value.any()} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "4.weight",
    }  # fmt: skip
    for parameter, gone in ((net[0].weight, 2), (net[0].bias, 2), (net[1].weight, 2), (net[4].weight.T, slice(18, 27))):
        key = net[4].weight if parameter.ndim == 2 else parameter
        for value in own.state[key].values():
            if torch.is_tensor(value) and value.shape == key.shape:
                view = value.T if parameter.ndim == 2 else value
                assert (view[gone] == 0).all()
                assert int((value != 0).sum()) > 0


def test_following_biases_take_over_the_mean() -> None:
    """Units that are constant on the data can be re-drawn without any change of the function."""
    torch.manual_seed(0)
    net, x = mlp(4, 6, 5, 2), torch.rand(9, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer, unit, value in ((net[0], 1, 0.7), (net[0], 4, 1.9), (net[2], 3, 0.4)):
            layer.weight[unit] = 0.0
            layer.bias[unit] = value
    engine = ContinualBackpropEngine(net, wired(net, x), maturity=0, decay=0.5, replacement_rate=0.0)
    before = net(x).detach()
    engine.step()
    for name, units in (("0", [1, 4]), ("2", [3])):
        engine._replace({name: torch.tensor(units)})
        torch.testing.assert_close(net(x).detach(), before, rtol=1e-12, atol=1e-12)
    conv = convnet()
    conv[0] = nn.Conv2d(2, 4, 3).double()
    with torch.no_grad():
        conv[0].weight[1] = 0.0
    images = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    engine = ContinualBackpropEngine(conv, wired(conv, images), maturity=0, decay=0.5)
    before = conv(images).detach()
    engine.step()
    engine._replace({"0": torch.tensor([1])})
    torch.testing.assert_close(conv(images).detach(), before, rtol=1e-12, atol=1e-12)


def test_the_draws_follow_the_layers_own_distribution() -> None:
    net, x = mlp(30, 400, 2), torch.randn(3, 30, dtype=torch.float64)
    resets = UnitResets(net, wired(net, x))
    rows = resets.reset("0", torch.arange(400))
    bound = 1 / 30**0.5
    assert float(rows.abs().max()) <= bound
    assert float(rows.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    kaiming = UnitResets(net, wired(net, x), init="kaiming", gain=1.0).reset("0", torch.arange(400))
    assert float(kaiming.std()) == pytest.approx(1 / 30**0.5, rel=0.02)

    class Own(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight, 5.0, 0.1)

    net[0] = Own(30, 400).double()
    state = torch.get_rng_state()
    rows = UnitResets(net, wired(net, x)).reset("0", torch.arange(10))
    assert float(rows.mean()) == pytest.approx(5.0, abs=0.05)
    assert torch.equal(torch.get_rng_state(), state)


# ---- which units, and when -----------------------------------------------------------------------------------------


def engine_of(**options: Any) -> tuple[nn.Sequential, ContinualBackpropEngine]:
    torch.manual_seed(0)
    net, x = mlp(4, 6, 5, 2), torch.rand(9, 4, dtype=torch.float64)
    return net, ContinualBackpropEngine(net, wired(net, x), **options)


def test_units_are_due_at_the_rate_and_the_least_useful_go_first() -> None:
    net, engine = engine_of(replacement_rate=0.25, maturity=3, decay=0.9)
    ages, due = {"0": [0] * 6, "2": [0] * 5}, {"0": 0.0, "2": 0.0}
    for _ in range(40):
        net(torch.rand(9, 4, dtype=torch.float64))
        done = engine.step()
        for name, own in ages.items():
            own[:] = [age + 1 for age in own]
            due[name] += 0.25 * sum(age > 3 for age in own)
            units = done.get(name, torch.zeros(0)).tolist()
            assert len(units) == int(due[name])
            due[name] -= len(units)
            assert all(own[unit] > 3 for unit in units)
            for unit in units:
                own[unit] = 0
            assert engine.statistics(name)["age"].tolist() == own
    assert min(engine.num_reset.values()) > 20
    fresh_net, fresh = engine_of(maturity=0, decay=0.0, replacement_rate=0.34)
    x = torch.rand(9, 4, dtype=torch.float64)
    use = torch.relu(fresh_net[0](x)).mean(0) * fresh_net[2].weight.abs().mean(0)
    fresh_net(x)
    assert set(fresh.step()["0"].tolist()) == set(use.argsort()[:2].tolist())


def test_replace_lowest_acts_on_demand_and_spares_the_young() -> None:
    net, engine = engine_of(replacement_rate=0.0, maturity=1)
    net(torch.rand(9, 4, dtype=torch.float64))
    engine.step()
    assert engine.replace_lowest(0.5) == {}
    net(torch.rand(9, 4, dtype=torch.float64))
    engine.step()
    assert {name: len(units) for name, units in engine.replace_lowest(0.4).items()} == {"0": 3, "2": 2}


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable"])
def test_degenerate_networks(utility: Any) -> None:
    net, engine = engine_of(replacement_rate=1.0, maturity=0, utility=utility)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    net(torch.rand(1, 4, dtype=torch.float64))
    assert {name: len(units) for name, units in engine.step().items()} == {"0": 6, "2": 5}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters())
    net(torch.full((1, 4), torch.nan, dtype=torch.float64))
    assert engine.step() == {}


def test_only_training_passes_count() -> None:
    net, engine = engine_of(replacement_rate=0.0)
    with torch.no_grad():
        net(torch.rand(9, 4, dtype=torch.float64))
    assert engine.step() == {}
    assert engine.statistics("0")["age"].max() == 0
    engine.close()
    net(torch.rand(9, 4, dtype=torch.float64))
    engine.step()
    assert engine.statistics("0")["age"].max() == 0


def test_processes_add_up() -> None:
    """Two halves of a batch, joined by the reduction, give what the whole gives."""
    torch.manual_seed(0)
    x = torch.rand(8, 4, dtype=torch.float64)
    sums = []
    for part in (x, x[:3], x[3:]):
        net, engine = engine_of()
        net(part)
        sums.append(engine.activations.take())
    whole, left, right = sums
    other = torch.cat(list(right.values()), 1)
    both = joined(left, engine.wiring, lambda tensor: tensor + other)
    nobody = joined({}, engine.wiring, lambda tensor: tensor)
    one_only = joined({}, engine.wiring, lambda tensor: tensor + other)
    assert nobody is None
    assert both is not None
    assert one_only is not None
    for key, expected in whole.items():
        torch.testing.assert_close(both[key][:3], expected[:3])
        torch.testing.assert_close(one_only[key], right[key])
