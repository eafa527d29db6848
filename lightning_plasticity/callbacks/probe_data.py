"""The data that curvature and ranks are measured on, fetched without training noticing.

First what the user hands over; else samples of the training dataset, evenly spread, fetched by ourselves; else clones
of the batch that has just arrived. The training loader itself is never iterated: that changes what training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_plasticity.callbacks.live import live_optimizers
from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.batches import batch_size, clone_batch
from lightning_plasticity.nn.generators import generator_state, held_by

CHUNK = 512  # samples in one probe batch at most


def probe_batches(trainer: Any, pl_module: Any, data: Any, num_samples: int, first_batch: Any) -> tuple[list[Any], str]:
    """Probe batches on the module's device, and where they came from.

    Args:
        trainer: the Trainer.
        pl_module: the module; its transfer hooks are applied.
        data: the user's batch, dataset, loader or callable ``(trainer, pl_module)``, or None.
        num_samples: at most so many samples (a user's own batch, or the batch of a loader that reaches it, is taken
            whole).
        first_batch: the task's first batch, already transferred; the last resort.

    Raises:
        MeasurementError: when there is nothing to measure on.
    """
    # The module's transfer hooks run here, and its own augmentation: with a fixed seed, and forgotten afterwards.
    with undisturbed(pl_module, mode="as_is", **live_optimizers(pl_module)):
        if data is not None:
            data = data(trainer, pl_module) if _is_function(data) else data
            with _untouched(data):
                return _transferred(trainer, pl_module, _from_user(data, num_samples)), "given"
        loader = _single_loader(trainer)
        if loader is not None:
            with _untouched(loader.dataset, loader.collate_fn, getattr(trainer, "datamodule", None)):
                indices = getattr(loader.sampler, "indices", None)  # of a SubsetRandomSampler: the rest is held out
                batches = list(_spread(loader.dataset, num_samples, loader.collate_fn, loader.batch_size, indices))
                if batches:
                    return _transferred(trainer, pl_module, batches), "training dataset"
        if first_batch is None:
            raise MeasurementError("No probe data: the training loader gave no batch; pass data= to the monitor.")
        return [clone_batch(first_batch)], "first batch"


def _is_function(data: Any) -> bool:
    """Whether the data have to be asked for; a batch that happens to be callable is still a batch."""
    return callable(data) and not isinstance(data, Tensor | Mapping | Dataset | Iterable)


def _single_loader(trainer: Any) -> DataLoader[Any] | None:
    """The Trainer's training loader, if it is one plain loader over a map-style dataset."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return loader if hasattr(loader.dataset, "__len__") and loader.batch_sampler is not None else None


def _spread(
    dataset: Any,
    num_samples: int,
    collate: Callable[[list[Any]], Any] | None = None,
    size: int | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Samples evenly spread over the dataset, shuffled by a fixed seed, without workers.

    Data sorted by class are covered too, also by those who use only the first of the samples.
    """
    indices = range(len(dataset)) if indices is None else indices
    total, count = len(indices), min(num_samples, len(indices))
    chunk = max(size or 1, min(CHUNK, count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, count, chunk):
        chosen = [int(indices[k * total // count]) for k in order[start : start + chunk]]
        samples = [dataset[index] for index in chosen]
        yield torch.utils.data.default_collate(samples) if collate is None else collate(samples)


def _from_user(data: Any, num_samples: int) -> list[Any]:
    if isinstance(data, DataLoader):
        return list(_until(iter(data), num_samples))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return list(_spread(data, num_samples))
    if isinstance(data, Tensor | Mapping | tuple) or (isinstance(data, list) and data and isinstance(data[0], Tensor)):
        return [clone_batch(data)]
    if isinstance(data, Iterable) and not is_dataclass(data):
        return list(_until(iter(data), num_samples))
    return [clone_batch(data)]


def _until(batches: Iterator[Any], num_samples: int) -> Iterator[Any]:
    seen = 0
    for batch in islice(batches, num_samples):
        yield batch
        seen += batch_size(batch)
        if seen >= num_samples:
            return


def _transferred(trainer: Any, pl_module: Any, batches: list[Any]) -> list[Any]:
    """The way that Lightning sends a training batch: precision, hooks, device."""
    if not batches:
        raise MeasurementError(
            "The probe data holds no batch; pass a batch, or a non-empty dataset or loader, as data=. "
            "An iterator can be used only once; pass what makes it."
        )
    strategy = trainer.strategy
    convert = getattr(getattr(strategy, "precision_plugin", None), "convert_input", None)
    out = []
    for batch in batches:
        batch = clone_batch(batch)
        if convert is not None:
            batch = convert(batch)
        batch = _hook_owner(trainer, pl_module).on_before_batch_transfer(batch, 0)
        out.append(strategy.batch_to_device(batch, dataloader_idx=0))
    return out


def _hook_owner(trainer: Any, pl_module: Any) -> Any:
    """The datamodule where it overrides the hook, as Lightning chooses, else the module."""
    datamodule = getattr(trainer, "datamodule", None)
    method = getattr(type(datamodule), "on_before_batch_transfer", None)
    overridden = method is not None and not method.__module__.startswith(("lightning.", "pytorch_lightning."))
    return datamodule if overridden else pl_module


@contextmanager
def _untouched(*owners: Any) -> Iterator[None]:
    """Put back what fetching samples may change: random generators that data keep, and attributes such as counters."""
    held = held_by(*owners)
    states = [state for state in map(generator_state, held) if state is not None]
    attributes = [(value, dict(vars(value))) for value in held if isinstance(value, Dataset)]
    try:
        yield
    finally:
        for state in states:
            state()
        for dataset, before in attributes:
            vars(dataset).clear()
            vars(dataset).update(before)
