"""Continual streams on the handwritten digits that scikit-learn ships: real data, no download."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity._optional import require
from lightning_plasticity.streams.base import Samples, TaskStream, at_least_one
from lightning_plasticity.streams.changes import Change, PermuteLabels, PermutePixels
from lightning_plasticity.streams.dataset_stream import DatasetStream

NUM_CLASSES = 10
NUM_FEATURES = 64


class RandomLabelDigits(TaskStream):
    """Each task gives new random labels to newly drawn digits: nothing to transfer, so only the ability to learn shows.

    Task t serves ``samples_per_task`` of the 1797 digits (Alpaydin and Kaynak 1998, 8 x 8 pixels), drawn without
    replacement, with uniform labels; both depend on ``seed`` and t only. Use one fit with
    ``max_epochs=num_tasks * epochs_per_task``, ``reload_dataloaders_every_n_epochs=epochs_per_task`` and a
    ``TaskTracker(EveryNEpochs(epochs_per_task))``; or a fit per task, with ``stream.task_id`` set before each.

    Args:
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served.
        samples_per_task: images in each task, at most 1797.
        batch_size: minibatch.
        seed: of images, labels and shuffling.

    Raises:
        ValueError: for sizes out of range.
        ModuleNotFoundError: without scikit-learn.

    Example:
        >>> from lightning_plasticity.streams import RandomLabelDigits
        >>> inputs, labels = RandomLabelDigits(seed=0).task_data(0)
        >>> inputs.shape, labels.shape
        (torch.Size([400, 64]), torch.Size([400]))
    """

    def __init__(
        self,
        num_tasks: int = 16,
        epochs_per_task: int = 30,
        samples_per_task: int = 400,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks, epochs_per_task, batch_size, seed)
        self._images = load_digits()
        at_least_one("samples_per_task", samples_per_task)
        if samples_per_task > len(self._images):
            raise ValueError(f"samples_per_task={samples_per_task}, expected 1 to {len(self._images)}.")
        self.samples_per_task = samples_per_task

    def task_data(self, task: int) -> Samples:
        """Inputs (samples_per_task, 64) float32 and labels (samples_per_task,) of a task."""
        generator = self.generator(task)
        chosen = torch.randperm(len(self._images), generator=generator)[: self.samples_per_task]
        return self._images[chosen], torch.randint(NUM_CLASSES, (self.samples_per_task,), generator=generator)


class _ChangedDigits(DatasetStream):
    """The digits under one kind of change."""

    _kind: Change

    def __init__(
        self,
        num_tasks: int = 40,
        epochs_per_task: int = 10,
        samples_per_task: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        digits = load_digits(), digit_labels()
        super().__init__(digits, self._kind, num_tasks, epochs_per_task, samples_per_task, batch_size, seed)


class PermutedDigits(_ChangedDigits):
    """The digits with their 64 pixels in a new order in each task.

    Args:
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served.
        samples_per_task: images in each task, drawn without replacement; None for all 1797.
        batch_size: minibatch.
        seed: of permutations, draws and order.

    Example:
        >>> from lightning_plasticity.streams import PermutedDigits
        >>> PermutedDigits(num_tasks=3).task_data(2)[0].shape
        torch.Size([1797, 64])
    """

    _kind = PermutePixels()


class PermutedLabelDigits(_ChangedDigits):
    """The digits with their ten classes renamed in each task: the features stay useful, the head does not.

    Args:
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served.
        samples_per_task: images in each task, drawn without replacement; None for all 1797.
        batch_size: minibatch.
        seed: of permutations, draws and order.
    """

    _kind = PermuteLabels()


def load_digits() -> Tensor:
    """(1797, 64) float32 digits, scaled to [0, 1] and standardised by one mean and one deviation."""
    images = require("sklearn.datasets", "The digits stream").load_digits().images
    inputs = torch.as_tensor(images, dtype=torch.float32).reshape(len(images), NUM_FEATURES) / 16.0
    return (inputs - inputs.mean()) / inputs.std()


def digit_labels() -> Tensor:
    """(1797,) int64 labels of the same images."""
    return torch.as_tensor(require("sklearn.datasets", "The digits stream").load_digits().target, dtype=torch.int64)
