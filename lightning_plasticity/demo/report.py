"""The demo's picture: accuracy, curvature and features over tasks, and the spectra at the start of each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_plasticity._optional import require
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.demo.train import run_directory
from lightning_plasticity.loggers import draw_spectra
from lightning_plasticity.records import read_records

COLOURS = {"plain": "#0b62a4", "l2er": "#c2410c"}  # the HTML report's first two on white, report/assets/figures.js
NAMES = {"plain": "plain", "l2er": "L2-ER"}
PANELS = (
    ("online_accuracy", "online accuracy", "linear"),
    ("ggn_eps_rank_0.01", "GGN eigenvalues > 0.01", "log"),
    ("effective_rank", "effective rank, last hidden layer", "linear"),
    ("dead_units", "share of dead units", "linear"),
)


def draw_report(summary: dict[str, Any], out: Path, path: Path) -> None:
    """Write the picture from the summary and the spectra that the monitors saved."""
    figure = require("matplotlib.figure", "The report").Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for place, (key, title, scale) in zip((axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]), PANELS, strict=True):
        for method, numbers in summary["methods"].items():
            tasks = range(len(numbers[key]))
            place.plot(tasks, numbers[key], "o-", markersize=3, color=COLOURS[method], label=NAMES[method])
        place.set(title=title, xlabel="task", yscale=scale)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.grid(alpha=0.3)
    axes[0, 0].axhline(0.1, linestyle=":", color="grey", label="chance")
    axes[0, 0].legend()
    for place, method in zip((axes[0, 2], axes[1, 2]), summary["methods"], strict=True):
        draw_spectra(place, _spectra(out, method, summary["seed"]), f"GGN spectrum at task start: {NAMES[method]}")
    axes[1, 2].sharex(axes[0, 2])
    axes[1, 2].sharey(axes[0, 2])
    figure.suptitle("Random-label digits: plain training and L2-ER, task by task")
    figure.savefig(path, dpi=120)


def _spectra(out: Path, method: str, seed: int) -> dict[int, Spectrum]:
    directory = run_directory(out, method, seed)
    records = [record for record in read_records(directory) if "ggn" in record.spectra]
    return {record.task: Spectrum.load(directory / record.spectra["ggn"]) for record in records}
