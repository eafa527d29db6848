"""Runs scenarios in real processes and leaves each rank's results in a file: ``python worker.py DIRECTORY``.

One interpreter imports everything once and forks the ranks. A scenario that hangs ends its rank with a traceback.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Scenario = Callable[[int, Path], Any]
SECONDS = 60  # one scenario, on a busy machine


def run(scenarios: Mapping[str, Scenario], rank: int, directory: Path, log: Path) -> None:
    """One after the other, in this process; what one raises is its result, and the next goes on."""
    found: dict[str, Any] = {}
    with open(log.with_suffix(".txt"), "w") as file:
        for name, scenario in scenarios.items():
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=file)
            own = directory / name
            own.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found[name] = scenario(rank, own)
                except Exception:
                    found[name] = traceback.format_exc()
            told = [str(w.message) for w in caught]
            found[f"{name} warnings"] = [text for text in told if "onitor" in text or "Regularisation" in text]
            found[f"{name} seconds"] = time.perf_counter() - started
            torch.save(found, log)
        faulthandler.cancel_dump_traceback_later()


def fork(scenarios: Mapping[str, Scenario], world: int, directory: Path, kind: str) -> None:
    """The scenarios in ``world`` processes that know of one another as ``torchrun`` would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
                os.environ.update(address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"})
                run(scenarios, rank, directory / kind, directory / f"{kind}_{rank}.pt")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def main() -> None:
    import logging

    import scenarios

    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fork(scenarios.DDP, 2, directory, "ddp")
    fork(scenarios.SHARDED, 2, directory, "sharded")
    run(scenarios.ONE, 0, directory / "one", directory / "one_0.pt")


if __name__ == "__main__":
    main()
