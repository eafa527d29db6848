"""Streaming metrics of features and units, for use with torchmetrics and Lightning."""

from lightning_plasticity.metrics.rank import (
    ApproximateRank,
    EffectiveRank,
    FeatureRank,
    NumericalRank,
    SingularValues,
    SRank,
    StableRank,
)
from lightning_plasticity.metrics.units import DeadUnitRatio, DormantUnitRatio

__all__ = [
    "ApproximateRank",
    "DeadUnitRatio",
    "DormantUnitRatio",
    "EffectiveRank",
    "FeatureRank",
    "NumericalRank",
    "SRank",
    "SingularValues",
    "StableRank",
]
