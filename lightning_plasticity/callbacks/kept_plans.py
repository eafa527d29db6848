"""Plans that a run makes at its first measurement and keeps, so that the numbers of its tasks compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

AnyPlan = TypeVar("AnyPlan")


class KeptPlans:
    """Plans by name, in a form that checkpoints can hold.

    Args:
        settings: plain values that plans depend on; those of a checkpoint made under others are not taken.
    """

    def __init__(self, settings: list[Any]) -> None:
        self._settings = settings
        self._kept: dict[str, dict[str, Any]] = {}

    def get(self, name: str, kind: type[AnyPlan], make: Callable[[], AnyPlan]) -> tuple[AnyPlan, bool]:
        """The plan of this name, a frozen dataclass, made now if there is none yet; and whether it is new."""
        new = name not in self._kept
        if new:
            self._kept[name] = asdict(make())  # type: ignore[call-overload]
        return kind(**self._kept[name]), new

    def state_dict(self) -> dict[str, Any]:
        """All plans, as plain values."""
        return {"settings": self._settings, "plans": {name: dict(plan) for name, plan in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the plans of the run that is resumed, unless it was told otherwise what to do."""
        if state["settings"] == self._settings:
            self._kept = {name: dict(plan) for name, plan in state["plans"].items()}
