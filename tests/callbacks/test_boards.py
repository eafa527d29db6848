"""What TensorBoard's charts and histograms are made of: layouts of tags, and the eigenvalues that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_plasticity import Spectrum
from lightning_plasticity.linalg import stochastic_lanczos_quadrature
from lightning_plasticity.loggers import log_scalars, pixels_of, shown_magnitudes, spectra_figure
from lightning_plasticity.loggers.charts import layout_of


class Logger:
    """The part of a logger that scalars need."""

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.experiment.add_scalar(key, value, step)


def titles(directory: Path) -> list[list[str]]:
    """Groups of every layout in a run's files, in the order of writing."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
    if "custom_scalars__config__" not in events.Tags()["tensors"]:
        return []
    layouts = [event.tensor_proto.string_val[0] for event in events.Tensors("custom_scalars__config__")]
    return [[group.title for group in layout_pb2.Layout.FromString(content).category] for content in layouts]


def test_tags_become_charts() -> None:
    tags = [
        "p/task", "p/ggn/eps_rank_0.01", "p/ggn/eps_rank_0.1", "p/hessian/trace", "p/hessian/trace_lower",
        "p/hessian/trace_upper", "p/hessian/eps_rank_0.1", "p/hessian/eps_rank_0.1_lower",
        "p/hessian/eps_rank_0.1_upper", "p/weights/norm", "p/weights/norm/net.0", "p/end/ggn/trace", "p/ggn/never",
    ]  # fmt: skip
    without = {"p/hessian/eps_rank_0.1", "p/ggn/never"}  # no value in sight
    assert layout_of(tags, set(tags) - without) == {
        "p": {"task": ["Multiline", ["p/task(/.*)?$"]]},
        "p/ggn": {"eps_rank": ["Multiline", [r"p/ggn/eps_rank_0\.01(/.*)?$", r"p/ggn/eps_rank_0\.1(/.*)?$"]]},
        "p/hessian": {
            "trace": ["Margin", ["p/hessian/trace", "p/hessian/trace_lower", "p/hessian/trace_upper"]],
            "eps_rank_0.1": ["Multiline", [r"p/hessian/eps_rank_0\.1(_lower|_upper)?$"]],
        },
        "p/weights": {"norm": ["Multiline", ["p/weights/norm(/.*)?$"]]},
        "p/end/ggn": {"trace": ["Multiline", ["p/end/ggn/trace(/.*)?$"]]},
    }


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_layout_is_written_when_there_are_new_charts(backend: str, tmp_path: Path) -> None:
    kind = SummaryWriter if backend == "torch" else pytest.importorskip("tensorboardX").SummaryWriter
    logger = Logger(kind(str(tmp_path)))
    for step in range(3):
        log_scalars(logger, {"plasticity/ggn/trace": 1.0, "plasticity/ggn/eps_rank_0.1": float("nan")}, step)
    log_scalars(logger, {"plasticity/weights/norm": 1.0, "plasticity/weights/norm/net.0": 1.0}, 3)
    log_scalars(logger, {"plasticity/weights/norm/net.9": 1.0}, 4)  # a line of a chart that is there
    logger.experiment.close()
    assert titles(tmp_path) == [["plasticity/ggn"], ["plasticity/ggn", "plasticity/weights"]]


@pytest.mark.parametrize("before", [True, False])
def test_the_users_own_layout_stays(before: bool, tmp_path: Path) -> None:
    logger = Logger(SummaryWriter(str(tmp_path)))
    own = {"mine": {"loss": ["Multiline", ["loss"]]}}
    if before:
        logger.experiment.add_custom_scalars(own)
    log_scalars(logger, {"plasticity/ggn/trace": 1.0}, 0)
    if not before:
        logger.experiment.add_custom_scalars(own)
    log_scalars(logger, {"plasticity/weights/norm": 1.0}, 0)
    logger.experiment.close()
    assert titles(tmp_path)[-1] == ["mine"]


def test_rounding_is_not_shown() -> None:
    exact = Spectrum.from_eigenvalues(torch.tensor([-3.0, 2.0, 1e-3, -1e-9]), 10, resolution=1e-6)
    magnitudes, counts = shown_magnitudes(exact)
    assert magnitudes.tolist() == pytest.approx([3, 1e-3, 2])
    assert counts.tolist() == pytest.approx([1, 1, 1])


def estimate_of(diagonal: Sequence[float], num_steps: int) -> Spectrum:
    values = torch.tensor(diagonal, dtype=torch.float64)
    quadrature = stochastic_lanczos_quadrature(
        lambda v: values * v, len(values), num_steps=num_steps, dtype=torch.float64
    )
    return Spectrum.from_quadrature(quadrature, len(values), resolution=1e-12)


def test_an_estimate_shows_what_is_resolved() -> None:
    outliers = [90.0, -40.0, 7.0, 6.8, -1.7]
    bulk = np.random.default_rng(0).normal(0, 1e-3, 800)
    spectrum = estimate_of([*outliers, *bulk], num_steps=30)
    magnitudes, counts = (found.numpy() for found in shown_magnitudes(spectrum))
    bins, edges = np.histogram(np.log10(magnitudes), np.arange(-64, 17) / 8, weights=counts)
    true = np.histogram(np.log10(np.abs(outliers)), edges)[0]
    above = edges[:-1] >= -1  # between outliers and bulk there is nothing
    assert np.allclose(bins[above], true[above])
    # Lanczos has nodes near zero that stand for much of the bulk; they are not shown where they happen to lie.
    lowest = 10 ** (np.floor(np.log10(magnitudes.min()) * 8) / 8)
    assert counts.sum() == pytest.approx(spectrum.epsilon_rank(lowest).value)
    assert np.isnan(spectrum.epsilon_rank(lowest * 10 ** (-1 / 8)).value)
    assert counts.sum() < 500


def test_an_estimate_shows_eight_decades() -> None:
    magnitudes, counts = shown_magnitudes(estimate_of([1.2, 1e-3, 1e-7, 1e-10, *[0.0] * 36], num_steps=5))
    assert torch.log10(magnitudes).tolist() == pytest.approx([0, -3, -7], abs=1 / 8)  # 1e-10 is resolved, too
    assert counts.tolist() == pytest.approx([1, 1, 1])


def test_nothing_to_show() -> None:
    assert len(shown_magnitudes(estimate_of([0.0] * 9, 4))[0]) == 0
    assert len(shown_magnitudes(Spectrum.from_eigenvalues(torch.zeros(3), 3))[0]) == 0


ZERO = torch.zeros(3, dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "values",
    [[ZERO], [ZERO[:0]], [ZERO, ZERO], [ZERO, ONES], [ONES * 1e-320], [ONES * 1e-199], []],
    ids=["zeros", "none", "zeros twice", "zeros, then ones", "denormal", "tiny", "no task"],
)
def test_spectra_with_nothing_above_zero_are_drawn(values: list[torch.Tensor]) -> None:
    spectra = {task: Spectrum.from_eigenvalues(own, 10) for task, own in enumerate(values)}
    figure = spectra_figure(spectra, "title")
    assert pixels_of(figure).shape == (450, 700, 3)
    said = [text.get_text() for text in figure.axes[0].texts]
    nothing = bool(values) and max(float(own.max()) if len(own) else 0.0 for own in values) < 1e-200
    assert said == ["all eigenvalues are zero"] * nothing
