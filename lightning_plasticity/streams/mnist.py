"""Permuted MNIST and Fashion-MNIST, on files the user has or lets torchvision download."""

from __future__ import annotations

from typing import Any

import torch

from lightning_plasticity._optional import require
from lightning_plasticity.streams.base import Samples
from lightning_plasticity.streams.changes import Change, PermutePixels, RandomLabels
from lightning_plasticity.streams.dataset_stream import DatasetStream


class PermutedMNIST(DatasetStream):
    """MNIST with its 784 pixels in a new order in each task (Goodfellow et al. 2013, 1312.6211).

    The defaults are the protocol of the paper on spectral collapse (arXiv 2509.22335) and of Dohare et al. 2024 (Nature
    632): every task is one pass over all 60,000 images, one at a time; the metric is online accuracy, before each
    update. They differ in length (800 tasks here) and width of the network.

    Args:
        root: folder that holds ``MNIST/raw`` (or where to put it).
        num_tasks: length of the stream.
        epochs_per_task: passes over a task's images.
        samples_per_task: images in each task, drawn without replacement; None for all 60,000.
        batch_size: minibatch.
        seed: of permutations, draws and order.
        download: let torchvision fetch the files when they are missing.
        flat: images as (784,) rather than (1, 28, 28).

    Raises:
        FileNotFoundError: when the files are missing and ``download`` is off.
        ModuleNotFoundError: without torchvision.
    """

    dataset_name = "MNIST"
    change: Change = PermutePixels()

    def __init__(
        self,
        root: str = "data",
        num_tasks: int = 800,
        epochs_per_task: int = 1,
        samples_per_task: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        download: bool = False,
        flat: bool = True,
    ) -> None:
        self.root, self.download, self.flat = root, download, flat
        train, test = (load_images(self.dataset_name, root, part, download, flat) for part in (True, False))
        change = type(self).change
        super().__init__(train, change, num_tasks, epochs_per_task, samples_per_task, batch_size, seed, test)


class PermutedFashionMNIST(PermutedMNIST):
    """The same with Fashion-MNIST (Xiao et al. 2017, 1708.07747): files in ``FashionMNIST/raw``."""

    dataset_name = "FashionMNIST"


class RandomLabelMNIST(PermutedMNIST):
    """MNIST images under new random labels in each task; draw a few with ``samples_per_task``.

    There is nothing to generalise: ``test_data`` is None.
    """

    change = RandomLabels()

    def test_data(self, task: int) -> Samples | None:
        """None."""
        return None


def load_images(name: str, root: str, train: bool, download: bool, flat: bool) -> Samples:
    """Images in [0, 1], float32, and labels, of a torchvision dataset in the MNIST format.

    Raises:
        FileNotFoundError: with the place where the files are expected.
    """
    datasets: Any = require("torchvision.datasets", f"The {name} stream")
    try:
        dataset = getattr(datasets, name)(root, train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No {name} files in {root}/{name}/raw; put the IDX files there, or pass download=True. ({error})"
        ) from error
    images = dataset.data.float() / 255.0
    return images.flatten(1) if flat else images[:, None], torch.as_tensor(dataset.targets, dtype=torch.int64)
