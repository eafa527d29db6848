"""Modules: undisturbed measuring, feature taps and finding the hidden layers. Knows no loss and no Trainer."""

from lightning_plasticity.nn.features import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers
from lightning_plasticity.nn.undisturbed import Mode, is_measuring, preserve_rng, undisturbed

__all__ = [
    "FeatureTaps",
    "HiddenLayer",
    "Mode",
    "find_hidden_layers",
    "is_measuring",
    "named_layers",
    "preserve_rng",
    "undisturbed",
]
