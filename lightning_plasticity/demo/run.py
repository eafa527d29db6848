"""Run the demo: both networks at once, a live table, a summary, a picture."""

from __future__ import annotations

import json
import multiprocessing as mp
import signal
import time
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console

from lightning_plasticity.demo.lines import prefix_output
from lightning_plasticity.demo.network import METHODS
from lightning_plasticity.demo.report import NAMES, draw_report
from lightning_plasticity.demo.train import Row, train
from lightning_plasticity.report import offer_report

COLUMNS = {
    "online_accuracy": ("online accuracy", "{:.2f}"),
    "ggn_eps_rank_0.01": ("GGN eig. > 0.01", "{:.0f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "dead_units": ("dead units", "{:.0%}"),
}
CELL = 9
Rows = dict[str, list[Row]]


def run_demo(seed: int, out: Path, num_tasks: int = 16, epochs: int = 30) -> dict[str, Any]:
    """Train both networks in a process each and write ``summary.json``, ``report.png``, TensorBoard files and a report.

    Args:
        seed: of data and initial weights, the same for both networks.
        out: directory for the results; made when missing.
        num_tasks: length of the stream.
        epochs: epochs per task.

    Returns:
        What ``summary.json`` holds: for each method lists over tasks, and the seconds it all took.

    Raises:
        RuntimeError: when a network's process fails; that process prints its traceback.
    """
    console = Console(soft_wrap=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"Seed {seed}: {num_tasks} tasks, from 0 on, each gives new random labels to 400 digits ({epochs} epochs)."
    )
    console.print("Accuracy is online (before each update); chance is 0.10. The rest is measured before a task's first")
    console.print("update: effective rank in the last hidden layer, dead units as a mean over the hidden layers.\n")
    started = time.perf_counter()
    rows = _train_both(seed, out, num_tasks, epochs, console)
    methods = {method: {key: [row[key] for row in rows[method]] for key in COLUMNS} for method in METHODS}
    summary = {"seed": seed, "methods": methods, "seconds": round(time.perf_counter() - started, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    draw_report(summary, out, out / "report.png")
    if num_tasks > 1:
        console.print(_conclusion(methods))
    console.print(f"\nTook {summary['seconds']:.0f} s.  Picture: {out / 'report.png'}  numbers: {out / 'summary.json'}")
    console.print(f"Spectra over all tasks: tensorboard --logdir {out / 'tensorboard'}")
    offer_report(out, lambda line: console.print(line, markup=False))
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
    while shown < num_tasks:
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
    """In a process of its own; Ctrl-C is for the one that waits, which ends both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prefix_output(f"[{NAMES[method]}] ")
    train(method, seed, out, num_tasks, epochs, lambda row: queue.put((method, row)))


def _check_alive(workers: dict[str, Any], rows: Rows, num_tasks: int) -> None:
    for method, worker in workers.items():
        if worker.exitcode is not None and len(rows[method]) < num_tasks:
            for other in workers.values():
                other.terminate()
            raise RuntimeError(
                f"Training {method} stopped with exit code {worker.exitcode} after {len(rows[method])} tasks; "
                "its error is printed above."
            )


def _header() -> str:
    titles = "".join(f"{title:>{2 * CELL}}" for title, _ in COLUMNS.values())
    return f"task{titles}\n    " + "".join(f"{NAMES[method]:>{CELL}}" for _ in COLUMNS for method in METHODS)


def _line(task: int, rows: dict[str, Row]) -> str:
    cells = [style.format(rows[method][key]) for key, (_, style) in COLUMNS.items() for method in METHODS]
    return f"{task:>4}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _conclusion(methods: dict[str, dict[str, list[float]]]) -> str:
    """Task 1 against the last one, for each network."""
    last = len(next(iter(methods.values()))["online_accuracy"]) - 1
    lines = ["", f"From task 1 (at task 0 the network is fresh, and its curvature says little) to task {last}:"]
    for method, numbers in methods.items():
        parts = []
        for key, (title, style) in COLUMNS.items():
            parts.append(f"{title} {style.format(numbers[key][1])} -> {style.format(numbers[key][-1])}")
        lines.append(f"{NAMES[method]:>7}: " + ", ".join(parts))
    return "\n".join(lines)
