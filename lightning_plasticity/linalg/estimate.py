"""A number with its uncertainty: what every measurement of this package answers with."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the truth.

    Attributes:
        value: the best single number; ``nan`` where the interval is too wide for one (see ``resolved``).
        lower: lower end of the interval (95 % where it is statistical).
        upper: upper end of the interval; equal to ``lower`` for an exact number.

    Example:
        >>> from lightning_plasticity.linalg import Estimate
        >>> Estimate.exactly(3)
        Estimate(value=3.0, lower=3.0, upper=3.0)
        >>> Estimate(10.0, 8.0, 13.0).exact
        False
    """

    value: float
    lower: float
    upper: float

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        """An exact number: the interval has width zero."""
        return cls(float(value), float(value), float(value))

    @classmethod
    def failed(cls) -> Estimate:
        """Nothing is known: all three are ``nan``."""
        return cls(math.nan, math.nan, math.nan)

    @property
    def exact(self) -> bool:
        """Whether the interval has width zero."""
        return self.lower == self.value == self.upper

    @property
    def resolved(self) -> bool:
        """Whether there is a single value to show, and not an interval only."""
        return not math.isnan(self.value)
