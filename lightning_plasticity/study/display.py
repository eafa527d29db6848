"""How far a study is: a live table in a terminal, lines elsewhere. Read from the units' files, whoever runs them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_plasticity.study.config import Unit
from lightning_plasticity.study.files import read_json
from lightning_plasticity.study.unit import ERROR, PROGRESS, RESULT

INTERVAL = 0.5  # seconds between two looks


class Display:
    """Shows the progress of units until it is left.

    Args:
        units: all that are shown, those already finished too.
        out: the study's directory.
        console: where to.
        metric: name of the online metric.
    """

    def __init__(self, units: Sequence[Unit], out: Path, console: Console, metric: str) -> None:
        self.units = units
        self.out = out
        self.console = console
        self.metric = metric
        self._told: dict[str, Any] = {unit.name: self._state(unit) for unit in units}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(self.table(), console=self.console, auto_refresh=False)
            self._live.start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._show()
        if self._live is not None:
            self._live.stop()

    def table(self) -> Table:
        """A line for each method: seeds finished, tasks under way, the last value of the metric."""
        table = Table(box=None, pad_edge=False)
        for title in ("method", "seeds finished", "under way (seed: task)", f"{self.metric}, newest"):
            table.add_column(title)
        by_method: dict[str, list[Unit]] = {}
        for unit in self.units:
            by_method.setdefault(unit.method, []).append(unit)
        for method, units in by_method.items():
            states = [(unit.seed, *self._state(unit)) for unit in units]
            finished = sum(status == "finished" for _, status, *_ in states)
            failed = sum(status == "failed" for _, status, *_ in states)
            under_way = [state for state in states if state[1] == "running"]
            running = [f"{seed}: {done}/{tasks}" for seed, _, done, tasks, _ in under_way]
            newest = [value for *_, value in under_way if value is not None]
            text = f"{finished} of {len(units)}" + (f", [red]{failed} failed[/red]" if failed else "")
            table.add_row(method, text, ", ".join(running), f"{newest[-1]:.3f}" if newest else "")
        return table

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            return
        for unit in self.units:
            state = self._state(unit)
            if state != self._told[unit.name]:
                self._told[unit.name] = state
                self.console.print(f"{unit.name}: {_words(state, self.metric)}")

    def _state(self, unit: Unit) -> tuple[str, int, int, float | None]:
        """Status, tasks done, tasks in all, the newest value of the metric."""
        directory = unit.directory(self.out)
        try:
            progress = read_json(directory / PROGRESS) or {"done": 0, "tasks": 0, "row": None}
        except (OSError, ValueError):
            return "waiting", 0, 0, None
        row = progress["row"]
        numbers = (progress["done"], progress["tasks"], None if row is None else row.get(f"online_{self.metric}"))
        if (directory / RESULT).exists():
            return ("finished", *numbers)
        if (directory / ERROR).exists():
            return ("failed", *numbers)
        return ("running" if progress["tasks"] else "waiting", *numbers)


def _words(state: tuple[str, int, int, float | None], metric: str) -> str:
    status, done, tasks, newest = state
    if status in ("failed", "waiting"):
        return status
    value = "" if newest is None else f", {metric} {newest:.3f}"
    return f"task {done} of {tasks}{value}{', finished' if status == 'finished' else ''}"
