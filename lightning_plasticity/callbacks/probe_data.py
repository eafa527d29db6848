"""The data that curvature and ranks are measured on, fetched without training noticing.

First what the user hands over; else samples of the training dataset, evenly spread, fetched by ourselves; else clones
of the batch that has just arrived. The training loader itself is never iterated: that changes what training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_plasticity.callbacks.live import live_optimizers
from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.batches import batch_size, clone_batch
from lightning_plasticity.nn.generators import generator_state, held_by, is_helper
from lightning_plasticity.nn.snapshot import CONTAINERS, Snapshot, restore_container

FIRST_BATCH = "first batch"
KEEPERS = (Dataset, torch.nn.Module, LightningDataModule)  # whose attributes a fetched sample may change
CHUNK = 512  # samples in one probe batch at most
TRAINING_DATASET = "training dataset"  # as a source
ITERATION = ("__iter__", "_get_iterator", "__getattribute__")  # how a loader makes its batches
PLAIN_LOADERS = ("torch", "torchdata", "builtins")  # torchdata's StatefulDataLoader yields what a DataLoader does
REMEMBERED = 2**26  # bytes of arrays and tensors of which copies are kept while samples are fetched


@dataclass(frozen=True)
class Probe:
    """What to measure on.

    Attributes:
        batches: on the module's device.
        source: where they came from, for the record.
        smaller: the same samples in batches of the training loader's size, for a step that wants those; None where
            they come no smaller.
    """

    batches: list[Any]
    source: str
    smaller: Callable[[], Probe] | None = None


def probe_batches(trainer: Any, pl_module: Any, data: Any, num_samples: int, first_batch: Any) -> Probe:
    """Fetch probe batches; samples that cannot be collated many at once come in batches of the loader's size.

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
    if data is not None:
        return _given(trainer, pl_module, data, num_samples)
    loader, why_not = _single_loader(trainer)
    if loader is not None and len(_indices(trainer, loader)):
        try:
            return _of_training(trainer, pl_module, loader, num_samples, first_batch)
        except Exception:
            if first_batch is None:
                raise
    if first_batch is None:
        raise MeasurementError("No probe data: the training loader gave no batch; pass data= to the monitor.")
    return Probe([clone_batch(first_batch)], FIRST_BATCH + why_not)


def _given(trainer: Any, pl_module: Any, data: Any, num_samples: int) -> Probe:
    with undisturbed(pl_module, mode="as_is", **live_optimizers(pl_module)):
        data = data(trainer, pl_module) if _is_function(data) else data
        with _untouched(data, getattr(trainer, "datamodule", None)):
            return Probe(_transferred(trainer, pl_module, _from_user(data, num_samples)), "given")


def _of_training(
    trainer: Any, pl_module: Any, loader: DataLoader[Any], num_samples: int, first_batch: Any = None
) -> Probe:
    """As few batches as possible, else those of the loader's own size."""
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or batch_size(first_batch)
    fetch = partial(_fetched, trainer, pl_module, loader, num_samples)
    if own >= min(CHUNK, num_samples, len(_indices(trainer, loader))):
        return Probe(fetch(own), TRAINING_DATASET)

    def smaller() -> Probe:
        return Probe(fetch(own), f"{TRAINING_DATASET}, in batches of {own}")

    try:
        return Probe(fetch(CHUNK), TRAINING_DATASET, smaller)
    except Exception:
        return smaller()


def _fetched(trainer: Any, pl_module: Any, loader: DataLoader[Any], num_samples: int, size: int) -> list[Any]:
    # The module's transfer hooks run here, and its own augmentation: with a fixed seed, and forgotten afterwards.
    with (
        undisturbed(pl_module, mode="as_is", **live_optimizers(pl_module)),
        _untouched(loader.dataset, loader.collate_fn, getattr(trainer, "datamodule", None)),
    ):
        batches = _spread(loader.dataset, num_samples, loader.collate_fn, size, _indices(trainer, loader))
        return _transferred(trainer, pl_module, list(batches))


