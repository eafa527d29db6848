"""Regularisers that keep plasticity; they act on a module and its optimizer and know no Trainer."""

from lightning_plasticity.regularization.base import Regularizer
from lightning_plasticity.regularization.effective_rank import EffectiveRank
from lightning_plasticity.regularization.engine import RegularizationEngine
from lightning_plasticity.regularization.l2 import L2

__all__ = ["L2", "EffectiveRank", "RegularizationEngine", "Regularizer"]
