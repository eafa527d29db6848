"""What a measurement found, and where it goes: files, loggers, and what a module logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.loggers import (
    log_directory,
    log_histogram,
    log_image,
    log_scalars,
    shown_magnitudes,
    takes_histograms,
)
from lightning_plasticity.records import TaskRecord


@dataclass
class Measurement:
    """What one call of a monitor's ``measure`` found.

    Attributes:
        values: estimates by key.
        settings: what was measured on and how.
        spectra: to be saved beside the record, by matrix.
        histograms: spectra, or magnitudes and their counts, by key; shown on a log axis.
        failures: what could not be measured (by its name in messages) and why, where other parts could.
        retry: whether smaller batches may help: some failure came out of the module's own code.
    """

    values: dict[str, Estimate] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    histograms: dict[str, Spectrum | tuple[Tensor, Tensor]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    retry: bool = False


def record_directory(trainer: Trainer, save_dir: str | None) -> Path | None:
    """Where files go, made when missing; None for no files."""
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return None
    directory = Path(save_dir) if save_dir is not None else log_directory(trainer.loggers)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def save_spectrum(directory: Path, record: TaskRecord, matrix: str, spectrum: Spectrum, name: str | None) -> str:
    """The name of its file below the directory; when it cannot be written, nothing of it is left."""
    mode = record.settings.get("mode", "frozen")  # monitors of two modes may share the directory
    part = matrix if mode == "frozen" else f"{matrix}_{mode}"
    part = part if name is None else f"{name}_{part}"
    file = f"spectra/{part}_task{record.task:04d}_{record.phase}.npz"
    (directory / file).parent.mkdir(parents=True, exist_ok=True)
    try:
        spectrum.save(directory / file)
    except BaseException:
        (directory / file).unlink(missing_ok=True)
        raise
    return file


def log_measurement(
    logger: Any, record: TaskRecord, measurement: Measurement, images: Mapping[str, Any], named: Callable[[str], str]
) -> None:
    """Scalars, histograms and pictures; ``named`` puts a monitor's name into the keys of the last two."""
    scalars: dict[str, float] = {"plasticity/task": float(record.task)}
    # An exact spectrum has intervals too, of rounding, at some tasks only: for the record, not for curves. Those of a
    # quadrature are logged at all tasks, whatever their width.
    spectra = measurement.spectra.items()
    estimated = tuple(named(f"plasticity/{matrix}/") for matrix, spectrum in spectra if spectrum.quadrature is not None)
    for key, estimate in record.values.items():
        tag = phased(key, record.phase)
        scalars[tag] = estimate.value
        if key.startswith(estimated) and not key.endswith("/num_samples"):
            scalars |= {f"{tag}_lower": estimate.lower, f"{tag}_upper": estimate.upper}
    log_scalars(logger, scalars, record.step)
    for key, found in measurement.histograms.items() if takes_histograms(logger) else ():
        if isinstance(found, Spectrum):
            found = measurement.histograms[key] = shown_magnitudes(found)  # once for all loggers
        log_histogram(logger, phased(named(key), record.phase), *found, record.step)
    for key, pixels in images.items():
        log_image(logger, key, pixels, record.step)


def phased(key: str, phase: str) -> str:
    """Keys of the start are plain; those of the end live in a group of their own."""
    return key if phase == "start" else key.replace("plasticity/", "plasticity/end/", 1)


def reach_callback_metrics(pl_module: LightningModule, record: TaskRecord, sync: bool) -> None:
    """Let EarlyStopping, ModelCheckpoint and tuners see the values of a task's start; ranks have the same."""
    if getattr(pl_module.trainer, "barebones", False):
        return  # nobody collects them there, and Lightning would warn of each
    for key, estimate in record.values.items():
        if estimate.resolved:
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "logger": False, "batch_size": 1}
            pl_module.log(key, estimate.value, sync_dist=sync, **options)
