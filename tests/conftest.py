"""What every test shares: one thread, a scratch directory, a quiet Lightning, the reference vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

VECTORS = Path(__file__).parent / "vectors"

# One thread: sums come out in the same order on every machine, and two workers do not fight over two cores.
torch.set_num_threads(1)

# No deadline: the first call of a torch operator may take a second.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def scratch_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory, so that a Trainer's default log directory does not end up in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's device and tip lines out of the output; its warnings are not affected."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def vectors() -> Callable[[str], dict[str, np.ndarray]]:
    """`vectors("features")`: the arrays of `tests/vectors/features.npz` by name; the README there describes them."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = VECTORS / f"{name}.npz"
        if not path.exists():
            raise ValueError(
                f"no reference vectors named {name!r}; there are {sorted(p.stem for p in VECTORS.glob('*.npz'))}"
            )
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load
