"""A few of the cases, each under a time limit: nothing is changed, lost or hung; and the comparison finds what is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuzz.cases import draw
from fuzz.check import check
from fuzz.faults import PLACES
from fuzz.one_run import Hung
from lightning_plasticity.callbacks.monitor import BoundaryMonitor

CASES = [1, 2, 3, 4, 5, 7, 8, 11, 12, 48, 32, 50]
LIMIT = 300.0  # seconds; on a busy machine


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("index", CASES, ids=lambda index: f"{index}-{draw(0, index).fault.row}")
def test_nothing_is_changed_or_lost(index: int, tmp_path: Path) -> None:
    verdict = check(draw(0, index), tmp_path)
    assert (verdict.changed, verdict.lost) == ([], []), verdict.about
    assert verdict.result != "not reached"


def _without_records(monitor: Any, *args: Any) -> None:
    pass


def _stepping(monitor: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
    next(pl_module.parameters()).data.add_(1)


@pytest.mark.parametrize(("broken", "found"), [(_without_records, "lost"), (_stepping, "changed")])
def test_what_is_changed_or_lost_is_found(
    broken: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundaryMonitor, "_keep", broken)
    case = draw(0, 0)
    verdict = check(replace(case, fault=replace(case.fault, place="nothing")), tmp_path)
    assert getattr(verdict, found)


def test_kinds_of_failure_take_turns() -> None:
    assert [draw(1, index).fault.row for index in range(len(PLACES))] == list(PLACES)
    assert draw(1, 5) == draw(1, 5) != draw(2, 5)
