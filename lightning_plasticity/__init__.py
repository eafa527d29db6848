"""Measure and preserve plasticity, a network's ability to keep learning, in PyTorch Lightning."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where names live that are not callbacks. Imported when first asked for: the command line's help needs no torch.
_HOMES = {
    "Spectrum": "curvature",
    "CReLU": "interventions",
    "insert_layer_norm": "interventions",
    "TaskRecord": "records",
    "read_records": "records",
    "L2": "regularization",
    "EffectiveRank": "regularization",
    "L2Init": "regularization",
    "SpectralNorm": "regularization",
    "Wasserstein": "regularization",
}
_MODULES = (
    *("callbacks", "curvature", "interventions", "linalg", "loggers", "metrics", "nn", "records", "regularization"),
    *("sparsity", "streams", "trainability"),
)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first asked for (PEP 562)."""
    if name in _MODULES:
        return _import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_import_module(f"{__name__}.{_HOMES.get(name, 'callbacks')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__name__", "__doc__", "__file__", "__path__"]
