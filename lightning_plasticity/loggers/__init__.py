"""The one room that knows about loggers: what each can take is asked of it and its ``experiment``, not of its class."""

from lightning_plasticity.loggers.figures import draw_spectra, pixels_of, spectra_figure
from lightning_plasticity.loggers.histograms import shown_magnitudes
from lightning_plasticity.loggers.send import (
    log_directory,
    log_histogram,
    log_image,
    log_scalars,
    takes_histograms,
    takes_images,
)

__all__ = [
    "draw_spectra",
    "log_directory",
    "log_histogram",
    "log_image",
    "log_scalars",
    "pixels_of",
    "shown_magnitudes",
    "spectra_figure",
    "takes_histograms",
    "takes_images",
]
