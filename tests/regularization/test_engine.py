"""Which minibatches a separate step is taken on, and what it does with batches of every shape."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from small_fits import Net, batches, fit, weights
from torch import Tensor, nn

from lightning_plasticity import L2, EffectiveRank, Regularization
from lightning_plasticity.regularization import RegularizationEngine, Regularizer

Pair = namedtuple("Pair", "x y")


class Spy(Regularizer):
    """Takes separate steps of size zero, and notes the features that it was shown."""

    def __init__(self, every_n_steps: int = 1, step_size: float = 0.0) -> None:
        self.every_n_steps = every_n_steps
        self.seen: list[dict[str, Tensor]] = []
        self._step_size = step_size

    takes_steps = True  # type: ignore[assignment]

    @property
    def step_size(self) -> float:
        return self._step_size

    def step_objective(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor:
        self.seen.append({name: value.detach().clone() for name, value in features.items()})
        return torch.stack([value.sum() for value in features.values()]).sum()


class Identity(nn.Module):
    """Its hidden layer is its input, so that the features tell which minibatches were used."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.relu = nn.ReLU()
        self.last = nn.Linear(width, 2)
        nn.init.eye_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.first(x)))


def numbers(features: Mapping[str, Tensor]) -> list[int]:
    """The samples that a spy saw, by their only entry."""
    return [int(value) for value in features["relu"][:, 0]]


def steps(engine: RegularizationEngine, net: nn.Module, count: int, per_step: int = 1, first: int = 0) -> None:
    """Optimizer steps on minibatches of one sample: 1, 2, 3, ..."""
    for index in range(first, first + count * per_step):
        engine.remember(torch.tensor([[index + 1.0]]))
        if (index + 1) % per_step == 0:
            engine.after_step(net, net)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_each_step_uses_exactly_the_last_n_minibatches(n: int) -> None:
    spy, net = Spy(n), Identity()
    steps(RegularizationEngine([spy, L2(0.1)]), net, 8)
    assert [numbers(seen) for seen in spy.seen] == [list(range(k + 1, k + n + 1)) for k in range(0, 8 - n + 1, n)]


@pytest.mark.parametrize("periods", [(2, 3), (3, 2), (1, 4), (4, 6), (5, 5)])
def test_regularizers_of_different_periods_each_use_their_own_last_n(periods: tuple[int, int]) -> None:
    spies, net = [Spy(n) for n in periods], Identity()
    steps(RegularizationEngine(spies), net, 13)
    for n, spy in zip(periods, spies, strict=True):
        assert [numbers(seen) for seen in spy.seen] == [list(range(k - n + 1, k + 1)) for k in range(n, 14, n)]


def test_accumulated_minibatches_all_count() -> None:
    spy, net = Spy(2), Identity()
    steps(RegularizationEngine([spy]), net, 4, per_step=3)
    assert [numbers(seen) for seen in spy.seen] == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]


def test_no_minibatch_is_kept_longer_than_needed_or_without_need() -> None:
    engine, net = RegularizationEngine([Spy(2), Spy(3)]), Identity()
    kept = []
    for index in range(6):
        steps(engine, net, 1, first=index)
        kept.append(len(engine.state_dict()["window"]))
    assert kept == [1, 2, 1, 1, 2, 0]
    idle = RegularizationEngine([L2(0.1), EffectiveRank(0.1, mode="loss"), EffectiveRank(0.0)])
    steps(idle, net, 3)
    assert idle.state_dict() == {"num_steps": 3, "window": [], "initial_weights": {}}


def test_a_state_taken_inside_a_window_goes_on_with_it() -> None:
    spy, net = Spy(4), Identity()
    first, second = RegularizationEngine([spy]), RegularizationEngine([spy])
    steps(first, net, 6)
    state = first.state_dict()
    steps(first, net, 1, first=6)  # what happens later must not reach into the state
    second.load_state_dict(state)
    steps(second, net, 2, first=6)
    assert numbers(spy.seen[-1]) == [5, 6, 7, 8]


def test_a_batch_that_the_training_step_changes_is_used_as_it_came() -> None:
    class Mutating(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].add_(1.0)
            return self.loss(batch)

    class Careful(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss((batch[0] + 1.0, batch[1]))

    for regularizers in (
        [EffectiveRank(0.1, every_n_steps=1), EffectiveRank(0.1, every_n_steps=2)],
        [EffectiveRank(0.1, every_n_steps=1, mode="loss")],
    ):
        one, other = Mutating(), Careful()
        fit(one, callbacks=[Regularization(list(regularizers))])
        fit(other, callbacks=[Regularization(list(regularizers))])
        assert torch.equal(weights(one), weights(other))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, [torch.zeros(len(x))]],
        lambda x: {"x": x, "y": torch.zeros(len(x))},
        lambda x: {"x": x, "name": "a string", "number": 3},
        lambda x: {"x": x, "weight": torch.tensor(0.5)},
        lambda x: {"items": list(x)},
        lambda x: Pair(x, torch.zeros(len(x))),
        lambda x: (x, None),
        lambda x: (x.numpy(), "x"),
    ],
    ids=["tensor", "tuple", "list", "dict", "extras", "scalar", "list in dict", "namedtuple", "none", "numpy"],
)
def test_every_kind_of_batch_joined_or_one_by_one(make: Any) -> None:
    def run(batch: Any) -> None:
        if isinstance(batch, dict):
            batch = batch["x"] if "x" in batch else torch.stack(batch["items"])
        elif not isinstance(batch, Tensor):
            batch = torch.as_tensor(batch[0])
        net(batch)

    spy, net = Spy(), Identity(4)
    rows = [batch[0].abs() for batch in batches(count=3)]
    RegularizationEngine([spy]).separate_steps(net, [make(x) for x in rows], run)
    assert torch.equal(spy.seen[0]["relu"], torch.cat(rows))


