"""Remedies that act on weights: re-drawn units and layers, shrinking and noise, layer norms; they know no Trainer."""

from lightning_plasticity.interventions.continual_backprop import ContinualBackpropEngine
from lightning_plasticity.interventions.redo import ReDoEngine
from lightning_plasticity.interventions.unit_reset import UnitResets

__all__ = ["ContinualBackpropEngine", "ReDoEngine", "UnitResets"]
