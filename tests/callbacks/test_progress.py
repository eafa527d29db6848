"""Long measurements in the Trainer's bar: what is on the screen meanwhile and afterwards, whatever happens."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from runs import Classifier, fit_tasks, loader, mlp, trainer
from terminal import Terminal

from lightning_plasticity import EveryNEpochs, HessianSpectrumMonitor, TaskTracker, TrainabilityProbe
from lightning_plasticity.callbacks import progress as shown_file
from lightning_plasticity.callbacks.interrupts import INTERRUPTED
from lightning_plasticity.linalg import progress as progress_file
from lightning_plasticity.linalg import watching
from lightning_plasticity.records import TaskRecord

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")

LINES = {"tqdm": shown_file.TqdmLine, "rich": shown_file.RichLine}
Bar = Callable[[], L.Callback]


@pytest.fixture(params=["tqdm", "rich"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal, on which measurements of no length are long enough to be shown."""
    found = Terminal()
    monkeypatch.setattr(shown_file, "watching", partial(watching, after=0, every=0))
    monkeypatch.setattr(progress_file, "COST", math.inf)
    yield found
    rich.reconfigure()  # Lightning's bar has changed the console of all


@pytest.fixture
def bar(kind: str, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> Bar:
    """Makes a bar on that terminal, which is standard output from then on."""

    def make() -> L.Callback:
        monkeypatch.setattr(sys, "stdout", screen)  # not in a fixture: pytest has its own before each test
        if kind == "tqdm":
            return TQDMProgressBar()
        return RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 120})

    return make


def hessian(**settings: Any) -> HessianSpectrumMonitor:
    return HessianSpectrumMonitor(("ggn", "hessian"), probe_samples=6, num_steps=6, **settings)


def in_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanczos, for networks that are small enough for the whole matrix."""
    from lightning_plasticity.curvature.hessian import plan

    monkeypatch.setattr(plan, "EXACT_LIMIT", 1)


def fit(callbacks: list[Any], epochs: int = 2, **settings: Any) -> L.Trainer:
    run = trainer(callbacks, enable_progress_bar=True, max_epochs=epochs, **settings)
    run.fit(Classifier(mlp()), loader(0))
    return run


def measured_rows(screen: Terminal) -> list[str]:
    return [row for row in screen.seen if row.startswith("task ")]


def is_clean(screen: Terminal, kind: str) -> bool:
    """Whether there is a bar of Lightning's on the screen, and nothing else."""
    bars = [re.match(r"Epoch \d", row) is not None for row in screen.rows]
    return len(bars) == 1 and all(bars)


