"""Every kind of module: training with monitors is training without, and each number is checked or its absence told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_plasticity import Spectrum
from zoo import KINDS, Kind
from zoo.runner import QUANTITIES, cheap_monitors, initial, probed, reference, run

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")
BOUNDARIES = [(task, phase) for task in (0, 1) for phase in ("start", "end")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_monitors_leave_training_alone_and_are_right_or_say_why(kind: Kind, tmp_path: Path) -> None:
    plain = run(kind)
    monitors = hessian, features = cheap_monitors(tmp_path)
    watched = run(kind, monitors)
    assert {key for key in plain.outcome if plain.outcome[key] != watched.outcome[key]} == set()

    expected = kind.expectation
    for monitor in monitors:
        assert [(record.task, record.phase) for record in monitor.records] == BOUNDARIES
    _assert_told(watched.told, expected)
    for record in hessian.records:
        for quantity in QUANTITIES:
            assert (f"plasticity/{quantity}/trace" in record.values) == (quantity not in _unmeasured(expected))
    if not {"features", ""} & _unmeasured(expected):
        assert all(record.failure is None and record.values for record in features.records)

    if expected.hand is None:
        return
    batches = [probed(loader) for loader in kind.make_loaders()]
    truth = reference(expected.hand, initial(kind), batches[0])
    _assert_measured(truth, tmp_path, "task0000_start", expected)
    if expected.end:
        trained = initial(kind)
        trained.load_state_dict(watched.module.state_dict())
        _assert_measured(reference(expected.hand, trained, batches[1]), tmp_path, "task0001_end", expected)


def _unmeasured(expected) -> set[str]:
    return {part for parts in expected.warned for part in parts.split(", ")}


def _assert_told(told: list[str], expected) -> None:
    patterns = [
        f"could not measure {f'{parts} ' if parts else ''}at .*{why}.*Training goes on"
        for parts, why in expected.warned.items()
    ]
    patterns += expected.told
    assert len(told) == len(patterns), told
    for pattern in patterns:
        assert sum(re.search(pattern, each, re.DOTALL) is not None for each in told) == 1, (pattern, told)


def _assert_measured(truth: dict[str, torch.Tensor], directory: Path, at: str, expected) -> None:
    for quantity in set(QUANTITIES) - _unmeasured(expected):
        if expected.only not in (None, quantity):
            continue
        spectrum, values = Spectrum.load(directory / f"spectra/{quantity}_{at}.npz"), truth[quantity]
        assert spectrum.exact
        found = spectrum.eigenvalues.repeat_interleave(spectrum.counts.round().long())
        top = float(values.abs().max())
        torch.testing.assert_close(found, values, rtol=0, atol=2e-5 * top + 1e-12)
        torch.testing.assert_close(spectrum.trace().value, float(values.sum()), rtol=0, atol=1e-4 * top + 1e-12)
