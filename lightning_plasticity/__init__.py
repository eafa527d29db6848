"""Measure and preserve plasticity, a network's ability to keep learning, in PyTorch Lightning."""

from importlib.metadata import version as _version

from lightning_plasticity import curvature, linalg, metrics, streams
from lightning_plasticity.callbacks import (
    ContinualBackprop,
    EveryFit,
    EveryNEpochs,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    LayerReset,
    PlasticityAlert,
    ReDo,
    Regularization,
    RegularizerMixin,
    ShrinkAndPerturb,
    SparseTopology,
    TaskAttribute,
    TaskSchedule,
    TaskTracker,
    TrainabilityProbe,
)
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.interventions import CReLU, insert_layer_norm
from lightning_plasticity.records import TaskRecord, read_records
from lightning_plasticity.regularization import L2, EffectiveRank, L2Init, SpectralNorm, Wasserstein

__version__ = _version("lightning-plasticity")

__all__ = [
    "L2",
    "CReLU",
    "ContinualBackprop",
    "EffectiveRank",
    "EveryFit",
    "EveryNEpochs",
    "EveryNSteps",
    "FeatureRankMonitor",
    "HessianSpectrumMonitor",
    "L2ERMixin",
    "L2Init",
    "LayerReset",
    "PlasticityAlert",
    "ReDo",
    "Regularization",
    "RegularizerMixin",
    "ShrinkAndPerturb",
    "SparseTopology",
    "SpectralNorm",
    "Spectrum",
    "TaskAttribute",
    "TaskRecord",
    "TaskSchedule",
    "TaskTracker",
    "TrainabilityProbe",
    "Wasserstein",
    "__version__",
    "curvature",
    "insert_layer_norm",
    "linalg",
    "metrics",
    "read_records",
    "streams",
]
