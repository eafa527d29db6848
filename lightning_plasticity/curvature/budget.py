"""What a measurement may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.memory import GraphMeter, free_memory

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
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{name}={value!r}, expected a positive number of {unit}, or None.")

    @property
    def seconds(self) -> float:
        """The bound on time, infinite where there is none."""
        return math.inf if self.max_seconds is None else float(self.max_seconds)

    def memory(self, device: torch.device) -> float:
        """The bound on memory on this device: what is free counts too."""
        free = FREE_SHARE * free_memory(device)
        return free if self.max_memory is None else min(float(self.max_memory), free)

    def reason(self, changes: Sequence[str], memory: float) -> str:
        """What a record says about what was changed, given the bytes that were allowed; empty for no change."""
        if not changes:
            return ""
        bounds = in_mib(memory) if math.isinf(self.seconds) else f"{self.seconds:g} s and {in_mib(memory)}"
        return f"{', '.join(changes)}, to stay within {bounds}"


def training_step_bytes(measured: Measured, batch: Any) -> int:
    """Bytes that one training step needs: weights, gradients, the optimizers' state, and the graph of the loss.

    Args:
        measured: the module and its optimizers.
        batch: what a step trains on, on the module's device.
    """
    parameters = [parameter for parameter in measured.module.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in measured.module.parameters())
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    states = max((_states(optimizer) for optimizer in measured.optimizers), default=0)
    with measured.open() as closure, GraphMeter(list(measured.module.parameters())) as meter:
        closure.run(batch)
    return weights + (1 + states) * gradients + meter.num_bytes


def ended_early(cause: str, done: int, wanted: int, why: str) -> str:
    """What a record says of a run that made fewer steps than its plan, after what the plan says."""
    ended = f"ended by {cause} after {done} of {wanted} Lanczos steps"
    return f"{why}; {ended}" if why else ended


def in_mib(size: float) -> str:
    """A number of bytes, for messages."""
    return f"{size / 2**20:.3g} MiB" if size < 2**20 else f"{size / 2**20:.0f} MiB"


def _states(optimizer: Any) -> int:
    """Tensors of a parameter's size that an optimizer keeps for it; it has them only after its first step."""
    defaults = getattr(optimizer, "defaults", {})
    return 2 if "betas" in defaults else int(bool(defaults.get("momentum")))
