"""Regularisers that keep plasticity; they act on a module and its optimizer and know no Trainer."""

from lightning_plasticity.regularization.base import Regularizer
from lightning_plasticity.regularization.effective_rank import EffectiveRank
from lightning_plasticity.regularization.engine import RegularizationEngine
from lightning_plasticity.regularization.l2 import L2
from lightning_plasticity.regularization.l2_init import L2Init
from lightning_plasticity.regularization.spectral_norm import SpectralNorm
from lightning_plasticity.regularization.wasserstein import Wasserstein

__all__ = ["L2", "EffectiveRank", "L2Init", "RegularizationEngine", "Regularizer", "SpectralNorm", "Wasserstein"]
