"""Run the demo: both networks at once, a live table, a summary, a picture."""

from __future__ import annotations

import json
import multiprocessing as mp
import time
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_plasticity.demo.network import METHODS
from lightning_plasticity.demo.report import draw_report
from lightning_plasticity.demo.train import Row, train

COLUMNS = {
    "online_accuracy": ("online accuracy", "{:.2f}"),
    "ggn_eps_rank_0.01": ("GGN > 0.01", "{:.0f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "dead_units": ("dead units", "{:.0%}"),
}
NAMES = {"plain": "plain", "l2er": "L2-ER"}
Rows = dict[str, list[Row]]


def run_demo(seed: int, out: Path, num_tasks: int = 16, epochs: int = 30, console: Console | None = None) -> dict[str, Any]:
    """Train both networks in a process each and write ``summary.json``, ``report.png`` and TensorBoard files.

    Args:
        seed: of data and initial weights, the same for both networks.
        out: directory for the results; made when missing.
        num_tasks: length of the stream.
        epochs: epochs per task.
        console: where the table goes.

    Returns:
        What ``summary.json`` holds: for each method lists over tasks, and the seconds it all took.

    Raises:
        RuntimeError: when a network's process fails; its traceback is printed by that process.
    """
    console = Console() if console is None else console
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Random-label digits, seed {seed}: {num_tasks} tasks of 400 images, {epochs} epochs each. "
        "Chance is 0.10; curvature and ranks are measured before each task's first update.\n"
    )
    started = time.perf_counter()
    rows = _train_both(seed, out, num_tasks, epochs, console)
    methods = {method: {key: [row[key] for row in rows[method]] for key in COLUMNS} for method in METHODS}
    summary = {"seed": seed, "methods": methods, "seconds": round(time.perf_counter() - started, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    draw_report(summary, out, out / "report.png")
    console.print(_summary_table(methods))
    console.print(f"{summary['seconds']:.0f} s. Picture: {out / 'report.png'}  numbers: {out / 'summary.json'}")
    console.print(f"Spectra over all tasks: tensorboard --logdir {out / 'tensorboard'}", soft_wrap=True)
    return summary


def _train_both(seed: int, out: Path, num_tasks: int, epochs: int, console: Console) -> Rows:
    context = mp.get_context("spawn")
    queue: Any = context.Queue()
    workers = {
        method: context.Process(target=_worker, args=(method, seed, out, num_tasks, epochs, queue), daemon=True)
        for method in METHODS
    }
    for worker in workers.values():
        worker.start()
    rows: Rows = {method: [] for method in METHODS}
    console.print(_header())
    shown = 0
    while any(len(done) < num_tasks for done in rows.values()):
        try:
            method, row = queue.get(timeout=1.0)
        except Empty:
            _check_alive(workers, rows, num_tasks)
            continue
        rows[method].append(row)
        while all(len(done) > shown for done in rows.values()):
            console.print(_line(shown, {method: rows[method][shown] for method in METHODS}))
            shown += 1
    for worker in workers.values():
        worker.join()
    return rows


def _worker(method: str, seed: int, out: Path, num_tasks: int, epochs: int, queue: Any) -> None:
    train(method, seed, out, num_tasks, epochs, lambda task, row: queue.put((method, row)))


def _check_alive(workers: dict[str, Any], rows: Rows, num_tasks: int) -> None:
    for method, worker in workers.items():
        if worker.exitcode not in (None, 0) and len(rows[method]) < num_tasks:
            for other in workers.values():
                other.terminate()
            raise RuntimeError(
                f"Training {method} stopped with exit code {worker.exitcode} after {len(rows[method])} tasks; see its error above."
            )


def _header() -> str:
    titles = "".join(f"{title:>32}" for title in ("online accuracy", "GGN eigenvalues > 0.01", "effective rank"))
    return f"{'task':>4}{titles}{'dead units':>20}\n{'':>4}" + "".join(f"{NAMES[m]:>16}" for _ in range(3) for m in METHODS) + "".join(
        f"{NAMES[m]:>10}" for m in METHODS
    )


def _line(task: int, rows: dict[str, Row]) -> str:
    cells = []
    for key, (_, style) in COLUMNS.items():
        width = 10 if key == "dead_units" else 16
        cells += [f"{style.format(rows[method][key]):>{width}}" for method in METHODS]
    return f"{task + 1:>4}" + "".join(cells)


def _summary_table(methods: dict[str, dict[str, list[float]]]) -> Table:
    table = Table(title="From the second task to the last")
    table.add_column("")
    for method in METHODS:
        table.add_column(NAMES[method], justify="right")
    for key, (title, style) in COLUMNS.items():
        cells = []
        for method in METHODS:
            values = methods[method][key]
            first = values[1] if len(values) > 1 else values[0]
            cells.append(f"{style.format(first)} -> {style.format(values[-1])}")
        table.add_row(title, *cells)
    return table
