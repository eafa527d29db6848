"""A small module and short fits of it, for the tests of what acts on training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

BATCH, BATCHES = 6, 8  # per epoch


def data(seed: int = 0) -> DataLoader[Any]:
    """Batches in a fixed order: 4 inputs, 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(BATCH * BATCHES, 4, generator=generator)
    labels = torch.randint(0, 3, (BATCH * BATCHES,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=BATCH)


def batches(seed: int = 0, count: int = BATCHES) -> list[Any]:
    """The first of the same, as a list."""
    return [tuple(batch) for batch in data(seed)][:count]


class Net(L.LightningModule):
    """Two hidden layers; equal weights at every construction."""

    def __init__(self, optimizer: str = "sgd", weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3)
            )
        self.optimizer, self.weight_decay = optimizer, weight_decay

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=self.weight_decay)


def trainer(**options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**({"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False} | quiet | options))


def fit(module: L.LightningModule, loader: Any = None, **options: Any) -> L.Trainer:
    """Fit on the same batches every time."""
    run = trainer(**options)
    run.fit(module, data() if loader is None else loader)
    return run


def weights(module: torch.nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
