"""Steps that reach optimizers, iterators, writers and the Trainer; and the odd places where modules keep things."""

from __future__ import annotations

import argparse
import itertools
import queue
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zoo.base import BATCH, Expectation, Kind, Samples, Small, by_net, pairs, points
from zoo.steps import ManualOne


class OwnOptimizer(ManualOne):
    """Keeps optimizer and scheduler itself, in plain containers; Lightning knows of none."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"optimizers": [torch.optim.Adam(self.net.parameters(), lr=0.05)]}
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.kept["optimizers"][0], 0.9)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (optimizer,) = self.kept["optimizers"]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for values in optimizer.state.values():
            values["exp_avg"].mul_(0.5)
            values["note"] = 1
        optimizer.param_groups[0]["eps"] *= 1.1
        optimizer.step()
        self.schedule.step()

    def configure_optimizers(self) -> None:
        return None


class EditsState(Small):
    """Halves Adam's momentum in every step."""

    def loss(self, batch: Any) -> Tensor:
        optimizer: Any = self.optimizers()
        for values in optimizer.state.values():
            values["exp_avg"].mul_(0.5)
            values["exp_avg_sq"] = values["exp_avg_sq"] * 1.5
        return super().loss(batch)


class EditsStateByHand(ManualOne):
    """The same in manual optimization, with the loss given to ``torch.autograd.backward``."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        torch.autograd.backward(self.loss(batch))
        for values in optimizer.state.values():
            values["exp_avg"].mul_(0.5)
        optimizer.step()


class Stops(Small):
    """Asks the Trainer to stop when a batch is larger than those it trains on, as probe batches are."""

    def loss(self, batch: Any) -> Tensor:
        if len(batch[0]) > BATCH:
            self.trainer.should_stop = True
        return super().loss(batch)


class Recent(deque[Any]):
    """A deque whose constructor takes something else."""

    def __init__(self, size: int) -> None:
        super().__init__(maxlen=size)


class Ledger(list[Any]):
    def __init__(self, name: str, *, strict: bool) -> None:
        super().__init__()
        self.name, self.strict = name, strict


class Slotted:
    __slots__ = ("__hidden", "count", "late")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, [0]

    def step(self) -> int:
        self.count += 1
        self.late = self.count
        self.__hidden.append(self.count)
        return len(self.__hidden)


class OddPlaces(Small):
    """Counts in many places; the loss depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer, self.slotted = Samples([]), Slotted()
        self.namespace, self.simple = argparse.Namespace(n=0), SimpleNamespace(n=0)
        self.queue: queue.Queue[int] = queue.Queue()
        self.recent, self.ledger = Recent(100), Ledger("a", strict=True)
        self.count, self.turns = itertools.count(1), [iter([float(i) for i in range(100)])]
        self.around = itertools.cycle([1.0, 2.0, 3.0])

    def loss(self, batch: Any) -> Tensor:
        self.buffer.samples.append(1)
        self.namespace.n += 1
        self.simple.n += 1
        self.queue.put(1)
        self.recent.append(1)
        self.ledger.append(1)
        counts = [len(self.buffer), self.slotted.step(), self.namespace.n, self.simple.n, self.queue.qsize()]
        counts += [len(self.recent), len(self.ledger), next(self.count)]
        drawn = next(self.turns[0]) + next(self.around)
        scale = 0.9 + 0.01 * sum(counts) + 0.01 * drawn  # one at first
        return F.cross_entropy(scale * self.net(batch[0]), batch[1])


class Draws(Small):
    """Draws from a loader's iterator, which nothing puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.more = iter(DataLoader(TensorDataset(*points(5)), batch_size=1))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + super().loss(next(self.more))


class DrawsNamed(Draws):
    """The same, and tells the loss without the iterator, which is a generator in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.more = [(sample for sample in zip(*(part[:, None] for part in points(5)), strict=True))]

    def loss(self, batch: Any) -> Tensor:
        return self.curvature_loss(batch) + Small.loss(self, next(self.more[0]))

    def curvature_loss(self, batch: Any) -> Tensor:
        return Small.loss(self, batch)


REFUSED = "the step draws from self.more, an iterator that cannot be put back. Define curvature_loss"

KINDS = [
    Kind("optimizer of its own", OwnOptimizer, pairs, Expectation(by_net)),
    Kind("edits the optimizer's state", EditsState, pairs, Expectation(by_net)),
    Kind("edits the optimizer's state by hand", EditsStateByHand, pairs, Expectation(by_net)),
    Kind("asks to stop", Stops, pairs, Expectation(by_net)),
    Kind("odd places", OddPlaces, pairs, Expectation(by_net, end=False)),
    Kind("draws from an iterator", Draws, pairs, Expectation(warned={"ggn, hessian": REFUSED, "": REFUSED})),
    Kind("draws from a generator, named", DrawsNamed, pairs, Expectation(by_net)),
]
