"""Errors, interrupts and full memory in the middle of a measurement: all is as it was, and the run goes on or ends."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
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

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, read_records
from lightning_plasticity.callbacks.interrupts import INTERRUPTED
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.nn.snapshot import Snapshot


class Bomb:
    """Raises in a measurement, from the n-th time on that a place is reached; outside the module, which is put back."""

    place, times, count = "", 1, 0
    error: BaseException = ZeroDivisionError()

    last: float = math.inf  # time that it goes off

    def reach(self, place: str) -> None:
        if is_measuring() and place == self.place:
            self.count += 1
            if self.times <= self.count <= self.last:
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


def set_bomb(place: str, times: int, error: BaseException, last: float = math.inf) -> None:
    BOMB.place, BOMB.times, BOMB.error, BOMB.count, BOMB.last = place, times, error, 0, last


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
def test_an_interrupt_ends_the_measurement_and_training_is_the_same(place: str, times: int, tmp_path: Path) -> None:
    """The weights, batches, metrics and random states are those of a run without monitors."""
    torch.manual_seed(0)  # how many products there are at the start depends on the weights
    pair, before = watching(tmp_path), Before()
    set_bomb(place, times, KeyboardInterrupt(), last=times)
    told = same_with(Breaking, lambda: [loader(0), loader(1)], [before, *pair, After(before)])
    assert BOMB.count >= times
    assert before.differences == [[], []]
    failed = [record for monitor in pair for record in monitor.records if record.failure is not None]
    assert [record.failure for record in failed] == [INTERRUPTED]
    assert failed[0].values == {}
    (message,) = told
    assert f"{failed[0].monitor}: the measurement at the start of task 0 was interrupted by hand" in message
    assert "Training goes on; Ctrl-C again ends it." in message
    for monitor in pair:
        assert [(r.task, r.phase) for r in monitor.records] == [(t, p) for t in (0, 1) for p in ("start", "end")]
    assert sum(record.failure == INTERRUPTED for record in read_records(tmp_path)) == 1


@pytest.mark.parametrize(("place", "times"), CASES[:3], ids=str)
@pytest.mark.parametrize("how", ["second monitor", "on_error"])
@pytest.mark.filterwarnings("ignore:.*was interrupted by hand")
def test_interrupts_end_the_run_and_leave_all_as_it_was(place: str, times: int, how: str, tmp_path: Path) -> None:
    """A second one soon after the first, here in the next monitor; or the first where errors are to end the run."""
    pair, before = watching(tmp_path / "records"), Before()
    for monitor in pair:
        monitor.on_error = "raise" if how == "on_error" else "warn"
    run = trainer([before, *pair], logger=CSVLogger(tmp_path, name="", version=""))
    set_bomb(place, times, KeyboardInterrupt())
    with pytest.raises(SystemExit):
        run.fit(Breaking(), loader())
    assert before.differences == [[]]
    assert run.global_step == 0
    assert run.interrupted
    kept = read_records(tmp_path / "records") if (tmp_path / "records").exists() else []
    assert len(kept) == sum(len(monitor.records) for monitor in pair) == (0 if how == "on_error" else 1)


def test_a_second_interrupt_later_is_a_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.callbacks.interrupts.SOON", -1.0)
    pair = watching()
    set_bomb("step", 1, KeyboardInterrupt())
    told = same_with(Breaking, lambda: [loader(0), loader(1)], pair)
    assert len(told) == 8
    assert all(record.failure == INTERRUPTED for monitor in pair for record in monitor.records)


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


# ---- the signal itself ---------------------------------------------------------------------------------------------


class Pressing(Classifier):
    """Presses Ctrl-C while it is measured: at the n-th step, and so often."""

    at, times, pause = 1, 1, 0.0

    def __init__(self) -> None:
        super().__init__(NETWORKS["conv"]())
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if is_measuring():
            COUNTED.append(1)
            if self.at <= len(COUNTED) < self.at + self.times:
                time.sleep(self.pause)
                os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)


COUNTED: list[int] = []


@pytest.mark.parametrize("at", [1, 3, 4])
def test_ctrl_c_ends_a_measurement(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    COUNTED.clear()
    monkeypatch.setattr(Pressing, "at", at)
    pair, before = watching(), Before()
    told = same_with(Pressing, lambda: [loader(0), loader(1)], [before, *pair, After(before)])
    assert before.differences == [[], []]
    assert [r.failure for monitor in pair for r in monitor.records if r.failure] == [INTERRUPTED]
    assert len(told) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    COUNTED.clear()
    monkeypatch.setattr(Pressing, "times", 2)
    pair, before = watching(), Before()
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="interrupted by hand"):
        trainer([before, *pair]).fit(Pressing(), loader())
    assert before.differences == [[]]


def test_ctrl_c_while_things_are_put_back_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in the middle of restoring the module; all of it is restored, and the measurement is whole."""
    restore, pressed = Snapshot.restore, []

    def slow(self: Snapshot) -> None:
        if not pressed and is_measuring() is False and inside[-1:]:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # where Python looks for signals
        restore(self)

    inside: list[int] = []

    class Marking(Classifier):
        def __init__(self) -> None:
            super().__init__(NETWORKS["conv"]())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if is_measuring():
                inside.append(1)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(Snapshot, "restore", slow)
    pair, before = watching(), Before()
    told = same_with(Marking, lambda: [loader(0), loader(1)], [before, *pair, After(before)])
    assert pressed
    assert before.differences == [[], []]
    assert all(record.failure is None for monitor in pair for record in monitor.records)
    assert len(told) == 1
    assert "Ctrl-C came when the measurement was all but over" in told[0]


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from runs import Classifier, loader, mlp, trainer
from lightning_plasticity import HessianSpectrumMonitor
from lightning_plasticity.nn import is_measuring

class Slow(Classifier):
    def training_step(self, batch, batch_idx):
        if is_measuring() and not Path(sys.argv[1]).exists():
            Path(sys.argv[1]).touch()
            for _ in range(600):
                time.sleep(0.1)
        return super().training_step(batch, batch_idx)

torch.manual_seed(0)
module, monitor = Slow(mlp()), HessianSpectrumMonitor(probe_samples=6, max_seconds=None)
trainer([monitor]).fit(module, loader())
weights = float(sum(p.detach().double().sum() for p in module.parameters()))
print([record.failure for record in monitor.records], weights)
"""


def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "measuring")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 90
    while not (tmp_path / "measuring").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    torch.manual_seed(0)
    module = Classifier(NETWORKS["mlp"]())
    trainer([]).fit(module, loader())
    weights = float(sum(p.detach().double().sum() for p in module.parameters()))
    assert shown.splitlines()[-1] == f"['{INTERRUPTED}', None] {weights}"
    assert "the measurement at the start of task 0 was interrupted by hand" in told
