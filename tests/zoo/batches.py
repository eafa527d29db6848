"""Batches of every shape: dicts, dataclasses, nested ones, bare tensors, ignored targets, empty tensors."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from zoo.base import (
    CLASSES,
    Expectation,
    Kind,
    Samples,
    Small,
    bare,
    by_net,
    loader,
    nll,
    pairs,
    points,
    under_mse,
    under_nll,
)  # fmt: skip

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Item:
    x: Tensor
    y: Tensor
    name: str = "batch"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


def of_samples(sample: Any, collate: Any = None) -> Any:
    """Two tasks of ``sample(x, y)``."""

    def make() -> list[Any]:
        return [
            loader(Samples([sample(x, y) for x, y in zip(*points(task), strict=True)]), collate_fn=collate)
            for task in range(2)
        ]

    return make


def stacked(kind: Any) -> Any:
    return lambda samples: kind(torch.stack([s.x for s in samples]), torch.stack([s.y for s in samples]))


class OnDict(Small):
    def loss(self, batch: Any) -> Tensor:
        assert isinstance(batch, Mapping)
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


class OnFields(Small):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


class OnFrozen(OnFields):
    """Lightning moves no frozen dataclass; the module does."""

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return Frozen(batch.x.to(device), batch.y.to(device))


class OnNested(Small):
    def loss(self, batch: Any) -> Tensor:
        (left, [right]), rest = batch["views"], batch["rest"]
        return F.cross_entropy(self.net(torch.cat([left, right], 1)), rest["label"]["y"])


class OnTensor(Small):
    """An autoencoder: the batch is the input and the target."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = torch.nn.Linear(3, 4)

    def loss(self, batch: Any) -> Tensor:
        assert isinstance(batch, Tensor)
        return F.mse_loss(self.net(batch), batch)


def fields(module: Any, batch: Any) -> Any:
    return under_nll(module.net(batch.x), batch.y)


class Masked(Small):
    """Some targets are padding; a batch may hold nothing else, and its NaN gradients are left out."""

    reduction = "mean"

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=-1, reduction=self.reduction)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_()


class MaskedSum(Masked):
    reduction = "sum"


def masked(*kept: Any) -> Any:
    """Two tasks with the targets that are kept in each."""

    def make() -> list[Any]:
        tasks = []
        for task in range(2):
            x, y = points(task)
            y[[index for index in range(len(y)) if index not in kept[task]]] = -1
            tasks.append(loader(TensorDataset(x, y)))
        return tasks

    return make


def kept_only(module: Any, batch: Any) -> Any:
    kept = batch[1] >= 0
    return module.net(batch[0]), lambda outputs: nll(outputs[kept], batch[1][kept])


class Boxes(Small):
    """A field of its batch has no rows at all, as where a picture shows no object."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"]) + batch["boxes"].sum()


class Selective(Small):
    """Learns from the samples whose label says so, of which there may be none: a mean over nothing."""

    def loss(self, batch: Any) -> Tensor:
        some = batch[1] > CLASSES
        return F.mse_loss(self.net(batch[0])[some], batch[0][some][:, :CLASSES])

    on_before_optimizer_step = Masked.on_before_optimizer_step


def with_boxes(samples: list[Any]) -> dict[str, Tensor]:
    x, y = zip(*samples, strict=True)
    return {"boxes": torch.zeros(0, 4), "x": torch.stack(x), "y": torch.stack(y)}


def dictionary(module: Any, batch: Any) -> Any:
    return under_nll(module.net(batch["x"]), batch["y"])


KINDS = [
    Kind("pair", Small, pairs, Expectation(by_net)),
    Kind("dict batch", OnDict, of_samples(lambda x, y: {"x": x, "y": y, "id": "a"}), Expectation(dictionary)),
    Kind("dataclass batch", OnFields, of_samples(Item, stacked(Item)), Expectation(fields)),
    Kind("frozen dataclass batch", OnFrozen, of_samples(Frozen, stacked(Frozen)), Expectation(fields)),
    Kind("named tuple batch", OnFields, of_samples(Point), Expectation(fields)),
    Kind(
        "nested batch",
        OnNested,
        of_samples(lambda x, y: {"views": (x[:1], [x[1:]]), "rest": {"label": {"y": y}, "weight": 1.0}}),
        Expectation(
            lambda module, batch: under_nll(
                module.net(torch.cat([batch["views"][0], batch["views"][1][0]], 1)), batch["rest"]["label"]["y"]
            )
        ),
    ),
    Kind("tensor batch", OnTensor, bare, Expectation(lambda module, x: under_mse(module.net(x), x))),
    Kind("some targets ignored", Masked, masked(range(0, 12, 2), range(3)), Expectation(kept_only)),
    Kind(
        "all targets ignored, mean",
        Masked,
        masked([], []),
        Expectation(warned={"ggn, hessian": "every target on the probe data is ignored .*ignore_index=-1"}),
    ),
    Kind(
        "all targets ignored, sum",
        MaskedSum,
        masked([], []),
        Expectation(lambda module, batch: (module.net(batch[0]), lambda outputs: 0.0 * outputs.square().sum())),
    ),
    Kind("an empty field", Boxes, of_samples(lambda x, y: (x, y), with_boxes), Expectation(dictionary)),
    Kind(
        "a mean over nothing",
        Selective,
        pairs,
        Expectation(warned={"ggn, hessian": "mse_loss is called on no values: .*shape \\(0, 3\\)"}),
    ),
]
