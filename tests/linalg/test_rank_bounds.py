"""Bounds on functionals of a spectrum known through one Lanczos run."""

import numpy as np
import pytest
import torch

from lightning_plasticity.linalg import (
    effective_rank_bounds,
    effective_rank_of,
    functional_bounds,
    participation_ratio_of,
    srank_of,
    stochastic_lanczos_quadrature,
)


def quadrature_of(eigenvalues, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return stochastic_lanczos_quadrature(
        lambda v: eigenvalues * v, len(eigenvalues), steps, generator=generator, dtype=torch.float64
    )


def spectra():
    rng = np.random.default_rng(0)
    return {
        "power law": torch.arange(1, 801, dtype=torch.float64) ** -1.5,
        "two signs": torch.from_numpy(rng.normal(size=700)),
        "outliers on a bulk": torch.cat([torch.linspace(5, 50, 9), torch.linspace(1e-3, 0.1, 600)]).double(),
        "mostly zero": torch.cat([torch.linspace(0.5, 2.0, 40), torch.zeros(900)]).double(),
    }


@pytest.mark.parametrize("functional", [effective_rank_of, srank_of, participation_ratio_of])
@pytest.mark.parametrize("name", spectra())
@pytest.mark.parametrize("steps", [15, 60])
def test_the_bounds_hold_the_truth(name, steps, functional):
    eigenvalues = spectra()[name]
    truth = float(functional(eigenvalues.abs()))
    held = []
    for seed in range(10):
        lower, upper = functional_bounds(quadrature_of(eigenvalues, steps, seed), functional)
        held.append(lower * (1 - 1e-9) <= truth <= upper * (1 + 1e-9))  # exact after a breakdown, up to rounding
    # Conservative by construction; at a true coverage of 95 % two misses in ten would come up in 9 % of such tests.
    assert sum(held) >= 9


def test_they_narrow_with_more_steps():
    eigenvalues = spectra()["power law"]
    widths = [np.diff(effective_rank_bounds(quadrature_of(eigenvalues, steps)))[0] for steps in (15, 60, 200)]
    assert widths[0] > widths[1] > widths[2] > 0


def test_they_close_when_every_eigenvalue_is_found():
    eigenvalues = torch.zeros(300, dtype=torch.float64)
    eigenvalues[:5] = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.25])
    lower, upper = effective_rank_bounds(quadrature_of(eigenvalues, 60))
    truth = float(effective_rank_of(eigenvalues.abs()))
    assert lower == pytest.approx(truth, rel=1e-9)
    assert upper == pytest.approx(truth, rel=1e-9)


def test_a_zero_operator_has_rank_zero():
    assert effective_rank_bounds(quadrature_of(torch.zeros(50, dtype=torch.float64), 10)) == (0.0, 0.0)
