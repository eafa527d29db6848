"""Errors, interrupts and full memory in the middle of a measurement: all is as it was, and the run goes on or ends."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from runs import NETWORKS, Classifier, loader, same_with, trainer
from states import changed, state
from torch import Tensor, nn

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from lightning_plasticity.nn import is_measuring


class Bomb:
    """Raises in a measurement, from the n-th time on that a place is reached; outside the module, which is put back."""

    place, times, count = "", 1, 0
    error: BaseException = ZeroDivisionError()

    def reach(self, place: str) -> None:
        if is_measuring() and place == self.place:
            self.count += 1
            if self.count >= self.times:
                raise self.error


BOMB = Bomb()


class Fuse(nn.Module):
    """Gives its input back; its backward pass, and that of the backward pass, are products of a measurement."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and is_measuring():
            x = x * 1.0
            x.register_hook(lambda gradient: BOMB.reach("product"))
        return x


class Breaking(Classifier):
    def __init__(self) -> None:
        super().__init__(NETWORKS["conv"]())
        self.net.append(Fuse())  # type: ignore[operator]
        self.net[1].register_forward_hook(lambda *_: BOMB.reach("forward hook"))  # type: ignore[index]
        self.net[6].register_forward_pre_hook(lambda *_: BOMB.reach("pre-hook"))  # type: ignore[index]
        self.net[6].weight.register_hook(lambda gradient: BOMB.reach("gradient hook"))  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        BOMB.reach("step")
        return loss


def set_bomb(place: str, times: int, error: BaseException) -> None:
    BOMB.place, BOMB.times, BOMB.error, BOMB.count = place, times, error, 0


class Before(L.Callback):
    """The whole state just before the monitors measure, and what is different when the run has been ended there."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.differences: list[list[str]] = []
        self.loggers: list[Any] = []

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        held = [pl_module, *trainer.optimizers, *[c.scheduler for c in trainer.lr_scheduler_configs]]
        found = state(pl_module) | {"names": [sorted(vars(each)) for each in held]}
        return {key: value for key, value in found.items() if "_current_fx_name" not in key}

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.before, self.loggers = self.look(trainer, pl_module), list(trainer.loggers)

    def compare(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.differences.append(changed(self.before, self.look(trainer, pl_module)))
        assert all(now is then for now, then in zip(trainer.loggers, self.loggers, strict=True))

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.compare(trainer, pl_module)


class After(L.Callback):
    """The same when the run goes on."""

    def __init__(self, before: Before) -> None:
        self.before = before

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.before.compare(trainer, pl_module)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    assert not is_measuring()


def watching(directory: Path | None = None) -> list[Any]:
    settings: dict[str, Any] = {"probe_samples": 6, "save_dir": None if directory is None else str(directory)}
    return [HessianSpectrumMonitor(max_seconds=None, num_steps=6, **settings), FeatureRankMonitor(**settings)]


CASES = [("step", 1), ("step", 4), ("forward hook", 2), ("pre-hook", 1), ("gradient hook", 1), ("gradient hook", 5),
         ("product", 1), ("product", 5)]  # fmt: skip
ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: ZeroDivisionError("mine"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory of the CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory"),
}


@pytest.mark.parametrize(("place", "times"), CASES, ids=str)
def test_interrupts_end_the_run_and_leave_all_as_it_was(place: str, times: int, tmp_path: Path) -> None:
    torch.manual_seed(0)  # how many products there are at the start depends on the weights
    pair, before = watching(tmp_path / "records"), Before()
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer([before, *pair], logger=logger)
    set_bomb(place, times, KeyboardInterrupt())
    with pytest.raises(SystemExit):
        run.fit(Breaking(), loader())
    assert BOMB.count == times  # it was reached
    assert before.differences == [[]]
    assert run.global_step == 0
    assert run.interrupted
    assert all(monitor.records == [] for monitor in pair) or place in ("step", "forward hook", "pre-hook")
    file = tmp_path / "records" / "plasticity.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len(kept) == sum(len(monitor.records) for monitor in pair)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(("place", "times"), CASES[::2], ids=str)
def test_errors_are_recorded_and_training_is_the_same(place: str, times: int, kind: str) -> None:
    pair, before = watching(), Before()

    set_bomb(place, times, ERRORS[kind]())
    told = same_with(Breaking, lambda: [loader(0), loader(1)], [before, *pair, After(before)])
    assert BOMB.count >= times
    assert before.differences == [[], []]
    failed = [record for monitor in pair for record in monitor.records if record.failure is not None]
    assert failed
    assert len(told) == len({record.monitor for record in failed})
    assert all(str(BOMB.error) in record.failure for record in failed)
    for monitor in pair:
        assert [(r.task, r.phase) for r in monitor.records] == [(t, p) for t in (0, 1) for p in ("start", "end")]


class Greedy(Classifier):
    """Takes much memory while it is measured, then runs out of it."""

    def __init__(self) -> None:
        super().__init__(NETWORKS["mlp"]())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if is_measuring():
            taken = self.net[0].weight.expand(64, -1, -1) * loss  # type: ignore[index,operator]
            TAKEN.append(weakref.ref(taken))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


TAKEN: list[Any] = []


class Freed(L.Callback):
    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.left = [each for each in TAKEN if each() is not None]


def test_what_a_failed_measurement_took_is_freed_at_once() -> None:
    """Without waiting for the garbage collector, for the next training step needs it."""
    TAKEN.clear()
    pair, freed = watching(), Freed()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="OutOfMemoryError: CUDA out of memory"):
            trainer([*pair, freed]).fit(Greedy(), loader())
    finally:
        gc.enable()
    assert TAKEN
    assert freed.left == []
    assert all(record.failure for monitor in pair for record in monitor.records)
