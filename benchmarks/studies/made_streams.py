"""Incremental CIFAR-100 on files that ``python -m benchmarks.image_files`` made, which fail torchvision's checksums."""

from __future__ import annotations

from unittest import mock

from torchvision.datasets import CIFAR100

from lightning_plasticity.streams import IncrementalCIFAR100


class MadeCIFAR100(IncrementalCIFAR100):
    """The same loading code and protocol, without the checksums."""

    def __init__(self, root: str = "data/made", num_tasks: int = 20, epochs_per_task: int = 200, seed: int = 0) -> None:
        with (
            mock.patch.object(CIFAR100, "_check_integrity", return_value=True),
            mock.patch("torchvision.datasets.cifar.check_integrity", return_value=True),
        ):
            super().__init__(root, "lop-jax", num_tasks, epochs_per_task=epochs_per_task, seed=seed)
