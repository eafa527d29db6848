"""Small LightningModules of every kind that people write; ``KINDS`` holds (name, make_module, make_loaders, expectation)."""

from zoo.base import Expectation, Kind
from zoo.batches import KINDS as BATCHES

KINDS: list[Kind] = [*BATCHES]

__all__ = ["KINDS", "Expectation", "Kind"]
