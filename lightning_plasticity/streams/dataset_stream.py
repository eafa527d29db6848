"""Any dataset, or any list of loaders, as a stream of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plasticity.streams.base import CHANGE_STRIDE, Samples, TaskStream, at_least_one
from lightning_plasticity.streams.changes import Change


class DatasetStream(TaskStream):
    """Turns a dataset into a stream: each task is a sample of it, changed.

    Args:
        dataset: ``(inputs, targets)`` tensors, or a map-style dataset of ``(input, target)`` pairs, which is read into
            memory once.
        change: what makes task t another one, such as ``PermutePixels()``, ``SplitClasses(2)``, or a function
            ``(inputs, targets, task, generator) -> (inputs, targets)``; None: every task is a new draw only.
        num_tasks: length of the stream.
        epochs_per_task: epochs that each task is served.
        samples_per_task: drawn without replacement before the change; None for all.
        batch_size: minibatch.
        seed: of draws, changes and order.
        test_dataset: held-out data, to which the same change is applied (not thinned).

    Raises:
        ValueError: for sizes out of range.
        TypeError: for a dataset that is not made of (input, target) pairs.

    Example:
        >>> import torch
        >>> from lightning_plasticity.streams import DatasetStream, PermutePixels
        >>> data = torch.randn(100, 1, 8, 8), torch.arange(100) % 10
        >>> stream = DatasetStream(data, PermutePixels(), num_tasks=5, samples_per_task=50)
        >>> [tuple(tensor.shape) for tensor in stream.task_data(3)]
        [(50, 1, 8, 8), (50,)]
    """

    def __init__(
        self,
        dataset: Any,
        change: Change | Callable[..., Samples] | None = None,
        num_tasks: int = 10,
        epochs_per_task: int = 1,
        samples_per_task: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        test_dataset: Any = None,
    ) -> None:
        super().__init__(num_tasks, epochs_per_task, batch_size, seed)
        if change is not None and not callable(change):
            raise TypeError(f"change={change!r}, expected a change such as PermutePixels(), a function, or None.")
        self.change = change
        self._samples = tensors(dataset)
        self._held_out = None if test_dataset is None else tensors(test_dataset)
        if samples_per_task is not None:
            at_least_one("samples_per_task", samples_per_task)
            if samples_per_task > len(self._samples[1]):
                raise ValueError(
                    f"samples_per_task={samples_per_task}, but the dataset has {len(self._samples[1])} samples."
                )
        self.samples_per_task = samples_per_task

    def task_data(self, task: int) -> Samples:
        """Inputs and targets of a task; the same at every call."""
        inputs, targets = self._samples
        if self.samples_per_task is not None:
            chosen = torch.randperm(len(targets), generator=self.generator(task))[: self.samples_per_task]
            inputs, targets = inputs[chosen], targets[chosen]
        return self._changed(inputs, targets, task)

    def test_data(self, task: int) -> Samples | None:
        """The held-out samples under the task's change."""
        return None if self._held_out is None else self._changed(*self._held_out, task)

    def _changed(self, inputs: Tensor, targets: Tensor, task: int) -> Samples:
        if self.change is None:
            return inputs, targets
        changed: Samples = self.change(inputs, targets, task, self.generator(task, CHANGE_STRIDE))
        return changed


class LoaderStream(TaskStream):
    """A list of loaders as a stream: task t is loader t, as it is.

    Args:
        loaders: of the tasks, in order.
        epochs_per_task: epochs that each task is served.
        test_loaders: held-out data by task; None for none.

    Raises:
        ValueError: for an empty list, or lists of unlike lengths.
    """

    def __init__(
        self, loaders: Sequence[Any], epochs_per_task: int = 1, test_loaders: Sequence[Any] | None = None
    ) -> None:
        if not len(loaders):
            raise ValueError("loaders is empty, expected one loader for each task.")
        if test_loaders is not None and len(test_loaders) != len(loaders):
            raise ValueError(
                f"{len(loaders)} loaders but {len(test_loaders)} test_loaders, expected one for each task."
            )
        super().__init__(len(loaders), epochs_per_task, batch_size=1)
        self.loaders, self.test_loaders = list(loaders), None if test_loaders is None else list(test_loaders)

    def train_dataloader(self) -> Any:
        """The current task's loader."""
        return self.loaders[self.current_task]

    def test_dataloader(self) -> Any:
        """The current task's held-out loader."""
        return [] if self.test_loaders is None else self.test_loaders[self.current_task]


def tensors(dataset: Any) -> Samples:
    """A dataset's inputs and targets as two tensors.

    Raises:
        TypeError: where it is not made of (input, target) pairs that can be stacked.
    """
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        inputs, targets = dataset
        if len(inputs) != len(targets) or not len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets, expected as many of each, at least 1.")
        return inputs, targets
    held = getattr(dataset, "tensors", None)  # TensorDataset
    if isinstance(held, tuple) and len(held) == 2:
        return tensors(held)
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset is a {type(dataset).__name__}, expected (inputs, targets) or a map-style Dataset.")
    try:
        pairs = [dataset[index] for index in range(len(dataset))]
        inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        return inputs, torch.stack([torch.as_tensor(y) for _, y in pairs])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{type(dataset).__name__} could not be read as (input, target) pairs of tensors of one shape: {error}. "
            "Pass a transform that makes tensors, or (inputs, targets)."
        ) from error
