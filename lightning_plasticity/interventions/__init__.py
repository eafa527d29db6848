"""Remedies that act on weights: re-drawn units and layers, shrinking and noise, layer norms; they know no Trainer."""

from lightning_plasticity.interventions.continual_backprop import ContinualBackpropEngine
from lightning_plasticity.interventions.crelu import CReLU, use_crelu
from lightning_plasticity.interventions.layer_norm import insert_layer_norm
from lightning_plasticity.interventions.layer_reset import reset_layers
from lightning_plasticity.interventions.redo import ReDoEngine
from lightning_plasticity.interventions.shrink_and_perturb import shrink_and_perturb
from lightning_plasticity.interventions.unit_reset import UnitResets

__all__ = [
    "CReLU",
    "ContinualBackpropEngine",
    "ReDoEngine",
    "UnitResets",
    "insert_layer_norm",
    "reset_layers",
    "shrink_and_perturb",
    "use_crelu",
]
