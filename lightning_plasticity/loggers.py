"""The one room that knows about loggers: what each can take is found by trying what its ``experiment`` offers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity._optional import require
from lightning_plasticity.curvature import Spectrum

HISTOGRAM_BINS = 60
MAX_LINES = 50  # in a figure; of more tasks some are left out
DECADES_BELOW = 8  # of the largest eigenvalue that a histogram or a figure shows


def log_scalars(loggers: Iterable[Any], values: Mapping[str, float], step: int) -> None:
    """Send finite scalars to every logger."""
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if finite:
        for logger in loggers:
            logger.log_metrics(finite, step=step)


def log_histogram(loggers: Iterable[Any], key: str, values: Tensor, counts: Tensor, step: int) -> None:
    """Send a weighted histogram of log10(values) to the loggers that can show one.

    Args:
        loggers: of the Trainer.
        key: tag.
        values: (K,) magnitudes; zeros cannot be shown on a log axis and are left out.
        counts: (K,) how often each occurs.
        step: x axis.
    """
    shown = values > values.max() * 10.0**-DECADES_BELOW if len(values) else torch.zeros(0, dtype=torch.bool)
    if not bool(shown.any()):
        return
    logs, weights = values[shown].double().log10(), counts[shown].double()
    for logger in loggers:
        experiment = getattr(logger, "experiment", None)
        if _offers(experiment, "add_histogram_raw"):
            _tensorboard_histogram(experiment, key, logs, weights, step)


def log_figure(loggers: Iterable[Any], key: str, figure: Any, step: int) -> None:
    """Send a matplotlib figure to the loggers that can show one."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if _offers(experiment, "add_figure"):
            experiment.add_figure(key, figure, global_step=step)


def takes_figures(loggers: Iterable[Any]) -> bool:
    """Whether any logger can show a figure, so that it need not be drawn in vain."""
    return any(_offers(getattr(logger, "experiment", None), "add_figure") for logger in loggers)


def log_directory(loggers: Sequence[Any]) -> Path | None:
    """Where the first logger with a directory keeps its files; None without one.

    A logger that has only a directory for all its runs (``save_dir``) gets ``name/version`` below it, as for
    ``ModelCheckpoint``.
    """
    for logger in loggers:
        found = getattr(logger, "log_dir", None)
        if isinstance(found, str | Path):
            return Path(found)
        found = getattr(logger, "save_dir", None)
        if isinstance(found, str | Path):
            name, version = getattr(logger, "name", None), getattr(logger, "version", None)
            version = f"version_{version}" if isinstance(version, int) else version
            return Path(found, *(str(part) for part in (name, version) if part is not None))
    return None


def spectra_figure(spectra: Mapping[int, Spectrum], title: str) -> Any:
    """Eigenvalue magnitudes against their index, one line for each task: a collapse is a line that drops early.

    Args:
        spectra: by task.
        title: above the plot.

    Returns:
        A matplotlib figure.
    """
    figure = require("matplotlib.figure", "A figure of spectra").Figure(figsize=(7, 4.5), layout="constrained")
    draw_spectra(figure.add_subplot(), spectra, title)
    return figure


def draw_spectra(axes: Any, spectra: Mapping[int, Spectrum], title: str) -> None:
    """The same on given axes; tasks run from dark to light."""
    colours = require("matplotlib", "A figure of spectra").colormaps["viridis"]
    last = max(spectra, default=0)
    top = max((spectrum.max_abs for spectrum in spectra.values()), default=1.0)
    tasks = list(spectra)
    lines = min(len(tasks), MAX_LINES)
    for task in (tasks[(k + 1) * len(tasks) // lines - 1] for k in range(lines)):  # evenly spread, with the last
        spectrum = spectra[task]
        order = spectrum.eigenvalues.abs().sort(descending=True)
        index = torch.cumsum(spectrum.counts[order.indices], 0)
        shown = order.values > 0
        colour = colours(0.95 * task / max(last, 1))
        axes.step(index[shown], order.values[shown], where="pre", color=colour, label=f"task {task + 1}")
    axes.set(xscale="log", yscale="log", xlabel="number of eigenvalues at least this large", ylabel="|eigenvalue|")
    axes.set_title(title)
    if top > 0:
        axes.set_ylim(top * 10.0**-DECADES_BELOW, 2 * top)
    handles, labels = axes.get_legend_handles_labels()
    stride = max(1, len(labels) // 6)
    if labels:
        axes.legend(handles[::stride], labels[::stride], fontsize="small")


def _offers(experiment: Any, name: str) -> bool:
    """Whether a real method is there: a DummyLogger's experiment answers to every name."""
    return callable(getattr(type(experiment), name, None))


def _tensorboard_histogram(experiment: Any, key: str, logs: Tensor, weights: Tensor, step: int) -> None:
    low, high = float(logs.min()), float(logs.max())
    edges = torch.linspace(low, high if high > low else low + 1.0, HISTOGRAM_BINS + 1, dtype=torch.float64)
    bins = (torch.bucketize(logs, edges, right=True) - 1).clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64).index_add_(0, bins, weights)
    experiment.add_histogram_raw(
        key,
        min=low,
        max=high,
        num=float(weights.sum()),
        sum=float((logs * weights).sum()),
        sum_squares=float((logs**2 * weights).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
