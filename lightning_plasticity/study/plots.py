"""Figures of a study: each measure over tasks, mean and 95 % band over seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_plasticity._optional import require
from lightning_plasticity.report.series import band
from lightning_plasticity.study.table import INDEX, TableRow, columns, per_run

OVERVIEW = (
    "ggn/eps_rank_0.01",
    "features/effective_rank",
    "features/dead_units",
    "weights/norm",
    "trainability/steps_to_target",
)
LOG = re.compile(r"eps_rank|trace|lambda|norm|seconds|steps_to")


def plottable(rows: Sequence[TableRow]) -> list[str]:
    """Columns worth a figure: numbers over tasks, without layers and the ends of intervals."""
    present = set(columns(rows))
    return [
        key
        for key in columns(rows)
        if key not in INDEX
        and not key.endswith(("_lower", "_upper", "num_samples"))
        and key.rpartition("/")[0] not in present  # a layer's
    ]


def draw_measure(axes: Any, rows: Sequence[TableRow], key: str) -> bool:
    """One column over tasks on given axes; False where it holds nothing finite."""
    drawn, positive = False, True
    colours = require("matplotlib", "The study's figures").colormaps["tab20"]
    for k, (method, runs) in enumerate(per_run(rows, key).items()):
        mean, lower, upper = band(runs)
        known = np.isfinite(mean)
        if not known.any():
            continue
        tasks = np.arange(1, len(mean) + 1)[known]
        colour = colours((2 * k) % 20 + (k // 10) % 2)
        axes.plot(tasks, mean[known], "o-", markersize=2.5, linewidth=1.3, color=colour, label=method)
        axes.fill_between(tasks, lower[known], upper[known], color=colour, alpha=0.18, linewidth=0)
        drawn, positive = True, positive and bool((mean[known] > 0).all())
    axes.set(title=key, xlabel="task", yscale="log" if drawn and positive and LOG.search(key) else "linear")
    axes.grid(alpha=0.3)
    return drawn


def figure_of(rows: Sequence[TableRow], key: str) -> Any:
    """A matplotlib figure of one column."""
    figure = require("matplotlib.figure", "The study's figures").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if draw_measure(axes, rows, key):
        axes.legend(fontsize="small", ncols=2)
    return figure


def overview(rows: Sequence[TableRow], metric: str) -> Any:
    """A matplotlib figure of the metric and the main measures, those that the table holds."""
    present = set(columns(rows))
    keys = [key for key in (f"online_{metric}", f"end_{metric}", *OVERVIEW) if key in present][:6]
    figure = require("matplotlib.figure", "The study's figures").Figure(figsize=(14, 7.5), layout="constrained")
    places = figure.subplots(2, 3).ravel()
    for place, key in zip(places, keys, strict=False):
        draw_measure(place, rows, key)
    for place in places[len(keys) :]:
        place.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    seeds = len({row["seed"] for row in rows})
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
    figure.suptitle(f"Mean over {seeds} seed{'s' * (seeds > 1)}, with 95 % intervals of Student's t")
    return figure


def file_name(key: str) -> str:
    """A column's name as a file's."""
    return re.sub(r"[^\w.-]+", "_", key) + ".png"
