"""Training steps of every kind: what they return, who optimises, what they carry, differentiate and move."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zoo.base import (
    BATCH,
    CLASSES,
    HIDDEN,
    INPUTS,
    Expectation,
    Kind,
    Samples,
    Small,
    bare,
    by_net,
    loader,
    mlp,
    nll,
    pairs,
    points,
    under_mse,
    under_nll,
    whole,
)  # fmt: skip

NO_OUTPUTS = "calls no loss function that is known here"
SEVERAL = "calls several loss functions"


class DictOutput(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        return {"loss": F.cross_entropy(out, batch[1]), "out": out.detach(), "note": "kept"}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert set(outputs) == {"loss", "out", "note"}


class NeverALoss(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net(batch[0])
        return None


class SkipsEverySecond(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class TwoLosses(Small):
    """A loss and a term that is no loss function."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.1 * self.net[0].weight.square().sum()


class Distillation(Small):
    """Two loss functions in one step; ``curvature_outputs`` alone would not say which."""

    def loss(self, batch: Any) -> Tensor:
        out = self.net(batch[0])
        return F.cross_entropy(out, batch[1]) + F.mse_loss(out, batch[0][:, :CLASSES])


class Named(Distillation):
    """The same, told."""

    def curvature_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def curvature_outputs(self, batch: Any) -> Any:
        return self.net(batch[0]), batch[1]


# ---- manual optimization -------------------------------------------------------------------------------------------


class ManualOne(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class ManualClosure(ManualOne):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class RawBackward(ManualOne):
    """``loss.backward()`` past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Attack(Small):
    """Moves its inputs along the sign of their gradient, which a raw ``backward`` leaves in ``x.grad``."""

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_(True)
        super().loss((x, batch[1])).backward()
        self.net.zero_grad()
        assert x.grad is not None
        return super().loss(((x + 0.1 * x.grad.sign()).detach(), batch[1]))


def attacked(module: Any, batch: Any) -> Any:
    x = batch[0].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(nll(module.net(x), batch[1]), x)
    return under_nll(module.net((x + 0.1 * slope.sign()).detach()), batch[1])


class InnerLoader(ManualOne):
    """Goes through a loader of its own in every step, as meta-learners do, and carries on a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.support = DataLoader(TensorDataset(*points(7)), batch_size=6)
        self.replay = points(8)
        self.position = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for inner in self.support:
            optimizer.zero_grad()
            self.manual_backward(self.loss(inner) / 2)
            optimizer.step()
        self.position = (self.position + 2) % 12
        optimizer.zero_grad()
        self.manual_backward(self.loss((batch[0], batch[1])))
        optimizer.step()


class Gan(Small):
    """Two optimizers that take turns."""

    def __init__(self) -> None:
        super().__init__(mlp(2, INPUTS))
        self.critic = mlp(INPUTS, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        fake = self.net(torch.randn(len(batch), 2))
        self.toggle_optimizer(first)
        self.manual_backward(self.judged(fake, 1.0))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        critic = (self.judged(batch, 1.0) + self.judged(fake.detach(), 0.0)) / 2
        self.log("critic", critic)
        self.manual_backward(critic)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def judged(self, x: Tensor, label: float) -> Tensor:
        score = self.critic(x)
        return F.binary_cross_entropy_with_logits(score, torch.full_like(score, label))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net.parameters(), lr=0.01), torch.optim.Adam(self.critic.parameters(), lr=0.02)]


class GanNamed(Gan):
    """The critic's loss on real data, named."""

    def curvature_loss(self, batch: Any) -> Tensor:
        return self.judged(batch, 1.0)


def gan_sum(module: Any, batch: Tensor) -> Any:
    """Each loss moves the network that is toggled only: the sum has no block between the two."""
    fake = module.net(torch.randn(len(batch), 2, dtype=torch.float32).double())
    frozen = copy.deepcopy(module.critic).requires_grad_(False)
    critic = F.softplus(-module.critic(batch)).mean() + F.softplus(module.critic(fake.detach())).mean()
    return whole(F.softplus(-frozen(fake)).mean() + critic / 2)


# ---- state that steps carry ----------------------------------------------------------------------------------------


