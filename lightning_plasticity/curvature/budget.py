"""What a measurement may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_plasticity.curvature.memory import free_memory

FREE_SHARE = 0.5  # of the free memory, where nothing else is said


@dataclass(frozen=True)
class Budget:
    """Bounds on one measurement; within them samples, steps and method are chosen.

    Attributes:
        max_seconds: wall time; None for any.
        max_memory: bytes beyond what the process holds; None for half of what is free.

    Raises:
        ValueError: for bounds that are not positive numbers.
    """

    max_seconds: float | None = None
    max_memory: float | None = None

    def __post_init__(self) -> None:
        for name, unit in (("max_seconds", "seconds"), ("max_memory", "bytes")):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}, expected a positive number of {unit}, or None.")

    @property
    def seconds(self) -> float:
        """The bound on time, infinite where there is none."""
        return math.inf if self.max_seconds is None else float(self.max_seconds)

    def memory(self, device: torch.device) -> float:
        """The bound on memory on this device: what is free counts too."""
        free = FREE_SHARE * free_memory(device)
        return free if self.max_memory is None else min(float(self.max_memory), free)
