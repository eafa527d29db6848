"""Lightning is published as two packages with classes of their own: runs with either give the same bits."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from small_fits import batches, data
from states import bits

import lightning_plasticity
from lightning_plasticity import (
    L2,
    EffectiveRank,
    EveryNEpochs,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    Regularization,
    TaskTracker,
    callbacks,
)
from lightning_plasticity._optional import if_installed

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SECOND = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}


@cache
def network(package: str) -> type:
    """A module of that package, with a hand-written logger call, which a measurement must not repeat."""

    class Net(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            for logger in self.loggers:
                logger.log_metrics({"by_hand": 1.0})
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Net


@cache
def mixed(package: str) -> type:
    class Mixed(L2ERMixin, network(package)):  # type: ignore[misc]
        rank_every_n_steps = 3

    return Mixed


@cache
def tasks(package: str) -> type:
    class Tasks(import_module(package).LightningDataModule):  # type: ignore[misc]
        task_id = 7

        def train_dataloader(self) -> Any:
            return data()

    return Tasks


@cache
def counter(package: str) -> type:
    """A user's own stateful callback, of either package, with our hooks."""

    class Counter(import_module(package).Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.seen.append(("start", task))

        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.seen.append(("end", task))

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = list(state["seen"])

    return Counter


def monitors() -> list[Any]:
    return [
        HessianSpectrumMonitor(on_error="raise", probe_samples=6, num_steps=6, max_seconds=None),
        FeatureRankMonitor(on_error="raise", probe_samples=8),
    ]


def trainer(package: str, callbacks: Sequence[Any], **settings: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return import_module(package).Trainer(callbacks=list(callbacks), **{**quiet, "max_epochs": 4, **settings})


def weights(module: Any) -> list[bytes]:
    return [bits(parameter) for parameter in module.state_dict().values()]


def values(monitor: Any) -> list[Any]:
    return [(record.task, record.phase, record.step, record.values, record.failure) for record in monitor.records]


# Each run has its folder here, so that nothing is shared.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("other", [False, True], ids=["own-callbacks", "callbacks-of-the-other"])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_resumed_run(package: str, other: bool, tmp_path: Path) -> None:
    """Mixin, monitors, tracker and a stateful callback, cut after three of four epochs and resumed: as uncut."""

    if other and tuple(map(int, version("lightning").split(".")[:2])) < (2, 6):
        pytest.skip("Lightning before 2.6 refuses a user's callback of the other package")  # ours are of both

    def run(folder: str, epochs: int, checkpoint: Any = None) -> Any:
        module = mixed(package)()
        own = counter(SECOND[package] if other else package)()
        saver = import_module(f"{package}.callbacks").ModelCheckpoint(tmp_path / folder, save_last=True)
        used = [TaskTracker(EveryNEpochs(2)), *monitors(), own, saver]
        last = trainer(package, used, max_epochs=epochs)
        last.fit(module, datamodule=tasks(package)(), ckpt_path=checkpoint)
        return weights(module), own.seen, [values(monitor) for monitor in used[1:3]], used[0].task

    whole = run("whole", 4)
    assert whole[1] == [("start", 0), ("end", 0), ("start", 1), ("end", 1)]
    assert [len(records) for records in whole[2]] == [4, 4]
    run("cut", 3)
    assert run("resumed", 4, tmp_path / "cut" / "last.ckpt") == whole


def results(package: str) -> dict[str, Any]:
    """What a run leaves: weights, records, callback metrics, and what reached the logger."""
    module, used = network(package)(), [*monitors(), Regularization([EffectiveRank(0.1, every_n_steps=3), L2(1e-3)])]
    logger = import_module(f"{package}.loggers").CSVLogger(".", package)
    stopper = import_module(f"{package}.callbacks").EarlyStopping("plasticity/ggn/trace", check_on_train_epoch_end=True)
    last = trainer(package, [*used, stopper], logger=logger, enable_checkpointing=False, max_epochs=1)
    last.fit(module, datamodule=tasks(package)())
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    return {
        "weights": weights(module),
        "records": [values(monitor) for monitor in used[:2]],
        "metrics": {key: float(value) for key, value in last.callback_metrics.items()},
        "logged": sorted(rows[0].split(",")),
        "by hand": sum(bool(row.split(",")[rows[0].split(",").index("by_hand")]) for row in rows[1:]),
        "stopped on": float(stopper.best_score),
    }


def test_both_give_the_same_bits() -> None:
    first, second = (results(package) for package in PACKAGES)
    assert first == second
    assert first["metrics"]["plasticity/ggn/trace"] == first["stopped on"] > 0
    assert "plasticity/features/effective_rank" in first["metrics"]
    assert "plasticity/ggn/trace" in first["logged"]
    assert first["by hand"] == len(batches())  # a measurement writes none of its own


@pytest.mark.parametrize("package", PACKAGES)
def test_monitors_change_no_bit(package: str) -> None:
    outcomes = []
    for used in ([], monitors()):
        module = mixed(package)()
        trainer(package, used, enable_checkpointing=False, max_epochs=1).fit(module, datamodule=tasks(package)())
        outcomes.append(weights(module))
    assert outcomes[0] == outcomes[1]


def test_every_callback_is_one_of_both_packages() -> None:
    bases = [import_module(package).Callback for package in PACKAGES]
    for namespace in (lightning_plasticity, callbacks):
        for name in namespace.__all__:
            found = getattr(namespace, name)
            if isinstance(found, type) and issubclass(found, tuple(bases)):
                assert all(issubclass(found, base) for base in bases), f"derive {name} from callbacks.base.Callback"


@pytest.mark.parametrize("failing", ["raise ImportError('not here')", "raise RuntimeError('made for another torch')"])
def test_the_second_package_may_be_missing_or_broken(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_lightning.py").write_text(failing)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    again = runpy.run_path(str(callbacks.base.__file__))
    assert again["Callback"].__bases__ == (import_module("lightning.pytorch").Callback,)


def test_what_is_installed_is_imported() -> None:
    assert if_installed("lightning_plasticity_no_such") is None
    assert if_installed("json") is sys.modules["json"]