def test_the_bar_shows_what_is_measured_and_an_estimate(
    kind: str, bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_lanczos(monkeypatch)
    monitor = hessian()
    clean: list[bool] = []

    class AfterBatches(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clean.append(not any(row.startswith("task") for row in screen.rows))

    run = fit([TaskTracker(EveryNEpochs(1)), monitor, AfterBatches(), bar()])
    rows = measured_rows(screen)
    for start in ("task 0 start: ggn", "task 0 end: hessian", "task 1 start: hessian", "task 1 end: ggn"):
        assert any(row.startswith(start) for row in rows), start
    assert any(re.fullmatch(r"task 1 start: hessian [1-5]/6 Lanczos steps, about \d+ s left", row) for row in rows)
    assert len(clean) == 2 * run.num_training_batches
    assert all(clean)
    assert is_clean(screen, kind)
    assert [record.failure for record in monitor.records] == [None] * 4
    shown: Any = run.progress_bar_callback
    assert "get_renderables" not in vars(getattr(shown, "progress", shown))


def test_training_of_the_probe_is_counted_over_all_runs(kind: str, bar: Bar, screen: Terminal) -> None:
    fit([TrainabilityProbe(num_steps=5, seeds=2, probe_samples=6), bar()])
    rows = measured_rows(screen)
    assert any(re.fullmatch(r"task 0 start: trainability 19/20 training steps, about \d+ s left", row) for row in rows)
    assert is_clean(screen, kind)


def test_a_fresh_network_says_so(bar: Bar, screen: Terminal) -> None:
    fit([hessian(fresh_control=True), bar()])
    assert any(row.startswith("task 0 start: fresh network, hessian") for row in measured_rows(screen))


def test_silent_for_a_second(kind: str, bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_file, "watching", watching)
    fit([hessian(), bar()])
    assert measured_rows(screen) == []
    assert is_clean(screen, kind)


def test_a_long_one_shows_at_once(bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_file, "watching", watching)
    monitor = hessian(when="start")
    monitor.may_be_long = lambda pl_module: True  # type: ignore[method-assign]
    fit([monitor, bar()])
    assert measured_rows(screen) == ["task 0 start: this may take a while"]


def third_draw(kind: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Raise once the third text is drawn; what was to be drawn."""
    line, texts = LINES[kind], []
    show = line.show

    def breaking(self: Any, text: str) -> None:
        texts.append(text)
        show(self, text)
        if len(texts) == 3:
            raise error

    monkeypatch.setattr(line, "show", breaking)
    return texts


def test_ctrl_c_takes_the_line_away(kind: str, bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = third_draw(kind, KeyboardInterrupt(), monkeypatch)
    monitor = hessian(when="start")
    with pytest.warns(UserWarning, match=INTERRUPTED):
        run = fit([monitor, bar()])
    assert len(texts) == 3
    assert [record.failure for record in monitor.records] == [INTERRUPTED]
    assert run.global_step == 2 * run.num_training_batches
    assert measured_rows(screen)
    assert is_clean(screen, kind)


def test_a_line_that_cannot_be_drawn_is_given_up(
    kind: str, bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = third_draw(kind, OSError("no terminal"), monkeypatch)
    monitor = hessian(when="start", on_error="raise")
    fit([monitor, bar()])
    assert len(texts) == 3
    assert [record.failure for record in monitor.records] == [None]
    assert is_clean(screen, kind)


def test_a_failure_takes_the_line_away(kind: str, bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(matrix: torch.Tensor) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    monitor = hessian(when="start")
    with pytest.warns(UserWarning, match="no convergence"):
        fit([monitor, bar()])
    assert measured_rows(screen)
    assert is_clean(screen, kind)


def test_training_is_the_same_bit_for_bit(bar: Bar, screen: Terminal, tmp_path: Path) -> None:
    def outcome(name: str, *monitors: L.Callback) -> dict[str, Any]:
        tasks = [loader(task) for task in range(2)]
        callbacks = [*monitors, bar()]
        return fit_tasks(lambda: Classifier(mlp()), tasks, callbacks, tmp_path / name, enable_progress_bar=True)

    probe = TrainabilityProbe(num_steps=5, seeds=1, probe_samples=6, on_error="raise")
    plain, watched = outcome("plain"), outcome("watched", hessian(on_error="raise"), probe)
    assert measured_rows(screen)
    assert {key for key in plain if plain[key] != watched[key]} == set()


def test_what_is_no_terminal_gets_no_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(shown_file, "watching", partial(watching, after=0, every=0))
    monkeypatch.setattr(shown_file, "LONG", 0.0)
    monkeypatch.setattr("lightning_plasticity.callbacks.monitor.LONG", 0.0)
    own = (
        TQDMProgressBar() if kind == "tqdm" else RichProgressBar(console_kwargs={"file": file, "force_terminal": False})
    )
    fit([hessian(when="start"), own])
    rich.reconfigure()
    text = file.getvalue()
    assert "task 0 start" not in text
    assert "HessianSpectrumMonitor: measuring at the start of task 0, about 0 s" in text


def test_bars_that_show_nothing_are_left_alone() -> None:
    class Own(L.pytorch.callbacks.ProgressBar):
        is_enabled = True

    terminal = SimpleNamespace(fp=Terminal())
    tqdm_bar = TQDMProgressBar()
    tqdm_bar.train_progress_bar = terminal  # type: ignore[assignment]

    def line(bar: Any, rank_zero: bool = True) -> Any:
        return shown_file.line_below(SimpleNamespace(progress_bar_callback=bar, is_global_zero=rank_zero))  # type: ignore[arg-type]

    assert isinstance(line(tqdm_bar), shown_file.TqdmLine)
    assert line(tqdm_bar, rank_zero=False) is None
    tqdm_bar.disable()
    assert line(tqdm_bar) is None
    assert [line(other) for other in (None, Own(), TQDMProgressBar(), RichProgressBar())] == [None] * 4


def test_narrow_terminals_get_less_text(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    line = shown_file.TqdmLine(screen)
    line.show("task 0 start: hessian 6/60 Lanczos steps, about 6 s left")
    assert screen.rows == ["task 0 start: hessi"]
    line.close()
    assert screen.rows == []


def test_an_interrupted_measurement_says_nothing_of_the_next() -> None:
    monitor, module = hessian(), Classifier(mlp())
    about = {"task": 0, "step": 0, "values": {}, "settings": {}}
    whole = TaskRecord("HessianSpectrumMonitor", phase="end", seconds=40.0, failure=None, **about)  # type: ignore[arg-type]
    broken = TaskRecord("HessianSpectrumMonitor", phase="start", seconds=3.0, failure=INTERRUPTED, **about)  # type: ignore[arg-type]
    expected = []
    for records in ([], [broken], [whole, broken]):
        monitor.records = records
        expected.append(monitor._expected(module, "start"))
    assert expected == [0.0, 0.0, 40.0]


@pytest.mark.parametrize(("seconds", "shown"), [(1.5, []), (3.0, ["task 0 start: about 3 s"])])
def test_what_took_long_before_shows_at_once(
    seconds: float, shown: list[str], bar: Bar, screen: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_file, "watching", watching)
    monitor = hessian(when="start")
    monitor.records = [TaskRecord("HessianSpectrumMonitor", 0, "start", 0, seconds=seconds)]
    fit([monitor, bar()])
    assert measured_rows(screen) == shown


def test_one_line_at_a_time_below_a_rich_bar(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    class Twice(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            line = shown_file.line_below(trainer)
            assert line is not None
            line.show("first")
            found.append(shown_file.line_below(trainer))
            line.close()

    monkeypatch.setattr(sys, "stdout", screen)
    fit([Twice(), RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 120})])
    assert found
    assert set(found) == {None}
