"""The promise: a run with every monitor on ends bit for bit where the same run without them ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import (
    NETWORKS,
    Classifier,
    Make,
    Manual,
    Validated,
    Witness,
    data,
    fit_tasks,
    loader,
    mlp,
    monitors,
    outcome,
    trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

from lightning_plasticity import EveryNSteps, TaskTracker

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning"),
]


def assert_same_with_monitors(
    make: Make,
    tasks: Callable[[], list[Any]],
    path: Path,
    extra: Callable[[], list[L.Callback]] = list,
    **settings: Any,
) -> None:
    """Compare a run without monitors to one with; ``tasks`` and ``extra`` make new data and callbacks for each run."""
    plain = fit_tasks(make, tasks(), extra(), path / "plain", **settings)
    watching = monitors()
    watched = fit_tasks(make, tasks(), [*watching, *extra()], path / "watched", **settings)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert plain["csv"]
    for monitor in watching:
        assert len(monitor.records) >= 2
        assert all(record.failure is None and record.values for record in monitor.records)


def two_tasks(**settings: Any) -> list[DataLoader[Any]]:
    return [loader(task, **settings) for task in range(2)]


@pytest.mark.parametrize("mode", ["frozen", "as_is", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, mode: Any, tmp_path: Path) -> None:
    def make() -> L.LightningModule:
        return Classifier(NETWORKS[name]())

    plain = fit_tasks(make, two_tasks(shuffle=True), [], tmp_path / "plain", max_epochs=2)
    watching = monitors(mode=mode)
    watched = fit_tasks(make, two_tasks(shuffle=True), watching, tmp_path / "watched", max_epochs=2)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert [record.failure for monitor in watching for record in monitor.records] == [None] * 8


def test_accumulation_clipping_and_validation(tmp_path: Path) -> None:
    """Five batches: the last accumulates alone; boundaries fall between two micro-batches too."""
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 2, "val_check_interval": 2}

    class WithValidation(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(samples=20, shuffle=True)

        def val_dataloader(self) -> Any:
            return loader(5)

    assert_same_with_monitors(
        lambda: Validated(NETWORKS["conv"]()),
        lambda: [WithValidation()],
        tmp_path,
        lambda: [TaskTracker(EveryNSteps(2))],
        **settings,
    )


def test_manual_optimization(tmp_path: Path) -> None:
    assert_same_with_monitors(lambda: Manual(mlp()), lambda: two_tasks(shuffle=True), tmp_path, max_epochs=2)


class Careless(Classifier):
    """Changes its batch in place, keeps outputs, draws from its own generator, moves a target network."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.target = mlp()
        self.kept: list[Tensor] = []
        self.noise = torch.Generator().manual_seed(1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.noise), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        x.mul_(torch.rand(1, generator=self.noise) + 0.5)
        for ours, theirs in zip(self.net.parameters(), self.target.parameters(), strict=True):
            theirs.data.lerp_(ours.data, 0.1)
        self.kept.append(x)
        with torch.no_grad():
            x += 0.01 * self.target(x).mean() + 0.001 * len(self.kept)
        return {"loss": super().training_step(batch, batch_idx), "x": x}


def test_a_step_with_side_effects(tmp_path: Path) -> None:
    assert_same_with_monitors(Careless, two_tasks, tmp_path)


class Augmentation:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)
        self.memory: list[float] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.memory.append(float(x.sum()))
        return x * self.generator.random() + sum(self.memory)


class ByHand(Classifier):
    """Logs past ``self.log``, moves its learning rate, steps its scheduler, and uses a helper object."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.augmentation = Augmentation()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step((self.augmentation(batch[0]), batch[1]), batch_idx)
        assert self.logger is not None
        self.logger.log_metrics({"by hand": float(loss.detach())}, step=batch_idx)
        assert isinstance(self.logger.log_dir, str)
        for logger in [*self.loggers, *self.trainer.loggers]:
            logger.log_metrics({"again": float(loss.detach())}, step=batch_idx)
        self.logger.experiment.log_metrics({"experiment": 1.0}, step=batch_idx)
        self.optimizers().optimizer.param_groups[0]["lr"] *= 0.9  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def test_a_step_that_logs_and_moves_its_learning_rate_by_hand(tmp_path: Path) -> None:
    assert_same_with_monitors(ByHand, two_tasks, tmp_path)


@pytest.mark.parametrize("steps", [1, 2])
def test_boundaries_inside_an_epoch(steps: int, tmp_path: Path) -> None:
    assert_same_with_monitors(
        lambda: Classifier(NETWORKS["conv"]()), two_tasks, tmp_path, lambda: [TaskTracker(EveryNSteps(steps))]
    )


# ---- data that can be disturbed ------------------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Adds noise from a generator of its own in every ``__getitem__``, and counts what it has served."""

    def __init__(self, task: int, draw: Callable[[], float]) -> None:
        self.x, self.y = data(task)
        self.draw = draw
        self.served = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.served += 1
        return self.x[index] + self.draw() + 0.01 * self.served, self.y[index]


