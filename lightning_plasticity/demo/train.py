"""Train one of the demo's networks and send its numbers, task by task, to whoever shows them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_plasticity.callbacks import EveryNEpochs, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker
from lightning_plasticity.demo.network import METHODS
from lightning_plasticity.streams import RandomLabelDigits

PROBE_SAMPLES = 150
Row = dict[str, float]


class RowReporter(Callback):
    """Sends (task, row) when a task ends."""

    def __init__(self, spectra: HessianSpectrumMonitor, features: FeatureRankMonitor, send: Callable[[int, Row], None]):
        self.spectra = spectra
        self.features = features
        self.send = send

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        """The module's hook, which closes the accuracy, comes after the callbacks': hence the mean taken here."""
        accuracy = float(torch.stack(pl_module._correct).mean())
        self.send(task, row_of(self.spectra, self.features) | {"online_accuracy": accuracy})


def row_of(spectra: HessianSpectrumMonitor, features: FeatureRankMonitor) -> Row:
    """The numbers at the start of the task that is ending."""
    curvature, ranks = spectra.records[-1].values, features.records[-1].values
    last = [key for key in ranks if key.startswith("plasticity/features/effective_rank/")][-1]
    return {
        "ggn_eps_rank_0.01": curvature["plasticity/ggn/eps_rank_0.01"].value,
        "effective_rank": ranks[last].value,
        "dead_units": ranks["plasticity/features/dead_units"].value,
    }


def train(method: str, seed: int, out: Path, num_tasks: int, epochs: int, send: Callable[[int, Row], None]) -> None:
    """One network through the whole stream; one core, optimizer state kept over tasks."""
    torch.set_num_threads(1)
    _quiet()
    seed_everything(seed, verbose=False)
    spectra = HessianSpectrumMonitor(probe_samples=PROBE_SAMPLES, when="start")
    features = FeatureRankMonitor(when="start")
    trainer = Trainer(
        max_epochs=num_tasks * epochs,
        reload_dataloaders_every_n_epochs=epochs,
        callbacks=[TaskTracker(EveryNEpochs(epochs)), spectra, features, RowReporter(spectra, features, send)],
        logger=TensorBoardLogger(out / "tensorboard", name=method, version=f"seed{seed}"),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(METHODS[method](), RandomLabelDigits(num_tasks, epochs, seed=seed))


def _quiet() -> None:
    """Lightning's hints on devices, workers and logging intervals say nothing about this demo."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches.*")
