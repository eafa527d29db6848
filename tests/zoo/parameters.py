"""Parameters of every kind: frozen, unused, shared, tied; and compiled modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.base import CLASSES, HIDDEN, INPUTS, Expectation, Kind, Small, by_net, pairs, under_nll


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class ThawsLater(Small):
    """Unfreezes a layer at the second task."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)
        self.fits = 0

    def on_train_start(self) -> None:
        self.net[0].requires_grad_(self.fits > 0)
        self.fits += 1


class Unused(Small):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.alone = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
        self.whole = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)


class TwoNames(Small):
    """One submodule under two names, called twice."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Tanh(), nn.Linear(INPUTS, CLASSES)))
        self.encoder = self.net[0]
        self.alias = self.net

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.alias(torch.tanh(self.encoder(batch[0]))), batch[1])


class Transposed(Small):
    """A decoder that is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(INPUTS, HIDDEN))
        self.head = nn.Linear(INPUTS, CLASSES)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.net(x)), self.net.weight.T)))


class Raw(Small):
    """Parameters in lists and dicts, without a layer."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(INPUTS, HIDDEN)), nn.Parameter(torch.randn(3, 3))])
        self.scales = nn.ParameterDict({"one": nn.Parameter(torch.tensor(0.7))})

    def logits(self, x: Tensor) -> Tensor:
        return self.scales["one"] * torch.tanh(x @ self.weights[0]) @ self.weights[1]

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])


def compiled_part() -> Small:
    module = Small()
    module.net[0] = torch.compile(module.net[0], backend="aot_eager")
    return module


def compiled_in_place() -> Small:
    module = Small()
    module.net.compile(backend="eager")
    return module


def compiled_whole() -> Any:
    return torch.compile(Small(), backend="eager")


def bare_module(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


def bare_net(module: Any, batch: Any) -> Any:
    net = bare_module(module).net
    first = getattr(net[0], "_orig_mod", net[0])
    return under_nll(net[2](torch.tanh(F.linear(batch[0], first.weight, first.bias))), batch[1])


KINDS = [
    Kind("frozen layer", Frozen, pairs, Expectation(by_net)),
    Kind("thaws later", ThawsLater, pairs, Expectation(by_net, end=False)),
    Kind("unused parameters", Unused, pairs, Expectation(by_net)),
    Kind(
        "two names",
        TwoNames,
        pairs,
        Expectation(lambda m, b: under_nll(m.net[2](torch.tanh(m.net[0](torch.tanh(m.net[0](b[0]))))), b[1])),
    ),
    Kind("transposed weight", Transposed, pairs, Expectation(lambda m, b: under_nll(m.logits(b[0]), b[1]))),
    Kind(
        "raw parameters",
        Raw,
        pairs,
        Expectation(lambda m, b: under_nll(m.logits(b[0]), b[1]), warned={"features": "No hidden layer was found"}),
    ),
    Kind("compiled part", compiled_part, pairs, Expectation(bare_net)),
    Kind("compiled in place", compiled_in_place, pairs, Expectation(bare_net)),
    Kind("compiled whole", compiled_whole, pairs, Expectation(bare_net)),
]
