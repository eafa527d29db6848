"""Callbacks and mixins: thin shells that say when, and leave what to the rooms below."""

from lightning_plasticity.callbacks.alert import PlasticityAlert
from lightning_plasticity.callbacks.feature_monitor import FeatureRankMonitor
from lightning_plasticity.callbacks.hessian_monitor import HessianSpectrumMonitor
from lightning_plasticity.callbacks.mixin import L2ERMixin, RegularizerMixin
from lightning_plasticity.callbacks.regularization import Regularization
from lightning_plasticity.callbacks.schedules import EveryFit, EveryNEpochs, EveryNSteps, TaskAttribute, TaskSchedule
from lightning_plasticity.callbacks.task_tracker import TaskTracker

__all__ = [
    "EveryFit",
    "EveryNEpochs",
    "EveryNSteps",
    "FeatureRankMonitor",
    "HessianSpectrumMonitor",
    "L2ERMixin",
    "PlasticityAlert",
    "Regularization",
    "RegularizerMixin",
    "TaskAttribute",
    "TaskSchedule",
    "TaskTracker",
]
