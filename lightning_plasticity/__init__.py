"""Measure and preserve plasticity, a network's ability to keep learning, in PyTorch Lightning."""

from importlib.metadata import version as _version

from lightning_plasticity import curvature, linalg, metrics, streams
from lightning_plasticity.callbacks import (
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    PlasticityAlert,
    Regularization,
    RegularizerMixin,
    TaskAttribute,
    TaskSchedule,
    TaskTracker,
)
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.records import TaskRecord, read_records
from lightning_plasticity.regularization import L2, EffectiveRank

__version__ = _version("lightning-plasticity")

__all__ = [
    "L2",
    "EffectiveRank",
    "EveryFit",
    "EveryNEpochs",
    "EveryNSteps",
    "FeatureRankMonitor",
    "HessianSpectrumMonitor",
    "L2ERMixin",
    "PlasticityAlert",
    "Regularization",
    "RegularizerMixin",
    "Spectrum",
    "TaskAttribute",
    "TaskRecord",
    "TaskSchedule",
    "TaskTracker",
    "__version__",
    "curvature",
    "linalg",
    "metrics",
    "read_records",
    "streams",
]
