"""How much memory there is, and how much a graph keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be taken on a device: of a GPU, or of this machine (and its container)."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine(), _container())


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    pages = next((os.sysconf(name) for name in names if name in os.sysconf_names), None)
    return 2**32 if pages is None else pages * os.sysconf("SC_PAGE_SIZE")


def _container() -> int:
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return 2**62  # no control group of version 2
    return 2**62 if limit == "max" else max(0, int(limit) - int(used))


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
        return tensor

    def __enter__(self) -> GraphMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
