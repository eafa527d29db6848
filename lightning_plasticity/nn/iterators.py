"""Iterators that a module keeps and a step draws from: copied where Python can, else refused while measuring."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterable
from copy import copy, deepcopy
from typing import Any, NoReturn

_EMPTY: tuple[Iterable[Any], ...] = ([], (), range(0), "", reversed([]))
_PLAIN = tuple(type(iter(values)) for values in _EMPTY)  # copies of these are independent


def is_iterator(value: Any) -> bool:
    """Whether ``next`` moves the value on; files are left alone."""
    return hasattr(type(value), "__next__") and not isinstance(value, io.IOBase)


def stand_in(iterator: Any, name: str) -> Any:
    """An iterator that gives the same without moving the original, or one that says why there is none."""
    if isinstance(iterator, _PLAIN):
        return copy(iterator)
    if isinstance(iterator, itertools.count):
        found = re.fullmatch(r"count\((-?\d+)(?:, (-?\d+))?\)", repr(iterator))
        if found:
            return itertools.count(int(found[1]), int(found[2] or 1))
    if isinstance(iterator, itertools.cycle):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.14 on they are not copied
                return deepcopy(iterator)
        except Exception:  # what it goes through decides, and may be anything
            return Refusing(name)
    return Refusing(name)


class Refusing:
    """Stands in for an iterator while a step is run to measure."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Refusing:
        return self

    def __next__(self) -> NoReturn:
        """Nothing is drawn."""
        raise RuntimeError(
            f"the step draws from {self.name}, an iterator that cannot be put back. "
            "Define curvature_loss(batch) on the module, without it"
        )

    def send(self, value: Any) -> NoReturn:
        """As ``next``, for generators."""
        self.__next__()
