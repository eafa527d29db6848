"""Worker processes, and loaders, samplers and streams with a state of their own: training sees the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import Classifier, data, loader, mlp, monitors, same_with, trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_plasticity import EveryNSteps, TaskTracker

pytestmark = pytest.mark.filterwarnings("ignore:.*fit ended without a training step")


class Stream(IterableDataset[Any]):
    """Goes on where it was, counts, and can be saved."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(8)
        self.served = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(12):
            self.served += 1
            label = torch.randint(3, (), generator=self.generator)
            yield torch.randn(16, generator=self.generator) + self.served, label

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]
        self.generator.set_state(state["generator"])


class Walk(Sampler[int]):
    """Every pass starts where the last one ended, in an order that its own generator makes."""

    def __init__(self, size: int) -> None:
        self.size, self.position = size, 0
        self.generator = torch.Generator().manual_seed(4)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for index in torch.randperm(self.size, generator=self.generator).tolist():
            self.position += 1
            yield (index + self.position) % self.size


class StatefulLoader(DataLoader[Any]):
    """As torchdata's: says and takes where it is; a pass that is begun changes it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


class Rotated(TensorDataset):
    """Samples depend on how often they were asked for."""

    def __init__(self) -> None:
        super().__init__(*data())
        self.asked = [0] * 12

    def __getitem__(self, index: int) -> Any:
        self.asked[index] += 1
        x, y = super().__getitem__(index)
        return x.roll(self.asked[index]), y


class Endless:
    """An iterator: what it has given is gone."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> Any:
        self.given += 1
        return data(self.given, 4)


def generator() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(3))


def batch_sampler() -> Any:
    return DataLoader(TensorDataset(*data()), batch_sampler=BatchSampler(Walk(12), 4, drop_last=False))


LOADERS: dict[str, Callable[[], Any]] = {
    "own generator": generator,
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stateful loader": lambda: StatefulLoader(TensorDataset(*data()), batch_size=4, shuffle=True),
    "sampler": lambda: DataLoader(TensorDataset(*data()), batch_size=4, sampler=Walk(12)),
    "batch sampler": batch_sampler,
    "dataset with counters": lambda: DataLoader(Rotated(), batch_size=4, shuffle=True),
    "iterator": Endless,
    "generator expression": lambda: (data(k, 4) for k in range(9)),
    "not batched": lambda: DataLoader(
        TensorDataset(*data()), batch_size=None, sampler=BatchSampler(Walk(12), 4, False)
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_training_sees_the_same_batches(kind: str) -> None:
    """Over two fits of the same loader, two epochs each, with boundaries inside of them."""

    def tasks() -> list[Any]:
        return [LOADERS[kind]()] * 2

    watching = [*monitors("warn"), TaskTracker(EveryNSteps(2))]
    settings: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 3}
    told = same_with(lambda: Classifier(mlp()), tasks, watching, **settings)
    assert told == []
    for monitor in watching[:2]:
        assert len(monitor.records) >= 6  # type: ignore[attr-defined]
        assert all(record.failure is None for record in monitor.records)  # type: ignore[attr-defined]


def test_the_state_of_a_loader_is_what_it_would_have_been() -> None:
    found = []
    for watching in ([], monitors()):
        stream, stateful = Stream(), StatefulLoader(Rotated(), batch_size=4, sampler=Walk(12))
        for task in (DataLoader(stream, batch_size=4), stateful):
            trainer(watching).fit(Classifier(mlp()), task)
        state = stream.state_dict()
        walk: Any = stateful.sampler
        rotated: Any = stateful.dataset
        found.append(
            [state["served"], state["generator"].tolist(), stateful.state_dict(), walk.position, rotated.asked]
        )
    assert found[0] == found[1]


def test_persistent_workers() -> None:
    """Only once: processes are slow to start."""

    def tasks() -> list[Any]:
        dataset, settings = TensorDataset(*data()), {"num_workers": 1, "persistent_workers": True}
        shuffled = DataLoader(dataset, batch_size=4, shuffle=True, **settings)  # type: ignore[arg-type]
        return [shuffled, shuffled]

    watching = [*monitors(), TaskTracker(EveryNSteps(2))]
    assert same_with(lambda: Classifier(mlp()), tasks, watching, max_epochs=2) == []
    for monitor in watching[:2]:
        assert [record.settings["data"] for record in monitor.records] == ["training dataset"] * 12  # type: ignore[attr-defined]