class Truncated(Small):
    """Backpropagation through time, truncated: the hidden state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.net = nn.GRUCell(INPUTS, HIDDEN), nn.Sequential(nn.Linear(HIDDEN, CLASSES))
        self.hidden: Tensor | None = None

    def loss(self, batch: Any) -> Tensor:
        hidden = None if self.hidden is None or len(self.hidden) != len(batch[0]) else self.hidden
        hidden = self.cell(batch[0], hidden)
        self.hidden = hidden.detach()
        return F.cross_entropy(self.net(hidden), batch[1])


class Carried(Truncated):
    """The same in a buffer of one row, spread over the batch."""

    def __init__(self) -> None:
        super().__init__()
        del self.hidden
        self.register_buffer("hidden", torch.zeros(1, HIDDEN))

    def loss(self, batch: Any) -> Tensor:
        hidden = self.cell(batch[0], self.hidden.expand(len(batch[0]), -1))
        self.hidden = hidden[-1:].detach()
        return F.cross_entropy(self.net(hidden), batch[1])


def fresh_state(module: Any, batch: Any) -> Any:
    return under_nll(module.net(module.cell(batch[0])), batch[1])


def carried_state(module: Any, batch: Any) -> Any:
    return under_nll(module.net(module.cell(batch[0], module.hidden.expand(len(batch[0]), -1))), batch[1])


def moved(target: nn.Module, source: nn.Module, share: float) -> None:
    for theirs, ours in zip(target.parameters(), source.parameters(), strict=True):
        theirs.data.mul_(1 - share).add_(share * ours.data)


class Ema(Small):
    """A teacher that follows the student through ``.data``, before the step uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp().requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        moved(self.teacher, self.net, 0.5)
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


def ema(module: Any, batch: Any) -> Any:
    moved(module.teacher, module.net, 0.5)
    return under_mse(module.net(batch[0]), module.teacher(batch[0]))


class Byol(Small):
    """Two noisy views, a predictor and a momentum target; the loss is a cosine."""

    def __init__(self) -> None:
        super().__init__(mlp(INPUTS, HIDDEN))
        self.predictor = nn.Linear(HIDDEN, HIDDEN)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        moved(self.target, self.net, 0.01)
        one, two = (batch + 0.1 * torch.randn(batch.shape, dtype=torch.float32) for _ in range(2))
        return 2 - 2 * F.cosine_similarity(self.predictor(self.net(one)), self.target(two)).mean()


class Dqn(Small):
    """A target network that is copied now and then, inside the step."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net)
        self.target.requires_grad_(False)
        self.count = 0

    def loss(self, batch: Any) -> Tensor:
        if self.count % 2 == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.count += 1
        chosen = self.net(batch[0]).gather(1, batch[1][:, None])
        with torch.no_grad():
            best = 0.9 * self.target(batch[0].flip(0)).max(1, keepdim=True).values
        return F.smooth_l1_loss(chosen, 1.0 + best)


def dqn(module: Any, batch: Any) -> Any:
    best = 1.0 + 0.9 * module.net(batch[0].flip(0)).max(1, keepdim=True).values.detach()

    def huber(chosen: Tensor) -> Tensor:
        gap = (chosen - best).abs()
        return torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()

    return module.net(batch[0]).gather(1, batch[1][:, None]), huber


# ---- derivatives inside the step -----------------------------------------------------------------------------------


class Pinn(Small):
    """A physics-informed network: u'' + u = 0 in its first input."""

    def __init__(self) -> None:
        super().__init__(mlp(INPUTS, 1))

    def residual(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        return second[:, :1] + u

    def loss(self, batch: Any) -> Tensor:
        residual = self.residual(batch)
        return F.mse_loss(residual, torch.zeros_like(residual))


class GradientPenalty(Small):
    """A critic of the Wasserstein kind, with a penalty on its slope."""

    def __init__(self) -> None:
        super().__init__(mlp(INPUTS, 1))

    def loss(self, batch: Any) -> Tensor:
        x = batch.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return -self.net(batch).mean() + (slope.norm(dim=1) - 1).square().mean()


class InnerStep(Small):
    """One step of MAML: the loss after a step of gradient descent on the same batch."""

    def loss(self, batch: Any) -> Tensor:
        weights = dict(self.net.named_parameters())
        first = F.cross_entropy(torch.func.functional_call(self.net, weights, batch[0]), batch[1])
        slopes = torch.autograd.grad(first, list(weights.values()), create_graph=True)
        after = {name: w - 0.1 * s for (name, w), s in zip(weights.items(), slopes, strict=True)}
        return nll(torch.func.functional_call(self.net, after, batch[0]), batch[1])


def by_own_loss(module: Any, batch: Any) -> Any:
    """The step's loss itself, in float64: where there is no shorter way to write it."""
    return whole(module.loss(batch))


