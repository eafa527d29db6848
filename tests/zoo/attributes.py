"""What modules keep beside weights: metrics, lists, counters, generators; and steps that draw random numbers."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional as F
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zoo.base import (
    BATCH,
    CLASSES,
    HIDDEN,
    INPUTS,
    Expectation,
    Kind,
    Small,
    bare,
    by_net,
    mlp,
    nll,
    pairs,
    under_mse,
    under_nll,
    whole,
)  # fmt: skip


class WithMetric(Small):
    """Keeps metrics, updates them in the step, logs objects and values."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.mean = MulticlassAccuracy(CLASSES), MeanMetric()
        self.several = MetricCollection({"a": MulticlassAccuracy(CLASSES), "f": MulticlassF1Score(CLASSES)})
        self.loose = [MeanMetric()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.accuracy(out, batch[1])
        self.mean.update(loss.detach())
        self.loose[0].update(out.detach().mean())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, batch_size=BATCH)
        self.log_dict(self.several(out, batch[1]), on_epoch=True, on_step=False, batch_size=BATCH)
        self.log("mean", self.mean.compute(), batch_size=BATCH)
        return loss


class MetricLoss(Small):
    """The loss itself is a metric's value."""

    def __init__(self) -> None:
        super().__init__(mlp(INPUTS, INPUTS))
        self.error = MeanSquaredError()

    def loss(self, batch: Any) -> Tensor:
        return self.error(self.net(batch), batch)


class Keeps(Small):
    """Python containers, counters, arrays and generators that every step changes and the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.recent: deque[float] = deque(maxlen=3)
        self.seen: Counter[int] = Counter()
        self.groups: defaultdict[str, list[int]] = defaultdict(list)
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1)
        self.ids: set[int] = set()
        self.array = np.zeros(3)
        self.draws, self.noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.best: Tensor | None = None
        self.count = 0

    def loss(self, batch: Any) -> Tensor:
        scale = 1 + 0.01 * len(self.losses) + 0.01 * self.count + 0.01 * float(self.array.sum())
        loss = F.cross_entropy(scale * self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        self.recent.append(self.draws.random() + float(torch.rand(1, generator=self.noise)))
        self.seen.update(batch[1].tolist())
        self.groups[str(self.count % 2)].append(self.count)
        self.ordered.move_to_end("a")
        self.ordered[str(self.count)] = 1
        self.ids.add(self.count)
        self.array += 1
        self.count += 1
        self.best = loss.detach() if self.best is None else torch.minimum(self.best, loss.detach())
        return loss


class Augments(Small):
    """Random augmentation in both transfer hooks: a shift of the batch, and a scale."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn((), dtype=torch.float32), batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * torch.rand((), dtype=torch.float32), batch[1]


def augmented(module: Any, batch: Any) -> Any:
    shift, scale = torch.randn((), dtype=torch.float32), torch.rand((), dtype=torch.float32)
    return under_nll(module.net((batch[0] + shift) * scale), batch[1])


class Vae(Small):
    """Draws its code by reparameterisation."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(INPUTS, 4))
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(2, INPUTS))

    def loss(self, batch: Any) -> Tensor:
        mean, log_std = self.net(batch).chunk(2, 1)
        code = Normal(mean, log_std.exp())
        kl = kl_divergence(code, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1).mean()
        return F.mse_loss(self.decoder(code.rsample()), batch) + 0.1 * kl


def vae(module: Any, batch: Tensor) -> Any:
    noise = torch.empty(len(batch), 2, dtype=torch.float32).normal_()
    mean, log_std = module.net(batch).chunk(2, 1)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std
    error = module.decoder(mean + noise * log_std.exp()) - batch
    return whole(error.square().mean() + 0.1 * kl.sum(1).mean())


class Policy(Small):
    """REINFORCE: samples actions, and is paid for the right ones."""

    def loss(self, batch: Any) -> Tensor:
        policy = Categorical(logits=self.net(batch[0]))
        actions = policy.sample()
        reward = (actions == batch[1]).float() - 0.3
        return -(policy.log_prob(actions) * reward).mean() - 0.01 * policy.entropy().mean()


def policy(module: Any, batch: Any) -> Any:
    logits = module.net(batch[0])
    actions = torch.multinomial(torch.softmax(logits.detach().float(), 1), 1, True)[:, 0]
    logs = logits.log_softmax(1)
    reward = (actions == batch[1]).double() - 0.3
    picked = logs.gather(1, actions[:, None])[:, 0]
    return whole(-(picked * reward).mean() + 0.01 * (logs.exp() * logs).sum(1).mean())


class Gumbel(Small):
    """Drops hidden units by hand, with a mask that it draws."""

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        mask = torch.rand(len(hidden), HIDDEN) < 0.7
        return F.cross_entropy(self.net[2](hidden * mask), batch[1])


def masked(module: Any, batch: Any) -> Any:
    mask = torch.rand(12, HIDDEN, dtype=torch.float32) < 0.7
    return under_nll(module.net[2](module.net[1](module.net[0](batch[0])) * mask), batch[1])


UNKNOWN = {"ggn": "calls no loss function that is known"}

KINDS = [
    Kind("metrics", WithMetric, pairs, Expectation(by_net)),
    Kind("metric as loss", MetricLoss, bare, Expectation(lambda m, x: under_mse(m.net(x), x), warned=UNKNOWN)),
    Kind("containers", Keeps, pairs, Expectation(lambda m, b: (m.net(b[0]), lambda out: nll(out, b[1])), end=False)),
    Kind("augmentation", Augments, pairs, Expectation(augmented)),
    Kind("VAE", Vae, bare, Expectation(vae, told=("loss is not just the value of its mse_loss",), only="hessian")),
    Kind("policy gradient", Policy, pairs, Expectation(policy, warned=UNKNOWN)),
    Kind("own dropout", Gumbel, pairs, Expectation(masked)),
]