def torch_noise() -> Callable[[], float]:
    generator = torch.Generator().manual_seed(4)
    return lambda: float(torch.rand(1, generator=generator))


class InADict:
    """A transform with its generators in a dict."""

    def __init__(self) -> None:
        self.generators = {"a": [np.random.RandomState(4)]}

    def __call__(self) -> float:
        return float(self.generators["a"][0].rand())


GENERATORS: dict[str, Callable[[], Callable[[], float]]] = {
    "torch closure": torch_noise,
    "numpy method": lambda: np.random.default_rng(4).random,
    "random method": lambda: random.Random(4).random,
    "numpy in a dict": InADict,
    "global random": lambda: random.random,
    "global numpy": lambda: np.random.rand,
    "global torch": lambda: lambda: float(torch.rand(1)),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_random_augmentation(kind: str, tmp_path: Path) -> None:
    def tasks() -> list[Any]:
        draw = GENERATORS[kind]()
        datasets = [Augmented(0, draw), Subset(Augmented(1, draw), range(10))]
        return [DataLoader(dataset, batch_size=4, shuffle=True) for dataset in datasets]

    assert_same_with_monitors(lambda: Classifier(mlp()), tasks, tmp_path)


class Noisy:
    """A collate function with a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(2)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x * float(self.generator.random()), y


class Stream(IterableDataset[Any]):
    """Goes on where it was: every pass serves other samples."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(8)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(12):
            yield torch.randn(16, generator=self.generator), torch.randint(3, (), generator=self.generator)


class Batches:
    """Not a DataLoader at all."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return (data(self.first + k, 4) for k in range(3))


def own_generator() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return two_tasks(shuffle=True, generator=generator)


def own_sampler() -> list[Any]:
    dataset = TensorDataset(*data())
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(3))
    return [DataLoader(dataset, batch_size=4, sampler=sampler)] * 2


def own_collate() -> list[Any]:
    collate = Noisy()
    return two_tasks(collate_fn=collate)


LOADERS: dict[str, Callable[[], list[Any]]] = {
    "own generator": own_generator,
    "own sampler": own_sampler,
    "own collate": own_collate,
    "iterable": lambda: [DataLoader(Stream(), batch_size=4)] * 2,
    "any iterable": lambda: [Batches(0), Batches(10)],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders(kind: str, tmp_path: Path) -> None:
    assert_same_with_monitors(lambda: Classifier(mlp()), LOADERS[kind], tmp_path, max_epochs=2)


def test_probe_data_that_training_uses_too(tmp_path: Path) -> None:
    """Handing over the training loader itself, with its own generator and augmentation, is safe as well."""

    def run(watched: bool, path: Path) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        draw = np.random.default_rng(1).random
        mine = DataLoader(Augmented(0, draw), batch_size=4, shuffle=True, generator=generator)
        callbacks = monitors(data=mine) + monitors(data=mine.dataset, mode="eval") if watched else []
        return fit_tasks(lambda: Classifier(mlp()), [mine, mine], callbacks, path)

    plain, watched = run(False, tmp_path / "a"), run(True, tmp_path / "b")
    assert {key for key in plain if plain[key] != watched[key]} == set()


# ---- resuming ------------------------------------------------------------------------------------------------------


class SeedEachBatch(L.Callback):
    """Lightning does not save random states: dropout after a resume needs a seed that depends on the step only."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("source", ["dataset", "iterable"])
def test_resumed_inside_a_task(source: str, tmp_path: Path) -> None:
    def batches() -> Any:
        return loader(samples=8) if source == "dataset" else Batches(0)

    def run(callbacks: list[L.Callback], epochs: int, checkpoint: Any = None) -> dict[str, Any]:
        torch.manual_seed(0)
        module, witness = Classifier(NETWORKS["conv"]()), Witness()
        keep = ModelCheckpoint(tmp_path, filename=f"{len(callbacks)}-{{epoch}}", save_top_k=-1)
        last = trainer([SeedEachBatch(), *callbacks, witness, keep], max_epochs=epochs, enable_checkpointing=True)
        last.fit(module, batches(), ckpt_path=checkpoint)
        return outcome(module, witness, last) | {"losses": None, "batches": None, "attributes": None}

    whole = run([], 3)
    run(first := monitors(), 1)
    stops = {True: tmp_path / "2-epoch=0.ckpt", False: tmp_path / "0-epoch=0.ckpt"}
    resumed = {watched: run(monitors() if watched else [], 3, stops[watched]) for watched in (True, False)}
    for found in resumed.values():
        assert {key for key in whole if whole[key] != found[key]} == set()
    run(again := monitors(), 3, stops[True])
    for before, after in zip(first, again, strict=True):
        assert [(r.task, r.phase) for r in after.records] == [(0, "start"), (0, "end")]
        assert after.records[0] == before.records[0]
        assert after.records[1].failure is None
