"""Small LightningModules, loaders and whole runs, with everything a run leaves behind as values to compare."""

from __future__ import annotations

import csv
import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from states import attributes, bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor

CLASSES = 3
Make = Callable[[], L.LightningModule]


class Classifier(L.LightningModule):
    """Any network under cross-entropy, with a metric, logging and a learning-rate schedule."""

    def __init__(self, net: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.losses.append(float(loss.detach()))
        self.accuracy(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Manual(Classifier):
    """Two optimizers and a scheduler, stepped by hand."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if batch_idx % 2:  # gradients are alive at the end of a task: a step that is taken there shows
            first.zero_grad()
            second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        second.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        *body, weight, bias = self.net.parameters()
        first, second = torch.optim.Adam(body, lr=0.01), torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 1, 0.9)]


class LastStep(nn.Module):
    """An LSTM and a linear layer on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(len(x), -1, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.reshape(len(x), -1, 4)).mean(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout2d(0.3),
        nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, CLASSES),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "lstm": LastStep, "attention": Attention}


def data(task: int = 0, samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    return torch.randn(samples, 16, generator=generator), torch.randint(CLASSES, (samples,), generator=generator)


def loader(task: int = 0, samples: int = 12, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(task, samples)), **{"batch_size": 4, **settings})


def monitors(on_error: Any = "raise", **settings: Any) -> list[L.Callback]:
    return [
        HessianSpectrumMonitor(("ggn", "hessian", "ntk"), probe_samples=6, num_steps=6, on_error=on_error, **settings),
        FeatureRankMonitor(probe_samples=8, on_error=on_error, **settings),
    ]


def trainer(callbacks: Sequence[L.Callback] = (), **settings: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


def loading(weights_only: bool) -> dict[str, bool]:
    """An argument of ``Trainer.fit`` that Lightning has from 2.6 on; earlier ones load whatever the file holds."""
    return {"weights_only": weights_only} if "weights_only" in inspect.signature(L.Trainer.fit).parameters else {}


class Witness(L.Callback):
    """Notes the batches that training sees and the optimizers' state at the end."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.optimizers: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(leaves(batch))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.optimizers.append(leaves([o.state_dict() for o in trainer.optimizers]))
        self.optimizers.append(leaves([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]))


def leaves(value: Any) -> Any:
    """Nested tensors as bytes."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: leaves(item) for key, item in value.items()}
    if is_dataclass(value):
        return leaves(vars(value))
    return [leaves(item) for item in value] if isinstance(value, list | tuple) else repr(value)


def outcome(module: L.LightningModule, witness: Witness, last: L.Trainer) -> dict[str, Any]:
    """What a run leaves behind, apart from what monitors log."""
    metrics = {key: bits(value) for key, value in last.callback_metrics.items() if "plasticity" not in key}
    return {
        "weights": {name: bits(parameter) for name, parameter in module.named_parameters()},
        "buffers": {name: bits(buffer) for name, buffer in module.named_buffers()},
        "gradients": {name: leaves(parameter.grad) for name, parameter in module.named_parameters()},
        "losses": repr(getattr(module, "losses", None)),
        "attributes": attributes(module),
        "optimizers": witness.optimizers,
        "batches": witness.batches,
        "metrics": metrics,
        "steps": last.global_step,
        "torch rng": bits(torch.get_rng_state()),
        "python rng": random.getstate(),
        "numpy rng": str(np.random.get_state()),
    }


def csv_rows(directory: Path) -> list[dict[str, str]]:
    """Rows of a CSV logger's file without the monitors' columns, and without rows that held only those."""
    with open(directory / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if "plasticity" not in k} for row in csv.DictReader(file)]
    return [row for row in rows if any(value for key, value in row.items() if key not in ("step", "epoch"))]


def fit_tasks(
    make: Make,
    tasks: Iterable[Any],
    callbacks: Sequence[L.Callback],
    directory: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Train on one task after the other, a Trainer each, from a fixed seed; the outcome of it all."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    module, witness, logger = make(), Witness(), CSVLogger(directory, name="", version="")
    for task in tasks:
        last = trainer([*callbacks, witness], logger=logger, **settings)
        last.fit(module, task)
    return outcome(module, witness, last) | {"csv": csv_rows(directory)}


def run_tasks(make: Make, tasks: list[Any], callbacks: list[Any], **settings: Any) -> tuple[dict[str, Any], list[str]]:
    """The outcome, and the warnings of the monitors."""
    torch.manual_seed(0)
    random.seed(0)
    module, witness = make(), Witness()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in tasks:
            last = trainer([*callbacks, witness], **settings)
            last.fit(module, task)
    return outcome(module, witness, last), [str(w.message) for w in caught if "Monitor" in str(w.message)]


def same_with(
    make: Make,
    tasks: Callable[[], list[Any]],
    pair: list[Any],
    extra: Callable[[], list[Any]] = list,
    **settings: Any,
) -> list[str]:
    """Run with and without, beside new ``extra`` callbacks; the outcomes are equal. Returns the warnings."""
    plain, _ = run_tasks(make, tasks(), extra(), **settings)
    watched, told = run_tasks(make, tasks(), [*pair, *extra()], **settings)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    return told
