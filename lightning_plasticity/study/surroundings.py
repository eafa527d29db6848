"""The surroundings of a unit: threads, warnings that go to its file, Lightning's advice left out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Lightning's and torch's advice on devices, workers and intervals, which says nothing about a study.
HINTS = (
    "does not have many workers",
    "The number of training batches",
    "LeafSpec",
    "GPU available but not used",
    "dataloader is not resumable",
    "Full backward hook is firing",
)

# Where both packages are installed and imported, they share what writes, and it has the name of the last one.
LOGGERS = ("lightning.pytorch", "pytorch_lightning")


@contextmanager
def one_unit(threads: int, log: Path) -> Iterator[None]:
    """Run with so many threads; warnings are written to a file, each once; all is put back afterwards."""
    before = torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *args: object, **kwargs: object) -> None:
        text = f"{category.__name__}: {message}\n"
        if text not in told:
            told.add(text)
            with open(log, "a", encoding="utf-8") as file:
                file.write(text)

    torch.set_num_threads(threads)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for hint in HINTS:
                warnings.filterwarnings("ignore", f".*{hint}.*")
            warnings.showwarning = show
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        torch.set_num_threads(before)