def test_unequal_batch_sizes_are_joined() -> None:
    spy, net = Spy(), Identity(4)
    rows = [torch.rand(5, 4), torch.rand(2, 4), torch.rand(1, 4)]
    RegularizationEngine([spy]).separate_steps(net, rows, net)
    assert torch.equal(spy.seen[0]["relu"], torch.cat(rows))


def test_sequences_of_different_lengths_give_their_positions() -> None:
    spy, net = Spy(), Identity(4)
    rows = [torch.rand(3, 5, 4), torch.rand(2, 7, 4)]
    engine = RegularizationEngine([spy, EffectiveRank(0.01)])
    before = weights(net)
    engine.separate_steps(net, rows, net)
    assert torch.equal(spy.seen[0]["relu"], torch.cat([row.reshape(-1, 4) for row in rows]))
    assert not torch.equal(weights(net), before)


def test_a_step_that_wants_its_own_batch_size_gets_it() -> None:
    sizes = []

    def run(x: Tensor) -> None:
        sizes.append(len(x))
        net(x)
        if len(x) != 6:
            raise RuntimeError("expected 6 samples")

    spy, net = Spy(), Identity(4)
    rows = [batch[0].abs() for batch in batches(count=2)]
    RegularizationEngine([spy]).separate_steps(net, rows, run)
    assert sizes == [6, 12, 6, 6]  # one to find the layers
    assert torch.equal(spy.seen[0]["relu"], torch.cat(rows))


def test_a_forward_pass_that_changes_its_batch_changes_a_copy() -> None:
    def run(batch: Any) -> None:
        net(batch["x"].add_(1.0))

    net, x = Identity(4), torch.rand(3, 4)
    for batch in ({"x": x.clone()}, {"x": x.clone(), "weight": torch.tensor(0.5)}):  # the second cannot be joined
        spy = Spy()
        engine = RegularizationEngine([spy, spy])
        engine.separate_steps(net, [batch, batch], run)
        assert torch.equal(batch["x"], x)


def test_an_error_of_the_forward_pass_is_not_swallowed() -> None:
    def run(x: Tensor) -> None:
        net(x)
        raise KeyError("mine")

    net = Identity(4)
    with pytest.raises(KeyError, match="mine"):
        RegularizationEngine([Spy()]).separate_steps(net, [torch.rand(3, 4)], run)


def test_convolutional_features_come_with_channels_last() -> None:
    spy = Spy()
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.rand(5, 2, 6, 6)
    RegularizationEngine([Named(spy, ["1"])]).separate_steps(net, [x], net)
    torch.testing.assert_close(spy.seen[0]["1"], net[1](net[0](x)).permute(0, 2, 3, 1).detach(), rtol=0, atol=0)


class Named(Regularizer):
    """A spy with layers by name."""

    takes_steps = True  # type: ignore[assignment]

    def __init__(self, spy: Spy, layers: list[str]) -> None:
        self.spy, self.layers = spy, layers

    def step_objective(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor:
        return self.spy.step_objective(module, features)


def test_gradients_are_reduced_for_every_parameter_whether_or_not_it_has_one() -> None:
    net, spy = Identity(4), Spy(step_size=1.0)
    shapes = []

    def halve(gradient: Tensor) -> Tensor:
        shapes.append(gradient.shape)
        return gradient / 2

    before = weights(net)
    RegularizationEngine([spy]).separate_steps(net, [torch.ones(3, 4)], net, halve)
    assert shapes == [p.shape for p in net.parameters()]  # the output layer too: all processes reduce the same tensors
    moved = weights(net) - before
    torch.testing.assert_close(moved[:16], torch.full((16,), 1.5), rtol=0, atol=0)  # three samples, halved
    assert not moved[16:].any()


def test_a_regularizer_of_ones_own_may_add_to_loss_and_gradient_without_features() -> None:
    class Sum(Regularizer):
        def penalty(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([p.sum() for p in module.parameters()]).sum()

    class One(Regularizer):
        def add_gradient(self, parameters: Iterable[nn.Parameter]) -> None:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad += 1.0

    by_loss, by_gradient, plain = Net(), Net(), Net()
    fit(by_loss, callbacks=[Regularization([Sum()])])
    fit(by_gradient, callbacks=[Regularization([One()])])
    fit(plain)
    assert torch.equal(weights(by_loss), weights(by_gradient))
    assert not torch.equal(weights(by_loss), weights(plain))


def test_layers_are_found_anew_when_the_next_fit_has_another_network() -> None:
    callback = Regularization([EffectiveRank(0.1, every_n_steps=2, layers=1), EffectiveRank(0.1, mode="loss")])
    fit(Net(), callbacks=[callback])
    net = Net()
    net.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    start = weights(net)
    fit(net, callbacks=[callback])
    assert not torch.equal(weights(net), start)
