"""Modules: undisturbed measuring, feature taps and finding the hidden layers. Knows no loss and no Trainer."""

from lightning_plasticity.nn.features import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers
from lightning_plasticity.nn.undisturbed import Mode, is_measuring, preserve_rng, undisturbed
from lightning_plasticity.nn.wiring import HiddenUnits, Link, Wiring, told_wiring
from lightning_plasticity.nn.wiring_trace import find_wiring

__all__ = [
    "FeatureTaps",
    "HiddenLayer",
    "HiddenUnits",
    "Link",
    "Mode",
    "Wiring",
    "find_hidden_layers",
    "find_wiring",
    "is_measuring",
    "named_layers",
    "preserve_rng",
    "told_wiring",
    "undisturbed",
]
