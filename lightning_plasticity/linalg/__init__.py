"""Linear algebra on tensors and matrix-vector products: ranks, units, Lanczos. Knows nothing of modules."""

from lightning_plasticity.linalg.effective_rank import effective_rank
from lightning_plasticity.linalg.estimate import Estimate
from lightning_plasticity.linalg.feature_matrix import as_feature_matrix
from lightning_plasticity.linalg.functionals import effective_rank_of, participation_ratio_of, srank_of, stable_rank_of
from lightning_plasticity.linalg.inertia import count_above
from lightning_plasticity.linalg.lanczos import LanczosResult, Matvec, lanczos
from lightning_plasticity.linalg.power_iteration import largest_singular_value
from lightning_plasticity.linalg.progress import Progress, watching
from lightning_plasticity.linalg.quadrature import LanczosQuadrature, stochastic_lanczos_quadrature
from lightning_plasticity.linalg.rank_bounds import effective_rank_bounds, extreme_spectra, functional_bounds
from lightning_plasticity.linalg.ranks import (
    approximate_rank,
    feature_rank,
    numerical_rank,
    participation_ratio,
    singular_values,
    srank,
    stable_rank,
)
from lightning_plasticity.linalg.units import dead_units, dormancy_scores, dormant_units

__all__ = [
    "Estimate",
    "LanczosQuadrature",
    "LanczosResult",
    "Matvec",
    "Progress",
    "approximate_rank",
    "as_feature_matrix",
    "count_above",
    "dead_units",
    "dormancy_scores",
    "dormant_units",
    "effective_rank",
    "effective_rank_bounds",
    "effective_rank_of",
    "extreme_spectra",
    "feature_rank",
    "functional_bounds",
    "lanczos",
    "largest_singular_value",
    "numerical_rank",
    "participation_ratio",
    "participation_ratio_of",
    "singular_values",
    "srank",
    "srank_of",
    "stable_rank",
    "stable_rank_of",
    "stochastic_lanczos_quadrature",
    "watching",
]