def _indices(trainer: Any, loader: DataLoader[Any]) -> Sequence[int]:
    """Which samples training sees: all, those of a SubsetRandomSampler, or those that the Trainer's limits leave."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Under DDP Lightning wraps a user's sampler in one that deals its indices out to the ranks.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    indices: Any = getattr(sampler, "indices", None)
    if hasattr(indices, "__len__") and hasattr(indices, "__getitem__"):
        return indices  # type: ignore[no-any-return]
    total = len(loader.dataset)  # type: ignore[arg-type]
    if not isinstance(sampler, SequentialSampler):
        return range(total)
    # The same batches in every epoch; ``limit_train_batches`` and ``overfit_batches`` cut the rest off for good.
    batches, size = trainer.num_training_batches, getattr(loader.batch_sampler, "batch_size", None)
    return range(total if size is None else int(min(total, batches * size)))


def _is_function(data: Any) -> bool:
    """Whether the data have to be asked for; a batch that happens to be callable is still a batch."""
    return callable(data) and not isinstance(data, Tensor | Mapping | Dataset | Iterable)


def _single_loader(trainer: Any) -> tuple[DataLoader[Any] | None, str]:
    """The Trainer's training loader, if it is one plain loader over a map-style dataset; else what is odd about it."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None, ""
    own = [name for name in ITERATION if _defined_in(type(loader), name) not in PLAIN_LOADERS]
    if own:  # what it yields need not be what its dataset and its collate_fn make
        return None, f", for {type(loader).__name__} has a {own[0]} of its own"
    return (loader if hasattr(loader.dataset, "__len__") and loader.batch_sampler is not None else None), ""


def _defined_in(cls: type, name: str) -> str:
    """The package of the class that defines a method."""
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return owner.__module__.partition(".")[0]


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
    total, count, chunk = len(indices), min(num_samples, len(indices)), size or CHUNK
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, count, chunk):
        chosen = [int(indices[k * total // count]) for k in order[start : start + chunk]]
        many = getattr(dataset, "__getitems__", None)  # as a DataLoader does
        samples = many(chosen) if many else [dataset[index] for index in chosen]
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
    """Put back what fetching samples may change: random generators that data keep, counters, lists and caches.

    Also small arrays and tensors. Of large ones, the data themselves mostly, there is no copy, but a warning.
    """
    held = held_by(*owners)
    few = _small(held)
    small = Snapshot(torch.nn.Module(), few)
    copied = {id(value) for value in few}
    large = [(t, t._version) for t in held if isinstance(t, Tensor) and id(t) not in copied and not t.is_inference()]
    states = [state for state in map(generator_state, held) if state is not None]
    attributes = [(vars(value), dict(vars(value))) for value in held if isinstance(value, KEEPERS) or is_helper(value)]
    containers = [(value, value.copy()) for value in held if isinstance(value, CONTAINERS)]
    try:
        yield
    finally:
        for state in states:
            state()
        for container, entries in [*attributes, *containers]:
            restore_container(container, entries)
        small.restore()
        if any(tensor._version != version for tensor, version in large):
            rank_zero_warn(
                "Fetching samples to measure on has changed a large tensor of the dataset in place, which is not put "
                "back: the run differs from one without monitors. Change copies in __getitem__, or pass data=."
            )


def _small(values: Iterable[Any]) -> list[Any]:
    """Arrays and tensors, the smallest first, as many as may be copied."""
    # A memmap is a file.
    sizes: list[tuple[Any, int]] = [(value, value.nbytes) for value in values if type(value) is np.ndarray]
    tensors = [value for value in values if isinstance(value, Tensor) and not is_lazy(value)]
    sizes += [(value, value.numel() * value.element_size()) for value in tensors]
    found, total = [], 0
    for value, size in sorted(sizes, key=lambda entry: entry[1]):
        total += size
        if total > REMEMBERED:
            break
        found.append(value)
    return found
