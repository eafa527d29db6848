"""Continual streams as LightningDataModules."""

from lightning_plasticity.streams.base import TaskStream
from lightning_plasticity.streams.changes import (
    Drift,
    LabelNoise,
    PermuteLabels,
    PermutePixels,
    RandomLabels,
    SplitClasses,
)
from lightning_plasticity.streams.cifar import IncrementalCIFAR100
from lightning_plasticity.streams.dataset_stream import DatasetStream, LoaderStream
from lightning_plasticity.streams.digits import PermutedDigits, PermutedLabelDigits, RandomLabelDigits
from lightning_plasticity.streams.imagenet import ContinualImageNet
from lightning_plasticity.streams.mnist import PermutedFashionMNIST, PermutedMNIST, RandomLabelMNIST
from lightning_plasticity.streams.slippery_ant import SlipperyAnt

__all__ = [
    "ContinualImageNet",
    "DatasetStream",
    "Drift",
    "IncrementalCIFAR100",
    "LabelNoise",
    "LoaderStream",
    "PermuteLabels",
    "PermutePixels",
    "PermutedDigits",
    "PermutedFashionMNIST",
    "PermutedLabelDigits",
    "PermutedMNIST",
    "RandomLabelDigits",
    "RandomLabelMNIST",
    "RandomLabels",
    "SlipperyAnt",
    "SplitClasses",
    "TaskStream",
]
