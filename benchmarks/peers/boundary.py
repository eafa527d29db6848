"""What the monitors' default settings cost at a task boundary, as a share of training on the task's 60,000 samples."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import problems
from benchmarks.peers.timing import cpu_seconds, repeated
from lightning_plasticity import EveryNEpochs, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker

SAMPLES = 60_000
BATCH_SIZES = (1, 16, 32, 64, 128, 256)
MONITORS = {
    "HessianSpectrumMonitor": lambda: HessianSpectrumMonitor(),
    "HessianSpectrumMonitor(quantities=('ggn',))": lambda: HessianSpectrumMonitor(quantities=("ggn",)),
    "FeatureRankMonitor": lambda: FeatureRankMonitor(),
}


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def boundary(network: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """Seconds of one measurement by each monitor (one task start), and of one epoch by batch size."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measurements: dict[str, list[float]] = {name: [] for name in MONITORS}
    for _ in range(rounds):
        for name, build in MONITORS.items():
            measurements[name].append(_measurement(network, build()))
    epochs = {size: _epoch(network, size, min_seconds) for size in BATCH_SIZES}
    rows = {f"{name}, one measurement": {"seconds": found} for name, found in measurements.items()}
    for size, seconds in epochs.items():
        shares = [f"{name}: {100 * statistics.median(found) / seconds:.1f} %" for name, found in measurements.items()]
        rows[f"epoch, batch size {size}"] = {"seconds": [seconds], "note": "; ".join(shares)}
    return {"rows": rows}


def _measurement(network: str, monitor: Any) -> float:
    """Clock of the hook that measures at a task's start, in CPU seconds."""
    problem = problems.make(f"{network}-1024")
    spent: list[float] = []
    inner = monitor.measure

    def timed(*args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        spent.append(cpu_seconds(lambda: result.append(inner(*args, **kwargs))))
        return result[0]

    monitor.measure = timed
    trainer = Trainer(
        max_steps=1,
        callbacks=[TaskTracker(EveryNEpochs(1)), monitor],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(problem.model), DataLoader(TensorDataset(*problem.data), batch_size=64))
    failures = [record for record in monitor.records if getattr(record, "failures", None)]
    if failures or not spent:
        raise RuntimeError(f"the measurement failed: {failures}")
    return spent[0]


def _epoch(network: str, batch_size: int, min_seconds: float) -> float:
    """A plain loop with SGD, no Lightning: the least that training can cost."""
    problem = problems.make(f"{network}-{batch_size}")
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(problem.model(problem.inputs), problem.targets).backward()
        optimizer.step()

    step()
    return repeated(step, 0.0 if min_seconds else cpu_seconds(step), min_seconds, max_calls=50) * SAMPLES / batch_size
