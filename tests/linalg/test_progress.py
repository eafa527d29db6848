"""What a watcher is told: counts that loops make, the time that is left, not too often."""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import pytest
import torch

from lightning_plasticity.linalg import Progress, lanczos, watching
from lightning_plasticity.linalg import progress as progress_file
from lightning_plasticity.linalg.progress import Count, announce, counted, part


class Clock:
    """Time that passes only when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress_file, "time", found)
    return found


def test_texts() -> None:
    about = {"parts": ("fresh network", "hessian"), "what": "Lanczos steps", "total": 120}
    assert str(Progress(**about, done=0, elapsed=3.0)) == "fresh network, hessian 0/120 Lanczos steps"  # type: ignore[arg-type]
    texts = {
        (30, 3.0): "30/120 steps, about 9 s left",
        (120, 3.0): "120/120 steps",
        (119, 3.0): "119/120 steps, about 1 s left",
        (10, 60.0): "10/120 steps, about 11 min left",
        (1, 60.0): "1/120 steps, about 2.0 h left",
    }
    assert {key: str(Progress((), "steps", key[0], 120, key[1])) for key in texts} == texts
    assert str(Progress((), "products", 57, None, 12.4)) == "57 products, 12 s so far"
    assert str(Progress(("ggn",), "eigenvalues of 5000 rows", 0, None, 0.0)) == "ggn eigenvalues of 5000 rows"


def test_what_is_left_is_in_proportion_and_ends_with_the_clock() -> None:
    assert Progress((), "steps", 30, 120, 3.0).seconds_left == 9.0
    assert Progress((), "steps", 30, 120, 3.0, deadline=2.0).seconds_left == 2.0
    assert Progress((), "steps", 30, 120, 3.0, deadline=-1.0).seconds_left == 0.0
    for done, total in ((0, 120), (30, None), (120, 120)):
        assert Progress((), "steps", done, total, 3.0).seconds_left is None


def test_silence_first_and_then_five_times_a_second(clock: Clock) -> None:
    told: list[Progress] = []
    with watching(told.append):
        for _ in counted(range(1000), "rounds"):
            clock.now += 0.01
    assert [p.done for p in told[:3]] == [100, 120, 140]
    assert len(told) == 46
    assert told[1].elapsed == pytest.approx(1.2)
    assert told[1].seconds_left == pytest.approx(8.8)


def test_a_slow_watcher_is_told_less_often(clock: Clock) -> None:
    times = []

    def slow(progress: Progress) -> None:
        times.append(clock.now)
        clock.now += 0.05

    with watching(slow):
        for _ in counted(range(10_000), "rounds"):
            clock.now += 0.01
    assert [b - a for a, b in pairwise(times)] == pytest.approx([10.05] * (len(times) - 1), abs=0.02)
    assert len(times) == 10


def test_parts_and_the_earliest_deadline(clock: Clock) -> None:
    told: list[Progress] = []
    with watching(told.append, after=0, every=0), part("fresh network", clock.now + 5), part("hessian", clock.now + 7):
        with part(deadline=clock.now + 9):
            Count("steps", 10)
        with pytest.raises(ZeroDivisionError), part("lost", 0.0):
            raise ZeroDivisionError
        Count("steps")
    assert [(p.parts, p.deadline) for p in told] == [(("fresh network", "hessian"), 5.0)] * 2
    Count("steps").add()  # nobody watches
    assert len(told) == 2
    with watching(told.append, after=0):
        Count("steps")
    assert (told[-1].parts, told[-1].deadline) == ((), math.inf)


def test_a_long_step_is_told_at_once() -> None:
    told: list[Progress] = []
    announce("nobody hears this")
    with watching(told.append, after=100.0):
        announce("eigenvalues of 5000 rows")
        Count("steps", 3)
    assert [str(p) for p in told] == ["eigenvalues of 5000 rows"]


def test_a_run_of_lanczos() -> None:
    told: list[tuple[int, int | None]] = []
    diagonal = torch.arange(1.0, 6.0)
    with watching(lambda p: told.append((p.done, p.total)), after=0, every=0):
        lanczos(lambda v: diagonal * v, torch.ones(5), num_steps=50)
    assert told[0] == (0, 5)
    assert told == sorted(told)


def test_what_a_watcher_raises_ends_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "COST", math.inf)
    products: list[torch.Tensor] = []

    def matvec(vector: torch.Tensor) -> torch.Tensor:
        products.append(vector)
        return torch.arange(1.0, 9.0) * vector

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError), watching(stop, after=0, every=0):
        lanczos(matvec, torch.ones(8), num_steps=8)
    assert len(products) == 2
    lanczos(matvec, torch.ones(8), num_steps=8)  # watched no more


def test_other_threads_are_not_watched() -> None:
    told: list[Progress] = []
    with watching(told.append, after=0, every=0):
        thread = threading.Thread(target=lambda: Count("steps").add())
        thread.start()
        thread.join()
    assert told == []
