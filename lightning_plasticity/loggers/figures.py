"""Figures of spectra, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_plasticity._optional import require
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.loggers.histograms import DECADES_BELOW

SMALLEST = 1e-200  # below it a spectrum is zero: eight decades further down float64 ends
MAX_LINES = 50  # in a figure; of more tasks some are left out
INCHES, DOTS_PER_INCH = (5.6, 3.6), 125  # 700 x 450 pixels, to be read in a card half as wide


def spectra_figure(spectra: Mapping[int, Spectrum], title: str) -> Any:
    """Eigenvalue magnitudes against their index, one line for each task: a collapse is a line that drops early.

    Args:
        spectra: by task.
        title: above the plot.

    Returns:
        A matplotlib figure.
    """
    figure = require("matplotlib.figure", "A figure of spectra").Figure(
        figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained"
    )
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
        axes.step(index[shown], order.values[shown], where="pre", color=colour, label=f"task {task}")
    axes.set(xscale="log", yscale="log", xlabel="number of eigenvalues at least this large", ylabel="|eigenvalue|")
    axes.set_title(title)
    if top < SMALLEST:  # a log axis has no limits of its own without a value to show
        axes.set(xlim=(1, max(2, *(spectrum.num_params for spectrum in spectra.values()))), ylim=(SMALLEST, 1))
        axes.text(0.5, 0.5, "all eigenvalues are zero", ha="center", transform=axes.transAxes)
    else:
        axes.set_ylim(top * 10.0**-DECADES_BELOW, 2 * top)
    handles, labels = axes.get_legend_handles_labels()
    stride = max(1, len(labels) // 6)
    if labels:
        axes.legend(handles[::stride], labels[::stride], fontsize="small")


def pixels_of(figure: Any) -> np.ndarray[Any, Any]:
    """A matplotlib figure as (height, width, 3) bytes; pyplot and its list of open figures are not touched."""
    canvas = require("matplotlib.backends.backend_agg", "A figure").FigureCanvasAgg(figure)
    canvas.draw()
    pixels: np.ndarray[Any, Any] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels
