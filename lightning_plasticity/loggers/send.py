"""Numbers, histograms and pictures for any logger, by what it and its ``experiment`` offer."""

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
from lightning_plasticity.loggers.charts import arrange_charts
from lightning_plasticity.loggers.histograms import DECADES_BELOW, binned


def log_scalars(logger: Any, values: Mapping[str, float], step: int) -> None:
    """Send finite scalars to a logger; all can take them. TensorBoard gets charts of them too.

    MLflow's file store cannot hold both ``norm`` and ``norm/net.0``, a file and a directory: MLflow gets ``norm_all``.
    """
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    experiment: Any = getattr(logger, "experiment", None)
    if _is_mlflow(experiment):
        groups = {key.rpartition("/")[0] for key in values}
        finite = {f"{key}_all" if key in groups else key: value for key, value in finite.items()}
    if finite:
        logger.log_metrics(finite, step=step)
    if _offers(experiment, "add_custom_scalars"):
        arrange_charts(experiment, values)


def takes_histograms(logger: Any) -> bool:
    """Whether ``log_histogram`` does anything."""
    experiment: Any = getattr(logger, "experiment", None)
    return _offers(experiment, "add_histogram_raw") or _is_wandb(experiment)


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
        edges, sums = binned(logs, weights)
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


def _offers(experiment: Any, name: str) -> bool:
    """Whether a real method is there: a DummyLogger's experiment answers to every name."""
    return callable(getattr(type(experiment), name, None))


def _is_wandb(experiment: Any) -> bool:
    return _offers(experiment, "define_metric") and _offers(experiment, "log")


def _is_mlflow(experiment: Any) -> bool:
    return _offers(experiment, "log_batch") and _offers(experiment, "log_image")


def _tensorboard_histogram(experiment: Any, key: str, logs: Tensor, weights: Tensor, step: int) -> None:
    edges, sums = binned(logs, weights)
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
