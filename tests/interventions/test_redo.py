"""ReDo: which units are dormant, over which minibatches, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.interventions import ReDoEngine
from lightning_plasticity.linalg.units import dormant_units
from lightning_plasticity.nn import find_wiring


def made(**options: Any) -> tuple[nn.Sequential, ReDoEngine]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 2)
    ).double()
    with torch.no_grad():
        net[0].bias[[1, 4]] = -9.0  # dead
        net[3].weight[[2, 5, 7]] *= 0.05  # weak
        net[3].bias[[2, 5, 7]] = 0.0
    engine = ReDoEngine(net, find_wiring(net, lambda: net(batch())), **options)
    return net, engine


def batch(size: int = 4) -> Tensor:
    return torch.randn(size, 1, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_dormancy_on_the_last_minibatches_is_that_of_their_join(tau: float) -> None:
    net, engine = made(tau=tau, every_n_steps=None, samples=10)
    seen = []
    for _ in range(6):
        seen.append(batch())
        net(seen[-1])
        assert engine.step() == {}
    last = torch.cat(seen[-3:])  # 12 samples: the fewest that hold 10
    maps = torch.relu(net[0](last))
    features = {"0": maps.movedim(1, -1).reshape(-1, 6), "3": torch.relu(net[3](maps.flatten(1)))}
    for name, value in features.items():
        expected = dormant_units(value, tau).nonzero().reshape(-1)
        assert torch.equal(engine.dormant()[name], expected)
        assert len(expected) >= 1 or name == "3"


def test_it_acts_every_n_steps_and_only_on_dormant_units() -> None:
    net, engine = made(tau=0.2, every_n_steps=3, samples=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(1, 7):
        net(batch())
        done = engine.step()
        assert step % 3 == 0 or not done
        assert "0" not in done or step == 3
        if step == 3:
            first = done
    assert engine.num_reset["0"] == 2
    rows = (net[0].weight != before["0.weight"]).flatten(1).any(1).nonzero().reshape(-1)
    assert rows.tolist() == first["0"].tolist() == [1, 4]
    assert (net[0].bias[[1, 4]] == 0).all()
    assert {2, 5, 7} <= set(first["3"].tolist())
    assert (net[5].weight[:, first["3"]] == 0).all()
    columns = torch.cat([torch.arange(4, 8), torch.arange(16, 20)])
    alive = (net[3].weight == before["3.weight"]).any(1)  # others have been drawn anew, columns of dead channels too
    assert int(alive.sum()) > 10
    assert (net[3].weight[alive][:, columns] == 0).all()


def test_a_dead_layer_is_drawn_anew_as_a_whole() -> None:
    net, engine = made(tau=0.0, every_n_steps=1, samples=1)
    with torch.no_grad():
        net[3].bias.fill_(-1e3)
    net(batch(1))
    assert len(engine.step()["3"]) == 30
    assert torch.relu(net[3](torch.relu(net[0](batch())).flatten(1))).sum() > 0


def test_values_that_are_not_finite_make_no_unit_dormant() -> None:
    net, engine = made(tau=0.5, every_n_steps=1)
    net(batch() * torch.nan)
    assert engine.step() == {}


def test_before_the_first_step_nothing_is_known() -> None:
    _, engine = made()
    assert engine.dormant() == {} == engine.recycle()


def test_several_readers_must_all_find_a_unit_dormant() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.one(torch.relu(h)) + self.two(torch.relu(-h))

    net = Two()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.copy_(torch.tensor([-1.0, 1.0]))
    x = torch.ones(4, 3)
    engine = ReDoEngine(net, find_wiring(net, lambda: net(x)), tau=0.0, every_n_steps=None, samples=1)
    net(x)
    engine.step()
    assert engine.dormant()["first"].tolist() == []
    with torch.no_grad():
        net.first.bias[0] = 0.0
    net(x)
    engine.step()
    assert engine.dormant()["first"].tolist() == [0]