def pairs_in_order() -> list[Any]:
    return [loader(TensorDataset(*points(task)), shuffle=False) for task in range(2)]


def of_length_four() -> list[Any]:
    """One batch a task."""
    return [loader(Samples(list(zip(*(part[:BATCH] for part in points(task)), strict=True)))) for task in range(2)]


ONLY_HESSIAN = {"ggn": NO_OUTPUTS}

KINDS = [
    Kind("dict output", DictOutput, pairs, Expectation(by_net)),
    Kind("never a loss", NeverALoss, pairs, Expectation(warned={"ggn, hessian": "training_step returned no loss"})),
    Kind("skips every second batch", SkipsEverySecond, pairs, Expectation(by_net)),
    Kind(
        "penalty in the step",
        TwoLosses,
        pairs,
        Expectation(
            lambda module, batch: (
                torch.cat([module.net(batch[0]).reshape(-1), module.net[0].weight.reshape(-1)]),
                lambda values: nll(values[:36].reshape(12, 3), batch[1]) + 0.1 * values[36:].square().sum(),
            ),
            warned={},
            told=("loss is not just the value of its cross_entropy",),
            only="hessian",
        ),
    ),
    Kind(
        "two losses",
        Distillation,
        pairs,
        Expectation(
            lambda module, batch: (
                module.net(batch[0]),
                lambda out: nll(out, batch[1]) + (out - batch[0][:, :CLASSES]).square().mean(),
            ),
            warned={"ggn": SEVERAL},
        ),
    ),
    Kind("two losses, named", Named, pairs, Expectation(by_net)),
    Kind("manual optimization", ManualOne, pairs, Expectation(by_net)),
    Kind("manual optimization, closure", ManualClosure, pairs, Expectation(by_net)),
    Kind("raw backward", RawBackward, pairs, Expectation(by_net)),
    Kind("attack", Attack, pairs, Expectation(attacked)),
    Kind(
        "inner loader",
        InnerLoader,
        pairs,
        Expectation(
            lambda module, batch: whole(
                by_net(module, batch)[1](module.net(batch[0]))
                + sum(nll(module.net(x.double()), y) / 2 for x, y in module.support)
            ),
            warned={"ggn": SEVERAL},
            told=("sum of all that the step gives to manual_backward",),
        ),
    ),
    Kind(
        "GAN",
        Gan,
        bare,
        Expectation(gan_sum, warned={"ggn": SEVERAL}, told=("sum of all that the step gives to manual_backward",)),
    ),
    Kind(
        "GAN, named",
        GanNamed,
        bare,
        Expectation(lambda module, batch: (module.critic(batch), lambda score: F.softplus(-score).mean())),
    ),
    Kind("carried state", Truncated, pairs_in_order, Expectation(fresh_state)),
    Kind("carried state in a buffer", Carried, pairs_in_order, Expectation(carried_state)),
    Kind("EMA teacher", Ema, pairs, Expectation(ema)),
    Kind("BYOL", Byol, bare, Expectation(by_own_loss, warned=ONLY_HESSIAN)),
    Kind("DQN", Dqn, pairs, Expectation(dqn)),
    Kind("PINN", Pinn, bare, Expectation(lambda module, x: under_mse(module.residual(x), torch.zeros(12, 1)))),
    Kind("gradient penalty", GradientPenalty, bare, Expectation(by_own_loss, warned=ONLY_HESSIAN)),
    Kind(
        "inner step",
        InnerStep,
        pairs,
        Expectation(by_own_loss, told=("loss is not just the value of its cross_entropy",), only="hessian"),
    ),
]
