"""Warnings that come once for each cause, on rank zero."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn

from lightning_plasticity.callbacks.processes import describe


class WarnOnce:
    """Remembers what has been warned of.

    Args:
        owner: whose warnings they are, for messages.
        raising: let errors through in ``surviving``, for tests.
    """

    def __init__(self, owner: str, raising: bool = False) -> None:
        self.owner, self.raising = owner, raising
        self._causes: set[str] = set()

    def __call__(self, message: str, cause: str | None = None) -> None:
        """Warn, unless this very message, or the cause with whatever numbers in its text, has been warned of."""
        cause = message if cause is None else re.sub(r"\d[\d.]*(e[-+]?\d+)?", "#", cause)
        if cause not in self._causes:
            self._causes.add(cause)
            rank_zero_warn(message, stacklevel=6)  # at the line that called what calls this

    def __bool__(self) -> bool:
        """Whether it has warned."""
        return bool(self._causes)

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A full disk or a broken logger must not kill the run, or keep the others from being written."""
        try:
            yield
        except Exception as error:
            if self.raising:
                raise
            why = describe(error)
            self(f"{self.owner} could not {what}: {why.rstrip('.')}. Training goes on.", f"{what} {why}")
