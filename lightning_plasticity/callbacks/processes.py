"""Measuring in several processes: all ranks measure the same samples, without collectives, and agree afterwards.

Every exchange is reached by every rank, also by one on which something failed before: nothing is left waiting.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.callbacks.probe_data import TRAINING_DATASET, Probe
from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.curvature.samples import first_samples, num_samples
from lightning_plasticity.nn.batches import map_tensors, tensors_of

# What code under measurement may not call: ranks may run it a different number of times.
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "_all_gather_base", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv", "isend", "irecv",
)  # fmt: skip
# Where all of those end, also under a name that the user has imported; not every torch has each.
GROUP_METHODS = (
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "all_gather_single",
    "all_gather_single_coalesced", "allreduce", "allreduce_coalesced", "all_to_all_single", "alltoall", "alltoall_base",
    "barrier", "broadcast", "gather", "gather_into_tensor", "gather_single", "monitored_barrier", "recv",
    "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "scatter", "send",
)  # fmt: skip
FUNCTIONAL = ("_resolve_group_name", "_resolve_group")  # what functional collectives ask for first


def several(trainer: Any) -> bool:
    """Whether this Trainer's run has other processes to agree with."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and int(getattr(trainer, "world_size", 1)) > 1


def describe(error: Exception) -> str:
    """Why something failed, for people: our own messages as they are, others with their type."""
    try:
        text = str(error)
    except Exception:  # a message that is made when it is asked for may fail too
        text = "its message cannot be read"
    if isinstance(error, MeasurementError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exchange(give: Callable[[], Any]) -> list[Any]:
    """What ``give`` returned on every rank, by rank; a collective that a rank reaches also when it has nothing to give.

    Raises:
        MeasurementError: on all ranks, when ``give`` raised on one or what it gave cannot be pickled.
    """
    try:
        sent: bytes | str = pickle.dumps(give())
    except Exception as error:
        sent = f"a value cannot be sent to the other processes ({describe(error)})"
    received: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(received, sent)
    refused = [item if isinstance(item, str) else None for item in received]
    if why := in_one_line(refused):
        raise MeasurementError(f"{why}.")
    return [pickle.loads(item) for item in received]


def in_one_line(texts: Sequence[str | None]) -> str:
    """What ranks have to say, once where all say the same."""
    if len(set(texts)) == 1:
        return texts[0] or ""
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def shared_probe(trainer: Any, pl_module: Any, fetch: Callable[[], Probe], limit: int) -> Probe:
    """The same probe data on all ranks.

    Ranks that read the same samples of one dataset keep theirs. Where they differ (streams, data sharded by hand) all
    get all ranks' samples once, rank after rank; of datasets each rank gives its share of ``limit`` samples.

    Raises:
        MeasurementError: on all ranks, when one could not fetch its own.
    """
    if not several(trainer):
        return fetch()
    probe, own, error = _attempt(fetch)
    found = exchange(lambda: (own, error))
    _raise_together([error for _, error in found])
    assert probe is not None
    prints = [own for own, _ in found]
    if len(set(prints)) == 1:
        return probe
    # Each in batches of the training loader's size: a step may want those, and one rank cannot try again alone.
    probe, _, error = _attempt(probe.smaller) if probe.smaller is not None else (probe, None, None)
    new = prints.index(own) == torch.distributed.get_rank()  # ranks of one tensor-parallel group have the same batches
    mine = [] if probe is None or not new else probe.batches
    parts = exchange(lambda: (on_cpu(mine), error))
    _raise_together([error for _, error in parts])
    assert probe is not None
    batches = [part for part, _ in parts if part]
    total = sum(num_samples(part) for part in batches)
    if probe.source.startswith(TRAINING_DATASET) and total > limit:
        batches = [first_samples(part, max(1, limit * num_samples(part) // total)) for part in batches]
    device = pl_module.device
    joined = [map_tensors(batch, lambda t: t.to(device)) for part in batches for batch in part]
    return Probe(joined, f"{probe.source}, of {len(parts)} processes")


def on_cpu(batches: Sequence[Any]) -> list[Any]:
    """Copies that can be sent."""
    return [map_tensors(batch, lambda t: t.detach().cpu()) for batch in batches]


def joined_batches(batches: Sequence[Any], device: torch.device) -> list[Any]:
    """All ranks' minibatches, rank after rank; a collective.

    Raises:
        MeasurementError: on all ranks, when those of one cannot be pickled.
    """
    parts = exchange(lambda: on_cpu(batches))
    return [map_tensors(batch, lambda t: t.to(device)) for part in parts for batch in part]


def merged_failures(failures: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What failed on any rank, by its name, and why."""
    parts = dict.fromkeys(part for failed in failures for part in failed)
    return {part: in_one_line([failed.get(part) for failed in failures]) for part in parts}


@contextmanager
def no_collectives(trainer: Any) -> Iterator[None]:
    """Inside, a module that calls ``torch.distributed`` fails instead of waiting for ranks that may not do the same."""
    if not several(trainer):
        yield
        return

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise MeasurementError(
                f"The measured step calls torch.distributed.{name}, which ranks may not do equally often while "
                "measuring; define curvature_loss(batch) without it on the module. SyncBatchNorm: use mode='frozen'."
            )

        return refused

    from torch.distributed import _functional_collectives  # not in a torch built without torch.distributed

    before: list[tuple[Any, str, Any, str]] = []  # owner, attribute, its value, its name in the message
    for owner, names, label in (
        (torch.distributed, COLLECTIVES, "{}"),
        (torch.distributed.ProcessGroup, GROUP_METHODS, "ProcessGroup.{}"),
        (_functional_collectives, FUNCTIONAL, "_functional_collectives"),
    ):
        found = vars(owner)
        before += [(owner, name, found[name], label.format(name)) for name in names if name in found]
    try:
        for owner, name, _, called in before:
            setattr(owner, name, refuse(called))
        yield
    finally:
        for owner, name, function, _ in before:
            setattr(owner, name, function)


def _attempt(fetch: Callable[[], Probe]) -> tuple[Probe | None, bytes | None, str | None]:
    """Probe data with its fingerprint, or why there is none."""
    try:
        probe = fetch()
        return probe, _fingerprint(probe.batches), None
    except Exception as error:
        return None, None, describe(error)


def _raise_together(errors: Sequence[str | None]) -> None:
    if why := in_one_line(errors):
        raise MeasurementError(why)


def _fingerprint(batches: Sequence[Any]) -> bytes:
    """Equal for equal tensors; where there are none, for equal pickles."""
    digest = hashlib.sha256()
    tensors: list[Tensor] = tensors_of(list(batches))
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    if not tensors:
        digest.update(pickle.dumps(batches))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu()
    if plain.layout != torch.strided or plain.is_quantized:
        return pickle.dumps(plain.coalesce() if plain.is_sparse else plain)
    return plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
