"""Small LightningModules of every kind; ``KINDS`` holds (name, make_module, make_loaders, expectation)."""

from zoo.attributes import KINDS as ATTRIBUTES
from zoo.base import Expectation, Kind
from zoo.batches import KINDS as BATCHES
from zoo.layers import KINDS as LAYERS
from zoo.parameters import KINDS as PARAMETERS
from zoo.reaching import KINDS as REACHING
from zoo.steps import KINDS as STEPS

KINDS: list[Kind] = [*BATCHES, *STEPS, *LAYERS, *PARAMETERS, *ATTRIBUTES, *REACHING]

__all__ = ["KINDS", "Expectation", "Kind"]
