"""Checks of what users pass to monitors, at construction: received, expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """The value, if it is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}, expected a whole number >= {least}.")
    return value


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """One number >= 0, or several, as a tuple."""
    found = _several(values)
    if any(isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300 for value in found):
        raise ValueError(f"{name}={values!r}, expected numbers >= 0, e.g. {name}=(1e-3, 1e-2).")
    return tuple(float(value) for value in found)


def choices(name: str, values: Any, allowed: Sequence[str], expected: str) -> tuple[Any, ...]:
    """One of the allowed words, or several, as a tuple."""
    found = _several(values)
    if not found or any(value not in allowed for value in found):
        raise ValueError(f"{name}={values!r}, expected {expected}.")
    return found


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse what is not one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, expected one of {tuple(allowed)}.")


def label(name: str, value: Any) -> None:
    """Refuse what cannot be part of keys and file names; None is fine."""
    if value is not None and (not isinstance(value, str) or not re.fullmatch("[A-Za-z0-9_]+", value) or value == "end"):
        raise ValueError(f"{name}={value!r}, expected letters, digits and _ (not 'end'), or None.")


def function(name: str, value: Any) -> None:
    """Refuse what cannot be called; None is fine."""
    if value is not None and not callable(value):
        raise ValueError(
            f"{name}={value!r}, expected a function (outputs, targets) -> scalar such as "
            "torch.nn.functional.cross_entropy, or None."
        )


def decimal(number: float) -> str:
    """A number as keys may hold it: digits and a point, no exponent."""
    text = format(Decimal(repr(float(number))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _several(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
