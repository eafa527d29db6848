"""Six small networks on digits, from fresh to collapsed, with their exact float64 Hessians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature import HessianOperator
from lightning_plasticity.streams.digits import load_digits

SAMPLES = 300
DEAD = 0.6


@dataclass(frozen=True)
class Truth:
    """All of a network's Hessian on the coordinates whose rows are not zero."""

    name: str
    eigenvalues: Tensor  # (d,)
    vectors: Tensor  # (d, d), by columns
    live: Tensor  # (P,) bool

    def count_above(self, eps: float) -> float:
        return float((self.eigenvalues.abs() > eps).sum())

    @property
    def top(self) -> float:
        return float(self.eigenvalues.abs().max())


def mlp(activation: type[nn.Module], width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).double()


def trained(net: nn.Sequential, num_steps: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = _data(seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(num_steps):
        batch = torch.randint(len(inputs), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return net


@torch.no_grad()
def _dead(net: nn.Sequential) -> nn.Sequential:
    for layer in _hidden(net):
        layer.bias[: int(DEAD * len(layer.bias))] -= 20
    return net


@torch.no_grad()
def _near_rank_one(net: nn.Sequential) -> nn.Sequential:
    for layer in _hidden(net):
        u, sigma, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        sigma[1:] *= 1e-2
        layer.weight.copy_(u * sigma @ vh)
    return net


@torch.no_grad()
def _saturated(net: nn.Sequential) -> nn.Sequential:
    for layer in _hidden(net):
        layer.weight *= 5
    return net


def _hidden(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net[:-1] if isinstance(layer, nn.Linear)]


# The collapsed ones are measured on other labels than they were trained on: a new task.
NETWORKS: dict[str, tuple[Callable[[int], nn.Sequential], int]] = {
    "fresh": (lambda width: mlp(nn.ReLU, width), 0),
    "trained": (lambda width: trained(mlp(nn.ReLU, width), 600), 0),
    "60 % dead": (lambda width: _dead(trained(mlp(nn.ReLU, width), 600)), 1),
    "near rank one": (lambda width: _near_rank_one(trained(mlp(nn.ReLU, width), 600)), 1),
    "tanh trained": (lambda width: trained(mlp(nn.Tanh, width), 600), 0),
    "tanh saturated": (lambda width: _saturated(trained(mlp(nn.Tanh, width), 600)), 1),
}


def network(name: str, width: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The same every time, in float64, and the data it is measured on."""
    build, seed = NETWORKS[name]
    return build(width), _data(seed)


def exact(name: str, width: int) -> Truth:
    model, data = network(name, width)
    loss = F.cross_entropy(model(data[0]), data[1])
    operator = HessianOperator([loss], [1.0], list(model.parameters()))
    live = operator.live_coordinates(torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(operator.dense(live))
    return Truth(name, values, vectors, live)


def _data(seed: int) -> tuple[Tensor, Tensor]:
    inputs = load_digits()[:SAMPLES].double()
    return inputs, torch.randint(10, (SAMPLES,), generator=torch.Generator().manual_seed(7 + seed))
