"""Long measurements in the Trainer's own progress bar: one line below it, which goes when the measurement ends."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from lightning_plasticity.linalg import Progress, watching

LONG = 2.0  # seconds from which a measurement is announced


class TqdmLine:
    """A line of text below the bar of Lightning's ``TQDMProgressBar``."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._line: Any = None

    def show(self, text: str) -> None:
        """Draw it, or draw it anew."""
        text = text[: shutil.get_terminal_size().columns - 1]  # of a wrapped line a part would be left
        if self._line is None:
            self._line = Tqdm(desc=text, bar_format="{desc}", leave=False, file=self._file)
        else:
            self._line.set_description_str(text)

    def close(self) -> None:
        """Take it away."""
        if self._line is not None:
            self._line.close()


class RichLine:
    """A line of text below the bars of Lightning's ``RichProgressBar``, as a part of what it draws."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._text = progress, ""

    def show(self, text: str) -> None:
        """Draw it, or draw it anew."""
        self._text = text
        self._progress.get_renderables = self._with_text
        self._progress.refresh()

    def close(self) -> None:
        """Take it away."""
        if vars(self._progress).pop("get_renderables", None) is not None:
            self._progress.refresh()

    def _with_text(self) -> list[Any]:
        from rich.text import Text

        bars = type(self._progress).get_renderables(self._progress)
        return [*bars, Text(self._text, no_wrap=True, overflow="ellipsis")]


def line_below(trainer: Trainer) -> TqdmLine | RichLine | None:
    """A line below the Trainer's bar; None where no bar of Lightning's is drawn over and over, as in a log file."""
    bar: Any = trainer.progress_bar_callback
    with suppress(Exception):  # a bar of one's own may be anything
        kinds = _class_names(bar)
        if not trainer.is_global_zero or not bar.is_enabled:
            return None
        if "TQDMProgressBar" in kinds:
            file = getattr(bar.train_progress_bar, "fp", sys.stdout)
            return TqdmLine(file) if file.isatty() or "tqdm_notebook" in _class_names(bar.train_progress_bar) else None
        if "RichProgressBar" in kinds:
            console = bar.progress.console
            drawn = bar.progress.live.is_started and (console.is_interactive or console.is_jupyter)
            return RichLine(bar.progress) if drawn and "get_renderables" not in vars(bar.progress) else None
    return None


@contextmanager
def shown(line: TqdmLine | RichLine | None, what: str, expected: float) -> Iterator[None]:
    """Inside, computations of more than a second are shown in the line; that it cannot be drawn is nobody's concern.

    Args:
        line: None for nothing.
        what: what is measured, before all else.
        expected: seconds that it will take; a long one is shown at once.
    """
    if line is None:
        yield
        return
    broken = False

    def show(progress: Progress | str) -> None:
        nonlocal broken
        try:
            if not broken:
                line.show(f"{what}: {progress}")
        except Exception:
            broken = True

    try:
        if expected >= LONG:
            show(expectation(expected))
        with watching(show):
            yield
    finally:
        with suppress(Exception):
            line.close()


def expectation(seconds: float) -> str:
    """What to say of a long measurement before it begins; infinite where it is the first."""
    return "this may take a while" if math.isinf(seconds) else f"about {seconds:.0f} s"


def tell(trainer: Trainer, what: str) -> None:
    """Say it where the progress bar is, or log it."""
    bar: Any = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", True):
        bar.print(what)
    else:
        rank_zero_info(what)


def _class_names(thing: Any) -> set[str]:
    """By name, since ``pytorch_lightning`` has classes of its own."""
    return {cls.__name__ for cls in type(thing).__mro__}
