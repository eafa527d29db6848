"""Runs resumed inside a task and an epoch leave the weights and records of an uninterrupted run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import NETWORKS, Classifier, Witness, data, loader, mlp, outcome, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    TaskTracker,
    read_records,
)
from lightning_plasticity.nn import is_measuring

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
BATCHES, EPOCHS = 3, 4


class Resumable:
    """Batches in an order of its own, which goes on where a checkpoint left it."""

    def __init__(self) -> None:
        self.epoch = self.index = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        if self.index == BATCHES:
            self.epoch, self.index = self.epoch + 1, 0
        while self.index < BATCHES:
            self.index += 1
            yield data(10 * self.epoch + self.index, 4)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]


class SeedEachBatch(L.Callback):
    """Lightning does not save random states: dropout after a resume needs a seed that depends on the step only."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


SCHEDULES: dict[str, Any] = {"fit": EveryFit, "epochs": lambda: EveryNEpochs(2), "steps": lambda: EveryNSteps(5)}


def run(
    watching: list[Any], schedule: str, batches: Any, directory: Path, checkpoint: Any = None, **settings: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    module, witness = Classifier(NETWORKS["conv"]()), Witness()
    keep = ModelCheckpoint(directory, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
    callbacks = [SeedEachBatch(), *watching, TaskTracker(SCHEDULES[schedule]()), witness, keep]
    last = trainer(callbacks, **{"max_epochs": EPOCHS, "enable_checkpointing": True, **settings})
    last.fit(module, batches(), ckpt_path=checkpoint)
    return outcome(module, witness, last) | {"losses": None, "attributes": None, "batches": None, "metrics": None}


def comparable(records: list[Any]) -> list[Any]:
    """Records without what depends on the clock."""

    def timeless(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            key: timeless(value) if isinstance(value, dict) else value
            for key, value in settings.items()
            if key != "seconds"
        }

    return [
        repr({**record.to_dict(), "seconds": 0, "settings": timeless(record.to_dict()["settings"])})
        for record in records
    ]


def unhurried(directory: Path, **settings: Any) -> list[Any]:
    """Plans that do not depend on the clock."""
    settings = {"save_dir": str(directory), "on_error": "raise", **settings}
    return [HessianSpectrumMonitor(probe_samples=6, max_seconds=None, **settings), FeatureRankMonitor(**settings)]


def dataset() -> Any:
    return loader(samples=4 * BATCHES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_anywhere(schedule: str, tmp_path: Path) -> None:
    """Nothing is repeated or skipped; weights, optimizer and random states are those of a run without monitors."""
    plain, path = run([], schedule, Resumable, tmp_path / "plain"), tmp_path / "whole"
    whole = unhurried(path)
    assert run(whole, schedule, Resumable, path) == plain
    uninterrupted = [comparable(monitor.records) for monitor in whole]
    file = sorted(comparable(read_records(path)))
    assert file == sorted([*uninterrupted[0], *uninterrupted[1]])
    for step in (2, 5, 6):
        resumed = unhurried(path)
        found = run(resumed, schedule, Resumable, path, path / f"step={step}.ckpt")
        assert {key for key in plain if plain[key] != found[key]} == set(), step
        assert [comparable(monitor.records) for monitor in resumed] == uninterrupted, step
        assert sorted(comparable(read_records(path))) == file, step


def test_a_loader_that_starts_over_does_so_with_monitors_too(tmp_path: Path) -> None:
    run([], "epochs", dataset, tmp_path / "a")
    run(unhurried(tmp_path / "b"), "epochs", dataset, tmp_path / "b")
    plain = run([], "epochs", dataset, tmp_path / "a", tmp_path / "a" / "step=2.ckpt")
    watching = unhurried(tmp_path / "b")
    assert run(watching, "epochs", dataset, tmp_path / "b", tmp_path / "b" / "step=2.ckpt") == plain
    for monitor in watching:
        found = [(record.task, record.phase, record.failure) for record in monitor.records]
        assert found == [(task, phase, None) for task in (0, 1) for phase in ("start", "end")]


def same_batches() -> Any:
    inputs, labels = data(samples=4)
    return DataLoader(TensorDataset(inputs.repeat(BATCHES, 1), labels.repeat(BATCHES)), batch_size=4)


class Cut(Exception):  # noqa: N818
    """Stands for whatever ends a run early."""


class CutNet(Classifier):
    """Raises after the given optimizer step, in the training step itself or in a measurement of it."""

    cut: tuple[int, bool] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.cut == (self.trainer.global_step, is_measuring()):
            raise KeyboardInterrupt if is_measuring() else Cut
        return super().training_step(batch, batch_idx)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("cut", [(7, False), (0, True), (10, True)], ids=["step", "first measurement", "measurement"])
def test_the_last_checkpoint_of_a_run_that_was_cut(cut: tuple[int, bool], tmp_path: Path) -> None:
    """A measurement of a task's start that was cut is made up for: no step has been taken since.

    All batches are equal, for the one that an exception cuts is lost to a loader that goes on.
    """

    def fit(watching: list[Any], name: str, cut: Any = None, checkpoint: Any = None) -> CutNet:
        torch.manual_seed(0)
        module = CutNet(mlp())
        module.cut = cut
        keep = ModelCheckpoint(tmp_path / name, save_on_exception=True, save_last=True, enable_version_counter=False)
        callbacks = [SeedEachBatch(), *watching, TaskTracker(EveryNSteps(5)), keep]
        run = trainer(callbacks, max_epochs=-1, max_steps=12, enable_checkpointing=True)
        run.fit(module, same_batches(), ckpt_path=checkpoint)
        return module

    when = ("start",) if cut[1] else ("start", "end")
    plain, resumed = (unhurried(tmp_path / "cut", when=when) for _ in range(2))
    whole = unhurried(tmp_path / "whole", when=when)
    expected = fit(whole, "whole")
    with pytest.raises(SystemExit if cut[1] else Cut):
        fit(plain, "cut", cut)
    assert not is_measuring()
    (last,) = [*(tmp_path / "cut").glob("last*.ckpt")] or [None]
    assert last is not None or cut[0] == 0  # Lightning saves nothing before the first step
    found = fit(resumed, "cut", checkpoint=last)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    for one, other in zip(resumed, whole, strict=True):
        assert comparable(one.records) == comparable(other.records)
    read = [sorted(comparable(read_records(tmp_path / name))) for name in ("cut", "whole")]
    assert read[0] == read[1]
