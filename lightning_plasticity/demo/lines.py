"""Whole lines with a prefix, for processes that write to one terminal."""

from __future__ import annotations

import io
import logging
import sys
from typing import TextIO


class PrefixedLines(io.TextIOBase):
    """A stream that hands whole lines on, each behind the prefix, in one piece.

    Args:
        stream: where lines go.
        prefix: before each.
    """

    def __init__(self, stream: TextIO, prefix: str) -> None:
        super().__init__()
        self.stream, self.prefix = stream, prefix
        self._open = ""  # a line whose end has not come

    def write(self, text: str) -> int:
        """Write the lines that are whole now."""
        whole, newline, self._open = f"{self._open}{text}".rpartition("\n")
        if newline:
            self.stream.write("".join(f"{self.prefix}{line}\n" for line in whole.split("\n")))
            self.stream.flush()
        return len(text)


def prefix_output(prefix: str) -> None:
    """From now on all that this process writes, warnings and log records included, is behind the prefix."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (PrefixedLines(stream, prefix) for stream in before)
    for logger in (logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict]):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                handler.setStream(sys.stderr)
