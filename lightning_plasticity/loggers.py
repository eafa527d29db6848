"""The one room that knows about loggers: what each can take is asked of it and its ``experiment``, not of its class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_plasticity._optional import require
from lightning_plasticity.curvature import Spectrum

BINS_PER_DECADE = 8
DECADES_BELOW = 8  # of the largest eigenvalue that a histogram or a figure shows
MAX_LINES = 50  # in a figure; of more tasks some are left out


def log_scalars(logger: Any, values: Mapping[str, float], step: int) -> None:
    """Send finite scalars to a logger; all can take them.

    MLflow's file store cannot hold both ``norm`` and ``norm/net.0``, a file and a directory: MLflow gets ``norm_all``.
    """
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if _is_mlflow(getattr(logger, "experiment", None)):
        groups = {key.rpartition("/")[0] for key in values}
        finite = {f"{key}_all" if key in groups else key: value for key, value in finite.items()}
    if finite:
        logger.log_metrics(finite, step=step)


def log_histogram(logger: Any, key: str, values: Tensor, counts: Tensor, step: int) -> None:
    """Send a weighted histogram of log10(values) to a logger that can show one (TensorBoard, W&B).

    Bins are the same at every step, eight to a decade, so that the histograms of all tasks can be compared.

    Args:
        logger: of the Trainer.
        key: tag.
        values: (K,) magnitudes; zeros cannot be shown on a log axis and are left out.
        counts: (K,) how often each occurs.
        step: x axis.
    """
    shown = values > values.max() * 10.0**-DECADES_BELOW if len(values) else torch.zeros(0, dtype=torch.bool)
    if not bool(shown.any()):
        return
    logs, weights = values[shown].double().log10(), counts[shown].double()
    experiment: Any = getattr(logger, "experiment", None)
    if _offers(experiment, "add_histogram_raw"):
        _tensorboard_histogram(experiment, key, logs, weights, step)
    elif _is_wandb(experiment):
        edges, sums = _binned(logs, weights)
        histogram = require("wandb", "A histogram").Histogram(np_histogram=(sums.tolist(), edges.tolist()))
        logger.log_metrics({key: histogram}, step=step)


def log_image(logger: Any, key: str, pixels: np.ndarray[Any, Any], step: int) -> None:
    """Show a picture, by the first of these that works with the logger.

    - ``experiment.add_image`` (TensorBoard), one for each step;
    - ``logger.log_image(key, [pixels], step=step)`` (W&B), one for each step;
    - ``experiment.log_image`` of an MLflow client: the artifact ``<key>.png``, the newest only;
    - the logger's directory (CSV): ``figures/<key>.png``, the newest only.

    Args:
        logger: of the Trainer.
        key: tag.
        pixels: (height, width, 3) bytes.
        step: x axis.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if _offers(experiment, "add_image"):
        experiment.add_image(key, pixels, global_step=step, dataformats="HWC")
    elif _offers(logger, "log_image"):
        logger.log_image(key, [pixels], step=step)
    elif _is_mlflow(experiment):
        experiment.log_image(logger.run_id, pixels, artifact_file=f"{key}.png")
    elif (directory := log_directory([logger])) is not None:
        file = directory / "figures" / f"{key.removeprefix('plasticity/').replace('/', '_')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        require("matplotlib.image", "A figure").imsave(file, pixels)


def takes_images(logger: Any) -> bool:
    """Whether ``log_image`` does anything, so that no figure is drawn in vain; False where the logger is broken."""
    with suppress(Exception):
        experiment: Any = getattr(logger, "experiment", None)
        able = _offers(experiment, "add_image") or _offers(logger, "log_image") or _is_mlflow(experiment)
        return able or log_directory([logger]) is not None
    return False


def pixels_of(figure: Any) -> np.ndarray[Any, Any]:
    """A matplotlib figure as (height, width, 3) bytes; pyplot and its list of open figures are not touched."""
    canvas = require("matplotlib.backends.backend_agg", "A figure").FigureCanvasAgg(figure)
    canvas.draw()
    pixels: np.ndarray[Any, Any] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels


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


def _is_wandb(experiment: Any) -> bool:
    return _offers(experiment, "define_metric") and _offers(experiment, "log")


def _is_mlflow(experiment: Any) -> bool:
    return _offers(experiment, "log_batch") and _offers(experiment, "log_image")


def _binned(logs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (B + 1,) on the common grid, and the weight in each bin (B,); a bin holds its left edge."""
    indices = (logs * BINS_PER_DECADE).floor().long()
    first = int(indices.min())
    num_bins = int(indices.max()) - first + 1
    edges = torch.arange(first, first + num_bins + 1, dtype=torch.float64) / BINS_PER_DECADE
    return edges, torch.zeros(num_bins, dtype=torch.float64).index_add_(0, indices - first, weights)


def _tensorboard_histogram(experiment: Any, key: str, logs: Tensor, weights: Tensor, step: int) -> None:
    edges, sums = _binned(logs, weights)
    experiment.add_histogram_raw(
        key,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(weights.sum()),
        sum=float((logs * weights).sum()),
        sum_squares=float((logs**2 * weights).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=sums.tolist(),
        global_step=step,
    )
