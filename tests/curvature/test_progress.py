"""Every long loop counts, and its count ends at the total that it promised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity import curvature
from lightning_plasticity.curvature import measured as measured_file
from lightning_plasticity.linalg import Progress, watching
from lightning_plasticity.linalg import progress as progress_file
from lightning_plasticity.trainability import trainability

Told = dict[tuple[tuple[str, ...], str], list[tuple[int, int | None]]]


@pytest.fixture
def all_told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Told]:
    """Runs something under a watcher that misses nothing; done and total by what was counted."""
    monkeypatch.setattr(progress_file, "COST", float("inf"))

    def run(function: Callable[[], Any]) -> Told:
        told: Told = {}

        def note(progress: Progress) -> None:
            told.setdefault((progress.parts, progress.what), []).append((progress.done, progress.total))

        with watching(note, after=0, every=0):
            function()
        return told

    return run


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Recurrent(nn.Module):
    """Without a shortcut: explicit rows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNN(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.cell(x[:, None])[0][:, 0])
        return out


def batches(sizes: tuple[int, ...] = (5, 5, 3)) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(size, 4), torch.randint(3, (size,))) for size in sizes]


MEASUREMENTS: dict[str, tuple[Callable[[], Any], tuple[tuple[str, ...], str], int]] = {
    "Lanczos": (
        lambda: curvature.hessian_spectrum(net(), F.cross_entropy, batches(), method="lanczos", num_steps=7),
        (("hessian",), "Lanczos steps"),
        7,
    ),
    "the whole Hessian": (
        lambda: curvature.hessian_spectrum(net(), F.cross_entropy, batches(), method="exact"),
        (("hessian",), "rows of the matrix"),
        4 * 6 + 6 + 6 * 3 + 3,
    ),
    "the GGN": (
        lambda: curvature.ggn_spectrum(net(), F.cross_entropy, batches()),
        (("ggn",), "backward passes"),
        3 * 2,
    ),
    "of the first samples": (
        lambda: curvature.ggn_spectrum(net(), F.cross_entropy, batches(), method="exact", max_rows=13),
        (("ggn",), "backward passes"),
        2 * 2,
    ),
    "the NTK": (
        lambda: curvature.ntk_spectrum(net(), F.cross_entropy, batches()),
        (("ntk",), "layers of the Gram matrix"),
        2,
    ),
    "explicit rows": (
        lambda: curvature.ggn_spectrum(Recurrent(), F.cross_entropy, batches()),
        (("ggn",), "gradient rows"),
        2 * 13,
    ),
    "an estimated GGN": (
        lambda: curvature.ggn_spectrum(net(), F.cross_entropy, batches(), method="lanczos", num_steps=5),
        (("ggn",), "Lanczos steps"),
        5,
    ),
    "Kronecker, hooks": (
        lambda: curvature.kronecker_spectrum(net(), nn.CrossEntropyLoss(), batches(), backend="hooks"),
        (("kronecker",), "backward passes"),
        3 * 2,
    ),
    "Kronecker, BackPACK": (
        lambda: curvature.kronecker_spectrum(net(), nn.CrossEntropyLoss(), batches(), backend="backpack"),
        (("kronecker",), "batches"),
        3,
    ),
    "layers": (
        lambda: curvature.layer_spectra(net(), F.cross_entropy, batches(), matrix="hessian"),
        (("0", "hessian"), "rows of the matrix"),
        4 * 6 + 6,
    ),
    "the linearised network": (
        lambda: curvature.linearized_trainability(
            net(), F.cross_entropy, batches(), learning_rate=0.01, num_steps=50, method="lanczos", lanczos_steps=6
        ),
        (("linearized",), "Lanczos steps"),
        6,
    ),
    "training": (
        lambda: trainability(net(), F.cross_entropy, batches(), num_steps=9, seeds=2),
        (("trainability",), "training steps"),
        4 * 9,
    ),
    "training, no fresh networks": (
        lambda: trainability(net(), F.cross_entropy, batches(), num_steps=9, seeds=2, fresh=False, target="relative"),
        (("trainability",), "training steps"),
        2 * 9,
    ),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_counts_end_at_their_totals(name: str, all_told: Callable[[Callable[[], Any]], Told]) -> None:
    function, key, total = MEASUREMENTS[name]
    told = all_told(function)
    assert told[key][-1] == (total, total)
    done = [count for count, _ in told[key]]
    assert done == sorted(done)
    assert all(end is None or count <= end for counts in told.values() for count, end in counts)


def test_products_whose_number_nobody_knows(all_told: Callable[[Callable[[], Any]], Told]) -> None:
    wide = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3))
    found = []
    told = all_told(lambda: found.append(curvature.hessian_eigenpairs(wide, F.cross_entropy, batches(), k=2)))
    products = told[("eigenpairs",), "products"]
    assert {total for _, total in products} == {None}
    assert products[-1][0] == found[0].num_products - 3  # the probe, and one for each residual


def test_a_clock_that_ends_training_also_ends_the_estimate() -> None:
    seen: list[float] = []
    with watching(lambda progress: seen.append(progress.deadline), after=0, every=0):
        trainability(net(), F.cross_entropy, batches(), num_steps=9, max_seconds=50.0)
    assert seen
    assert all(40 < deadline <= 50 for deadline in seen)


def test_a_long_decomposition_is_announced(
    monkeypatch: pytest.MonkeyPatch, all_told: Callable[[Callable[[], Any]], Told]
) -> None:
    measure = partial(curvature.ggn_spectrum, net(), F.cross_entropy, batches())
    assert (("ggn",), "eigenvalues of 26 rows") not in all_told(measure)
    monkeypatch.setattr(measured_file, "LONG_ROWS", 26)
    assert (("ggn",), "eigenvalues of 26 rows") in all_told(measure)


def test_numbers_are_the_same_when_watched(all_told: Callable[[Callable[[], Any]], Told]) -> None:
    found = []
    measure = partial(curvature.hessian_spectrum, net(), F.cross_entropy, batches(), method="lanczos", num_steps=7)
    all_told(lambda: found.append(measure()))
    assert torch.equal(found[0].eigenvalues, measure().eigenvalues)
