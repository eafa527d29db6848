"""Sparse weights: random masks of a given density, and the rules by which they change; knows no Trainer."""

from lightning_plasticity.sparsity.density import active_counts
from lightning_plasticity.sparsity.engine import SparseTopologyEngine
from lightning_plasticity.sparsity.layers import chosen_layers, sparsify
from lightning_plasticity.sparsity.rules import exchanged, fraction_at

__all__ = ["SparseTopologyEngine", "active_counts", "chosen_layers", "exchanged", "fraction_at", "sparsify"]
