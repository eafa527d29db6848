"""Callbacks and mixins: thin shells that say when, and leave what to the rooms below."""

from lightning_plasticity.callbacks.alert import PlasticityAlert
from lightning_plasticity.callbacks.feature_monitor import FeatureRankMonitor
from lightning_plasticity.callbacks.hessian_monitor import HessianSpectrumMonitor
from lightning_plasticity.callbacks.mixin import L2ERMixin, RegularizerMixin
from lightning_plasticity.callbacks.regularization import Regularization
from lightning_plasticity.callbacks.schedules import EveryFit, EveryNEpochs, EveryNSteps, TaskAttribute, TaskSchedule
from lightning_plasticity.callbacks.sparse_topology import SparseTopology
from lightning_plasticity.callbacks.task_tracker import TaskTracker
from lightning_plasticity.callbacks.trainability_probe import TrainabilityProbe
from lightning_plasticity.callbacks.unit_interventions import ContinualBackprop, ReDo
from lightning_plasticity.callbacks.weight_interventions import LayerReset, ShrinkAndPerturb

__all__ = [
    "ContinualBackprop",
    "EveryFit",
    "EveryNEpochs",
    "EveryNSteps",
    "FeatureRankMonitor",
    "HessianSpectrumMonitor",
    "L2ERMixin",
    "LayerReset",
    "PlasticityAlert",
    "ReDo",
    "Regularization",
    "RegularizerMixin",
    "ShrinkAndPerturb",
    "SparseTopology",
    "TaskAttribute",
    "TaskSchedule",
    "TaskTracker",
    "TrainabilityProbe",
]
