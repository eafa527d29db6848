"""What measuring and L2-ER cost at the demo's settings, as ratios to the same run without; one core, interleaved.

Run: python benchmarks/overhead.py > benchmarks/overhead.txt
"""

import itertools
import logging
import statistics
import time
import warnings

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_plasticity import EveryNEpochs, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker
from lightning_plasticity.demo.network import L2ER, Plain
from lightning_plasticity.streams import RandomLabelDigits

TASKS, EPOCHS, ROUNDS = 2, 30, 9


class Steps(Callback):
    """CPU time at the end of every training step."""

    def __init__(self):
        self.ticks = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ticks.append(time.process_time())

    def seconds(self):
        """Mean step without the slowest hundredth, which holds the measurements."""
        steps = sorted(after - before for before, after in itertools.pairwise(self.ticks))
        return statistics.mean(steps[: -len(steps) // 100])


class Empty(Callback):
    """What Lightning's calling of hooks costs by itself."""

    records = ()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass


class AlsoEmpty(Empty):
    """Lightning wants callbacks of different types."""


def run(network, monitors):
    """(seconds per step, seconds per boundary measurement by monitor)."""
    seed_everything(0, verbose=False)
    clock = Steps()
    trainer = Trainer(
        max_epochs=TASKS * EPOCHS,
        reload_dataloaders_every_n_epochs=EPOCHS,
        callbacks=[TaskTracker(EveryNEpochs(EPOCHS)), *monitors, clock],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(network(), RandomLabelDigits(TASKS, EPOCHS))
    boundary = {type(m).__name__: statistics.mean(r.seconds for r in m.records) for m in monitors if m.records}
    return clock.seconds(), boundary


def main():
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    steps = {"plain": [], "plain, two empty callbacks": [], "plain, monitors attached": [], "L2-ER": []}
    boundaries = {}
    for _ in range(ROUNDS):
        steps["plain"].append(run(Plain, [])[0])
        steps["plain, two empty callbacks"].append(run(Plain, [Empty(), AlsoEmpty()])[0])
        monitors = [HessianSpectrumMonitor(probe_samples=150, when="start"), FeatureRankMonitor(when="start")]
        seconds, boundary = run(Plain, monitors)
        steps["plain, monitors attached"].append(seconds)
        for name, value in boundary.items():
            boundaries.setdefault(name, []).append(value)
        steps["L2-ER"].append(run(L2ER, [])[0])
    base = statistics.median(steps["plain"])
    task = base * EPOCHS * 25
    print(f"{ROUNDS} interleaved rounds of {TASKS} tasks, medians (min-max); torch {torch.__version__}, one thread")
    for name, values in steps.items():
        ratios = [value / plain for value, plain in zip(values, steps["plain"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"{name:26s} {1e3 * statistics.median(values):6.3f} ms per step, ratio {spread}")
    for name, values in boundaries.items():
        median = statistics.median(values)
        print(f"{name:26s} {median:6.3f} s per boundary, {100 * median / task:.1f} % of a plain task of 750 steps")


if __name__ == "__main__":
    main()
