"""What the monitors' default settings cost at a task boundary: the time next to training on the task's 60,000 samples,
and the memory next to that of a training step.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import problems
from benchmarks.peers.run import start
from benchmarks.peers.targets import Line, spread
from benchmarks.peers.timing import cpu_seconds, memory_mb, peak_mb, repeated
from lightning_plasticity import EveryNEpochs, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker

SAMPLES = 60_000
BATCH_SIZES = (1, 16, 32, 64, 128, 256)
MEMORY_SIZES = (1, 64, 256)
PAPER = 1  # the batch size of Dohare et al. 2024 and of Prakash et al. 2026 on Permuted MNIST, with plain SGD
MAX_SHARE, MAX_MEMORY = 0.03, 4.0
MONITORS: dict[str, Callable[[], list[Any]]] = {
    "both monitors": lambda: [HessianSpectrumMonitor(), FeatureRankMonitor()],
    "HessianSpectrumMonitor(quantities=('ggn',))": lambda: [HessianSpectrumMonitor(quantities=("ggn",))],
    "FeatureRankMonitor": lambda: [FeatureRankMonitor()],
}
DEFAULT = "both monitors"


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def boundary(subject: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """Seconds of both measurements of a task (its start and its end) by each monitor, and of an epoch by batch size."""
    tasks: dict[str, list[float]] = {name: [] for name in MONITORS}
    epochs: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    _task(subject, [FeatureRankMonitor()])  # Lightning's first fit loads code
    for _ in range(min(rounds, 2)):
        for name, build in MONITORS.items():
            tasks[name].append(sum(_task(subject, build())["seconds"]))
        for size in BATCH_SIZES:
            epochs[size].append(_epoch(subject, size, min_seconds))
    rows: dict[str, Any] = {f"{name}, start and end": {"seconds": found} for name, found in tasks.items()}
    lines = []
    for size, seconds in epochs.items():
        shares = {name: [a / b for a, b in zip(found, seconds, strict=True)] for name, found in tasks.items()}
        note = "; ".join(f"{name}: {100 * statistics.median(share):.1f} %" for name, share in shares.items())
        rows[f"epoch, batch size {size}"] = {"seconds": seconds, "note": note}
        share = [100 * value for value in shares[DEFAULT]]
        met = statistics.median(share) <= 100 * MAX_SHARE
        what = f"default measurement, {subject}, share of an epoch at batch size {size}"
        what += " (plain SGD, the paper's protocol)" if size == PAPER else ""
        lines.append(Line(what, f"< {100 * MAX_SHARE:g} %", f"{spread(share, '.1f')} %", met))
    memory, memory_lines = _memory(subject)
    return {"rows": rows | memory, "lines": [asdict(line) for line in lines + memory_lines]}


def _task(subject: str, monitors: list[Any]) -> dict[str, list[float]]:
    """CPU seconds of every measurement of one short task, and the memory that each added to what was held (MB)."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    problem = problems.make(f"{subject}-4096")
    found: dict[str, list[float]] = {"seconds": [], "peak_mb": []}
    for monitor in monitors:
        _watch(monitor, found)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        callbacks=[TaskTracker(EveryNEpochs(1)), *monitors],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(problem.model), DataLoader(TensorDataset(*problem.data), batch_size=64))
    failures = [record for monitor in monitors for record in monitor.records if getattr(record, "failures", None)]
    if failures or len(found["seconds"]) != 2 * len(monitors):
        raise RuntimeError(f"{len(found['seconds'])} measurements by {len(monitors)} monitors; failures: {failures}")
    return found


def _watch(monitor: Any, found: dict[str, list[float]]) -> None:
    inner = monitor.measure

    def watched(*args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        before = memory_mb()
        found["seconds"].append(cpu_seconds(lambda: result.append(inner(*args, **kwargs))))
        found["peak_mb"].append(peak_mb() - before)
        return result[0]

    monitor.measure = watched


def _epoch(subject: str, batch_size: int, min_seconds: float) -> float:
    """A plain loop with SGD, no Lightning: the least that training can cost."""
    problem = problems.make(f"{subject}-{batch_size}")
    step = _step(problem)
    step()
    return repeated(step, 0.0 if min_seconds else cpu_seconds(step), min_seconds, max_calls=50) * SAMPLES / batch_size


def _step(problem: problems.Problem) -> Callable[[], None]:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(problem.model(problem.inputs), problem.targets).backward()
        optimizer.step()

    return step


# Memory: one fresh process for each number.


def _memory(subject: str) -> tuple[dict[str, Any], list[Line]]:
    jobs = {f"one step, batch size {size}": ("step-memory", {"batch_size": size}) for size in MEMORY_SIZES}
    jobs[f"{DEFAULT}, one measurement"] = ("measurement-memory", {"monitors": DEFAULT})
    peaks = {}
    for name, (task, arguments) in jobs.items():
        (found,) = start([{"task": task, "arguments": {"subject": subject} | arguments}], timeout=300)
        if "failed" in found:
            raise RuntimeError(f"memory of {name}: {found['failed']}")
        peaks[name] = found["peak_mb"]
    rows = {f"memory of {name}": {"peak_mb": [peak]} for name, peak in peaks.items()}
    added, lines = peaks[f"{DEFAULT}, one measurement"], []
    for size in MEMORY_SIZES:
        step = max(peaks[f"one step, batch size {size}"], 0.1)
        what = f"memory that the default measurement adds, {subject}, over a step's at batch size {size}"
        measured = f"{added / step:.1f}x ({added:.0f} MB, {step:.0f} MB)"
        lines.append(Line(what, f"<= {MAX_MEMORY:g}x", measured, added <= MAX_MEMORY * step))
    return rows, lines


def step_memory(subject: str, batch_size: int) -> dict[str, float]:
    """What a training step holds at its peak: weights, gradients, activations (and what its first call loads)."""
    warm = problems.make("tiny-8")
    _step(warm)()
    before = memory_mb()
    _step(problems.make(f"{subject}-{batch_size}"))()
    return {"peak_mb": peak_mb() - before}


def measurement_memory(subject: str, monitors: str) -> dict[str, float]:
    """The most that one measurement adds to what training holds; the first one of a process, so nothing is reused."""
    _task("tiny", MONITORS[monitors]())
    return {"peak_mb": max(_task(subject, MONITORS[monitors]())["peak_mb"])}
