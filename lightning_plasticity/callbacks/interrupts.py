"""Ctrl-C while a monitor measures: it ends the measurement, and a second one soon after ends the run."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

INTERRUPTED = "interrupted by hand"  # as a record's failure
SOON = 2.0  # seconds within which a second Ctrl-C is meant for the run
UNBROKEN = ("__exit__", "undisturbed", "quiet")  # these two generators run while they begin and end, not in between

_LAST: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # the time of the last one, by Trainer

_ends_run = False


@contextmanager
def ending_runs() -> Iterator[None]:
    """Inside, an interrupt ends the run also where it comes in a measurement: the run is part of a larger whole."""
    global _ends_run
    before, _ends_run = _ends_run, True
    try:
        yield
    finally:
        _ends_run = before


def end_measurements() -> bool:
    """Whether an interrupt in a measurement ends the measurement only."""
    return not _ends_run


class Interrupts:
    """Inside, Ctrl-C raises ``KeyboardInterrupt``, but never while a context is begun or something put back.

    Such a one is only noted: half of a module's state would be that of the measurement. Where somebody else handles
    the signal, or outside of the main thread, nothing is changed.

    Attributes:
        late: whether one came that has ended nothing.
        second: whether one came soon after another.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.late = self.second = False
        self._noted = False  # that which is under way as an exception
        self._home: CodeType | None = None
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self._home = sys._getframe(1).f_code
        mine = threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def end_run(self) -> bool:
        """Whether the ``KeyboardInterrupt`` that has been caught is meant for the run."""
        if not self._noted:  # raised by code, not by our handler
            self._note()
        return self.second

    def _pressed(self, signum: int, frame: FrameType | None) -> None:
        self._note()
        if self._putting_back(frame):
            self.late = True
            return
        self._noted = True
        raise KeyboardInterrupt

    def _note(self) -> None:
        now = time.monotonic()
        self.second |= now - _LAST.get(self.trainer, -math.inf) <= SOON
        _LAST[self.trainer] = now

    def _putting_back(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not self._home:
            if frame.f_code.co_name in UNBROKEN:
                return True
            frame = frame.f_back
        return False
