"""How much memory there is, and how much a graph keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

CGROUP, OWN_GROUP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")
UNKNOWN = 2**32  # bytes, of a machine that does not say
UNBOUNDED = 2**62


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be taken on a device: of a GPU, or of this machine (and its container)."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine(), _container())


def _machine() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    known: Any = getattr(os, "sysconf_names", {})  # nothing on Windows
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in known and (pages := os.sysconf(name)) > 0:
            return pages * os.sysconf("SC_PAGE_SIZE")
    return UNKNOWN


def _container() -> int:
    """The least that is left in this process's control group (version 2) and in those around it."""
    try:
        (inner,) = (line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        inner = "/"
    group = CGROUP / inner.strip().lstrip("/")
    return min((_left(path) for path in (group, *group.parents) if path.is_relative_to(CGROUP)), default=UNBOUNDED)


def _left(group: Path) -> int:
    """What a control group leaves; pages of files that the kernel can drop are not in use."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return UNBOUNDED
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return UNBOUNDED


class GraphMeter:
    """Context that adds up the bytes that operations keep for their backward pass; storages count once.

    Attributes:
        num_bytes: what has been kept since the context was entered, ``ignored`` tensors apart.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.num_bytes = 0
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor.detach()  # an operation that kept its own output with its history would never be freed

    def __enter__(self) -> GraphMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)


@contextmanager
def forward_only() -> Iterator[None]:
    """Context in which operations keep nothing for a backward pass, yet results say that they require gradients."""

    def refuse(_: None) -> Tensor:
        raise RuntimeError("Nothing was kept for a backward pass.")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse):
        yield
