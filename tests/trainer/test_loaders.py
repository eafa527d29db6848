"""Worker processes, and loaders, samplers and streams with a state of their own: training sees the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import Classifier, data, loader, mlp, monitors, same_with, trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset, default_collate

from lightning_plasticity import EveryNSteps, FeatureRankMonitor, TaskTracker
from lightning_plasticity.callbacks import probe_data
from lightning_plasticity.nn import is_measuring

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


class Tilt:
    """A transform, or a collate function, that changes with every call: an attribute, an array and a tensor."""

    def __init__(self) -> None:
        self.calls = 0
        self.mean, self.scale = np.zeros(16, np.float32), torch.ones(16)

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        self.mean += 0.1
        self.scale.mul_(0.97)
        return x * self.scale + torch.from_numpy(self.mean) + self.calls

    def collate(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return self(x), y


class TiltModule(nn.Module):
    """The same as a module, as torchvision's transforms are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.shift += 0.1
        return x + self.shift * self.calls


class Collating(Tilt):
    def __call__(self, samples: Any) -> Any:
        x, y = default_collate(samples)
        return super().__call__(x), y


class Transformed(TensorDataset):
    def __init__(self, transform: Any) -> None:
        super().__init__(*data())
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return self.transform(x), y


class Drifting(TensorDataset):
    """Writes to its own data."""

    def __init__(self) -> None:
        super().__init__(*data())

    def __getitem__(self, index: int) -> Any:
        self.tensors[0][index].add_(0.1)
        x, y = super().__getitem__(index)
        return x.clone(), y


class Counting(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def train_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls += 1
        return batch[0] + 0.1 * self.calls, batch[1]


CHANGING: dict[str, Callable[[], Any]] = {
    "transform": lambda: DataLoader(Transformed(Tilt()), batch_size=4),
    "transform module": lambda: DataLoader(Transformed(TiltModule()), batch_size=4),
    "collate object": lambda: loader(collate_fn=Collating()),
    "collate method": lambda: loader(collate_fn=Tilt().collate),
    "data in place": lambda: DataLoader(Drifting(), batch_size=4),
    "datamodule": Counting,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_objects_that_change_when_they_are_asked_are_put_back(kind: str) -> None:
    watching = [*monitors(), TaskTracker(EveryNSteps(2))]
    assert same_with(lambda: Classifier(mlp()), lambda: [CHANGING[kind]()], watching) == []
    for monitor in watching[:2]:
        assert {record.settings["data"] for record in monitor.records} == {"training dataset"}  # type: ignore[attr-defined]


def test_large_tensors_of_a_dataset_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_data, "REMEMBERED", 1000)
    few, many, tiny = torch.zeros(100), torch.zeros(10_000), np.zeros(75)
    assert [id(value) for value in probe_data._small([many, few, "text", tiny])] == [id(few), id(tiny)]

    def fetch() -> None:
        with probe_data._untouched([many, few, tiny]):
            for value in (many, few, tiny):
                value += 1

    with pytest.warns(UserWarning, match="changed a large tensor of the dataset in place"):
        fetch()
    assert [float(value.sum()) for value in (many, few, tiny)] == [10_000.0, 0.0, 0.0]


class Mixing(DataLoader[Any]):
    """Yields what no dataset holds."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in super().__iter__():
            yield x + 100.0, y


class Attribute(DataLoader[Any]):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class Later(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return super()._get_iterator()


@pytest.mark.parametrize(
    ("kind", "name"), [(Mixing, "__iter__"), (Attribute, "__getattribute__"), (Later, "_get_iterator")]
)
def test_a_loader_that_makes_its_own_batches_is_measured_on_the_first_of_them(kind: Any, name: str) -> None:
    seen = []

    class Seeing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if is_measuring():
                seen.append(float(batch[0].mean()))
            return super().training_step(batch, batch_idx)

    watching = FeatureRankMonitor(when="start", on_error="raise")
    trainer([watching]).fit(Seeing(mlp()), kind(TensorDataset(*data()), batch_size=4))
    (record,) = watching.records
    assert record.settings["data"] == f"first batch, for {kind.__name__} has a {name} of its own"
    assert seen
    assert all((mean > 50) == (kind is Mixing) for mean in seen)


def test_a_loader_of_torchdata_counts_as_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatefulLoader, "__module__", "torchdata.stateful_dataloader.stateful_dataloader")
    watching = FeatureRankMonitor(when="start", on_error="raise")
    trainer([watching]).fit(Classifier(mlp()), StatefulLoader(TensorDataset(*data()), batch_size=4))
    assert watching.records[0].settings["data"] == "training dataset"
