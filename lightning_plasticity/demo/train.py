"""Train one of the demo's networks and send its numbers, task by task, to whoever shows them."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_plasticity.callbacks import EveryNEpochs, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker
from lightning_plasticity.demo.network import METHODS
from lightning_plasticity.records import FILE_NAME
from lightning_plasticity.streams import RandomLabelDigits

PROBE_SAMPLES = 150
Row = dict[str, float]


class RowReporter(Callback):
    """Sends a row when a task ends: its mean online accuracy, and what the monitors saw at its start."""

    def __init__(
        self, spectra: HessianSpectrumMonitor, features: FeatureRankMonitor, send: Callable[[Row], None]
    ) -> None:
        self.spectra = spectra
        self.features = features
        self.send = send
        self._accuracies: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the accuracy before each update."""
        self._accuracies.append(outputs["accuracy"])

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Close the row."""
        accuracy = float(torch.stack(self._accuracies).mean())
        self._accuracies.clear()
        for logger in trainer.loggers:
            logger.log_metrics({"online_accuracy": accuracy}, step=trainer.global_step)
        self.send({"online_accuracy": accuracy} | self._measured())

    def _measured(self) -> Row:
        curvature, ranks = self.spectra.records[-1].values, self.features.records[-1].values
        last_layer = [key for key in ranks if key.startswith("plasticity/features/effective_rank/")][-1]
        return {
            "ggn_eps_rank_0.01": curvature["plasticity/ggn/eps_rank_0.01"].value,
            "effective_rank": ranks[last_layer].value,
            "dead_units": ranks["plasticity/features/dead_units"].value,
        }


def train(method: str, seed: int, out: Path, num_tasks: int, epochs: int, send: Callable[[Row], None]) -> None:
    """One network through the whole stream; one core, optimizer state kept over tasks."""
    torch.set_num_threads(1)
    _quiet()
    seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(out / "tensorboard", name=method, version=f"seed{seed}")
    _forget_earlier_run(Path(logger.log_dir))
    # No bound on seconds: what is measured must not depend on how busy the machine is.
    spectra = HessianSpectrumMonitor(probe_samples=PROBE_SAMPLES, when="start", max_seconds=None)
    features = FeatureRankMonitor(when="start")
    trainer = Trainer(
        max_epochs=num_tasks * epochs,
        reload_dataloaders_every_n_epochs=epochs,
        callbacks=[TaskTracker(EveryNEpochs(epochs)), spectra, features, RowReporter(spectra, features, send)],
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(METHODS[method](), RandomLabelDigits(num_tasks, epochs, seed=seed))


def run_directory(out: Path, method: str, seed: int) -> Path:
    """Where a network's records, spectra and TensorBoard files are."""
    return out / "tensorboard" / method / f"seed{seed}"


def _forget_earlier_run(directory: Path) -> None:
    """Two runs in one directory would be drawn over one another."""
    if (directory / FILE_NAME).exists():
        shutil.rmtree(directory)


def _quiet() -> None:
    """Lightning's hints on devices, workers and logging intervals say nothing about this demo."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for hint in ("does not have many workers", "The number of training batches", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{hint}.*")
