"""How far a long computation is: loops count what they have done, and whoever watches is told now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

COST = 0.005  # share of the time that telling a watcher may take
MINUTE = 60.0


@dataclass(frozen=True)
class Progress:
    """How far a loop is.

    Attributes:
        parts: what it is part of, the largest first: ``("hessian",)``.
        what: what is counted: ``"Lanczos steps"``.
        done: how many are done.
        total: how many there will be; None where nobody knows.
        elapsed: seconds since the loop began.
        deadline: seconds until the clock ends it.

    Example:
        >>> from lightning_plasticity.linalg import Progress
        >>> str(Progress(("hessian",), "Lanczos steps", done=34, total=120, elapsed=3.2))
        'hessian 34/120 Lanczos steps, about 8 s left'
    """

    parts: tuple[str, ...]
    what: str
    done: int
    total: int | None
    elapsed: float
    deadline: float = math.inf

    @property
    def seconds_left(self) -> float | None:
        """By the mean time of those that are done; None where that says nothing."""
        if self.total is None or not 0 < self.done < self.total:
            return None
        each = self.elapsed / self.done
        return max(0.0, min(each * (self.total - self.done), self.deadline))

    def __str__(self) -> str:
        parts = f"{', '.join(self.parts)} " if self.parts else ""
        if self.total is None:
            return (
                f"{parts}{self.done} {self.what}, {_duration(self.elapsed)} so far" if self.done else parts + self.what
            )
        left = self.seconds_left
        time_left = "" if left is None else f", about {_duration(left)} left"
        return f"{parts}{self.done}/{self.total} {self.what}{time_left}"


Watcher = Callable[[Progress], object]


class _Watch:
    """Who is told, and when next."""

    def __init__(self, watcher: Watcher, after: float, every: float) -> None:
        self.watcher, self.every = watcher, every
        self.due = time.perf_counter() + after

    def tell(self, progress: Progress) -> None:
        started = time.perf_counter()
        self.watcher(progress)
        now = time.perf_counter()
        self.due = now + max(self.every, (now - started) / COST)


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)
_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=())
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def watching(watcher: Watcher, *, after: float = 1.0, every: float = 0.2) -> Iterator[None]:
    """Inside, long computations of this thread say how far they are.

    Args:
        watcher: called with a ``Progress``, whose text is a line with an estimate of the time left; ``print`` will do.
            What it raises ends the computation, and a measured module is put back as after any other error.
        after: seconds that nothing is said.
        every: seconds between two calls, at least; more where the calls would take 1/200 of the time.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import lanczos, watching
        >>> counts = []
        >>> with watching(lambda progress: counts.append((progress.done, progress.total)), after=0, every=0):
        ...     run = lanczos(lambda v: torch.arange(1.0, 4.0) * v, torch.ones(3), num_steps=3)
        >>> counts[0]
        (0, 3)
    """
    token = _watch.set(_Watch(watcher, after, every))
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def part(name: str = "", deadline: float = math.inf) -> Iterator[None]:
    """What is counted inside is part of this, and ends at a ``time.perf_counter()`` at the latest."""
    tokens = _parts.set((*_parts.get(), *([name] if name else []))), _deadline.set(min(_deadline.get(), deadline))
    try:
        yield
    finally:
        _parts.reset(tokens[0])
        _deadline.reset(tokens[1])


class Count:
    """How many rounds of a loop are done; to be made when the loop begins.

    Args:
        what: plural noun, what is counted.
        total: how many there will be, which may be corrected on the way; None where nobody knows.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._watch = _watch.get()
        self._started = time.perf_counter()
        self.add(0)

    def add(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        if self._watch is not None and (now := time.perf_counter()) >= self._watch.due:
            elapsed, deadline = now - self._started, _deadline.get() - now
            self._watch.tell(Progress(_parts.get(), self.what, self.done, self.total, elapsed, deadline))


def counted(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, each counted when the loop comes back for the next."""
    count = Count(what, len(items))
    for item in items:
        yield item
        count.add()


def announce(what: str) -> None:
    """Tell the watcher at once of a long step in which nothing can be counted."""
    if (watch := _watch.get()) is not None:
        watch.due = 0.0
        Count(what)


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{max(1.0, seconds):.0f} s"
    if seconds < 90 * MINUTE:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / MINUTE**2:.1f} h"
