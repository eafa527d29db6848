"""What a kind of module is in the zoo, and the small pieces that its families are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

INPUTS, HIDDEN, CLASSES, SAMPLES, BATCH = 4, 3, 3, 12, 4
LossOf = Callable[[Tensor], Tensor]
Hand = Callable[[Any, Any], tuple[Tensor, LossOf]]


@dataclass(frozen=True)
class Expectation:
    """What the monitors make of a kind of module.

    Attributes:
        hand: ``(module in float64, all samples of a task in one batch) -> (outputs, loss as a function of them)``,
            written without the training step; its dense second derivatives are the reference. None where nothing is
            measured.
        warned: a pattern of the one warning, by what is not measured: ``"ggn"``, ``"hessian"``, ``"features"``,
            and ``""`` for features of a step that does not run.
        told: patterns of warnings beside a number that is measured all the same.
        end: whether the reference also holds for the trained weights on the second task.
        only: the one matrix that the reference is of, where another is of less than the whole loss.
        settings: of the Trainer.
    """

    hand: Hand | None = None
    warned: Mapping[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    end: bool = True
    only: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Kind(NamedTuple):
    """A kind of module: how to make it and its two tasks, and what to expect."""

    name: str
    make_module: Callable[[], Any]
    make_loaders: Callable[[], list[Any]]
    expectation: Expectation


class Small(L.LightningModule):
    """A tanh network under cross-entropy, with logging and Adam; families override what they are about."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def mlp(inputs: int = INPUTS, outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def nll(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, by hand."""
    return (outputs.logsumexp(-1) - outputs.gather(-1, labels[:, None])[:, 0]).mean()


def under_nll(outputs: Tensor, labels: Tensor) -> tuple[Tensor, LossOf]:
    return outputs, lambda values: nll(values, labels)


def under_mse(outputs: Tensor, targets: Tensor) -> tuple[Tensor, LossOf]:
    return outputs, lambda values: (values - targets).square().mean()


def whole(loss: Tensor) -> tuple[Tensor, LossOf]:
    """A loss of which only the Hessian is checked."""
    return loss, lambda value: value


def by_net(module: Any, batch: Any) -> tuple[Tensor, LossOf]:
    """Of ``Small`` on pairs."""
    return under_nll(module.net(batch[0]), batch[1])


def points(task: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    return (
        torch.randn(SAMPLES, INPUTS, generator=generator),
        torch.randint(CLASSES, (SAMPLES,), generator=generator),
    )


def pairs() -> list[Any]:
    """Two tasks of shuffled inputs and labels."""
    return [loader(TensorDataset(*points(task))) for task in range(2)]


def bare() -> list[Any]:
    """Two tasks of inputs alone."""
    return [loader(Samples(list(points(task)[0]))) for task in range(2)]


def loader(dataset: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": BATCH, "shuffle": True, **settings})


class Samples(Dataset[Any]):
    """A list of samples of any shape."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]
