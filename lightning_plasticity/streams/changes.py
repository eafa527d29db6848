"""What makes the next task another one: changes of inputs or targets that turn any dataset into a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_plasticity.streams.base import Samples, at_least_one


class Change(Protocol):
    """Makes the samples of a task from those of the dataset."""

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """The task's inputs (N, ...) and targets (N,).

        Args:
            inputs: of the dataset, (N, ...); not to be changed in place.
            targets: of the dataset, (N,).
            task: index from 0.
            generator: depends on the stream's seed and the task.
        """
        ...


@dataclass(frozen=True)
class PermutePixels:
    """A new fixed permutation of the input's elements for each task (Goodfellow et al. 2013, 1312.6211).

    A permutation composed with the last task's, as in lop-jax, is again a uniform random one: the same protocol.

    Args:
        first_task: permute task 0 too; False leaves it as it is.
    """

    first_task: bool = True

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """The same permutation for every sample of the task."""
        if task == 0 and not self.first_task:
            return inputs, targets
        flat = inputs.flatten(1)
        order = torch.randperm(flat.shape[1], generator=generator)
        return flat[:, order].reshape(inputs.shape), targets


@dataclass(frozen=True)
class RandomLabels:
    """New uniform labels for each task: nothing to transfer, only the ability to learn counts (Zhang et al. 2017)."""

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """Labels among the dataset's number of classes."""
        return inputs, torch.randint(number_of_classes(targets), targets.shape, generator=generator)


@dataclass(frozen=True)
class PermuteLabels:
    """A new permutation of the classes for each task."""

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """Every class gets another class's label."""
        return inputs, torch.randperm(number_of_classes(targets), generator=generator)[targets]


@dataclass(frozen=True)
class LabelNoise:
    """A share of the labels is replaced by uniform ones, other samples in each task.

    Args:
        probability: of a sample to get a random label, 0 to 1.
    """

    probability: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability!r}, expected 0 to 1.")

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """Independent over samples."""
        noisy = torch.rand(targets.shape, generator=generator) < self.probability
        labels = torch.randint(number_of_classes(targets), targets.shape, generator=generator)
        return inputs, torch.where(noisy, labels, targets)


@dataclass(frozen=True)
class SplitClasses:
    """Each task is the samples of a few classes, chosen anew from all (as Continual ImageNet's pairs).

    Args:
        classes_per_task: how many; labels are 0 ... classes_per_task - 1 in every task.
        relabel: False keeps the dataset's own labels.
    """

    classes_per_task: int = 2
    relabel: bool = True

    def __post_init__(self) -> None:
        at_least_one("classes_per_task", self.classes_per_task)

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """The samples of the task's classes, in the dataset's order."""
        total = number_of_classes(targets)
        if self.classes_per_task > total:
            raise ValueError(f"classes_per_task={self.classes_per_task}, but the dataset has {total} classes.")
        classes = torch.randperm(total, generator=generator)[: self.classes_per_task]
        chosen = torch.isin(targets, classes)
        labels = targets[chosen]
        if self.relabel:
            new = torch.zeros(total, dtype=targets.dtype)
            new[classes] = torch.arange(self.classes_per_task, dtype=targets.dtype)
            labels = new[labels]
        return inputs[chosen], labels


@dataclass(frozen=True)
class Drift:
    """Slow drift: inputs move along a fixed random direction, a little further with each task.

    Args:
        speed: distance per task, in root-mean-square deviations of the inputs.
        seed: of the direction.
    """

    speed: float = 0.1
    seed: int = 0

    def __call__(self, inputs: Tensor, targets: Tensor, task: int, generator: torch.Generator) -> Samples:
        """All samples are shifted alike; the direction has unit root mean square."""
        direction = torch.randn(inputs.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        direction = direction / direction.square().mean().sqrt()
        return inputs + task * self.speed * inputs.std() * direction.to(inputs.dtype), targets


def number_of_classes(targets: Tensor) -> int:
    """One more than the largest label; targets that are no class indices are refused."""
    if targets.dtype.is_floating_point or targets.ndim != 1 or not len(targets) or int(targets.min()) < 0:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and dtype {targets.dtype}, expected class indices (N,), int64; "
            "this change is for classification."
        )
    return int(targets.max()) + 1
