"""What monitors cost in the steps they do not measure, what a measurement costs, and what L2-ER costs; one core.

Callbacks are compared inside one fit: the Trainer's list of them changes every epoch, so that all lists see the
same minutes of the machine, and ratios are taken round by round. CPU time.

Run: python benchmarks/overhead.py > benchmarks/overhead.txt
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import (
    EveryNEpochs,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    PlasticityAlert,
    TaskTracker,
    TrainabilityProbe,
)
from lightning_plasticity.demo.network import L2ER, Plain
from lightning_plasticity.streams import RandomLabelDigits

ATTACHED = "tracker and both monitors"
ALL = "and probe and alert"
VARIANTS = ("plain", "three empty callbacks", "tracker", ATTACHED, ALL)


class Empty(Callback):
    """What Lightning's calling of hooks costs by itself."""


class Convolutions(LightningModule):
    """Four convolutions on 32 x 32 images, batch 32: a step of some tens of milliseconds, still a small one."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64)
        parts: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            parts += [nn.Conv2d(before, after, 3, stride=1 + index % 2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def images(batches: int = 5) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32 * batches, 3, 32, 32), torch.randint(10, (32 * batches,))), 32)


class Switch(Callback):
    """Times epochs under one list of callbacks after the other, in an order that changes every round."""

    def __init__(self, lists: dict[str, list[Callback]]) -> None:
        self.lists = lists
        self.seconds: dict[str, list[float]] = {name: [] for name in lists}
        self.left: list[str] = []
        self.now: str | None = None  # nothing in the first epoch, with the measurements
        self.steps = 0
        self.order = random.Random(0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        taken, steps = trainer.global_step, trainer.global_step - self.steps
        if self.now is not None:
            self.seconds[self.now].append((time.process_time() - self.started) / steps)
        self.left = self.left or self.order.sample(list(self.lists), len(self.lists))
        self.now, self.steps = self.left.pop(), taken
        trainer.callbacks = [*self.lists[self.now], self]  # type: ignore[attr-defined]
        self.started = time.process_time()


def trainer(epochs: int, callbacks: list[Callback], reload: int = 0) -> Trainer:
    seed_everything(0, verbose=False)
    return Trainer(
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=reload,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def steps(module: LightningModule, data: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by variant, one number for each round."""
    epochs = 1 + len(VARIANTS) * rounds
    tracker = TaskTracker(EveryNEpochs(10 * epochs))
    monitors = [HessianSpectrumMonitor(probe_samples=150, when="start"), FeatureRankMonitor(when="start")]
    empty = [type(f"Empty{index}", (Empty,), {})() for index in range(3)]
    more = [tracker, *monitors, TrainabilityProbe(num_steps=5, seeds=1), PlasticityAlert()]
    switch = Switch(dict(zip(VARIANTS, ([], empty, [tracker], [tracker, *monitors], more), strict=True)))
    trainer(epochs, [*more, switch]).fit(module, data)
    assert [len(monitor.records) for monitor in monitors] == [1, 1]
    return switch.seconds


def l2er(epochs: int, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """Ratios of L2-ER to plain training, run by run; seconds of a boundary measurement by monitor."""
    ratios, boundaries = [], {"HessianSpectrumMonitor": [], "FeatureRankMonitor": []}
    for _ in range(rounds):
        monitors = [HessianSpectrumMonitor(probe_samples=150, when="start"), FeatureRankMonitor(when="start")]
        trainer(2, [TaskTracker(EveryNEpochs(1)), *monitors], 1).fit(Plain(), RandomLabelDigits(2, 1))
        for monitor in monitors:
            boundaries[type(monitor).__name__] += [record.seconds for record in monitor.records]
        seconds = []
        for network in (Plain, L2ER):
            started = time.process_time()
            trainer(epochs, [], epochs).fit(network(), RandomLabelDigits(1, epochs))
            seconds.append(time.process_time() - started)
        ratios.append(seconds[1] / seconds[0])
    return ratios, boundaries


def interval(values: Sequence[float]) -> str:
    """Median, and the 95 % interval of the median from order statistics (binomial, no assumption on the noise)."""
    ranked, n = sorted(values), len(values)
    away = round(0.98 * n**0.5)
    low, high = ranked[max(0, n // 2 - away)], ranked[min(n - 1, (n - 1) // 2 + away)]
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def table(title: str, found: dict[str, list[float]]) -> None:
    print(title)
    for name, seconds in found.items():
        ratios = [value / plain for value, plain in zip(seconds, found["plain"], strict=True)]
        print(f"  {name:28s} {1e3 * statistics.median(seconds):7.3f} ms per step, ratio {interval(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"Medians (95 % interval of the median); torch {torch.__version__}, one thread, CPU time")
    small = steps(Plain(), RandomLabelDigits(1, 1), 5 if quick else 400)
    table(f"MLP 64-100-100-100-10, batch 16, {len(small['plain'])} rounds of 25 steps each", small)
    large = steps(Convolutions(), images(), 2 if quick else 80)
    table(f"Four convolutions, 32 x 32, batch 32, {len(large['plain'])} rounds of 5 steps each", large)
    ratios, boundaries = l2er(30, 1 if quick else 9)
    print(f"L2-ER on the MLP: ratio {interval(ratios)} over {len(ratios)} pairs of runs")
    task = statistics.median(small["plain"]) * 750
    for name, values in boundaries.items():
        median = statistics.median(values)
        print(f"{name}: {median:.3f} s per boundary, {100 * median / task:.1f} % of a plain task of 750 steps")


if __name__ == "__main__":
    main()
