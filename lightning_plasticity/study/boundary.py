"""Between two tasks: random states, and the checkpoint of one fit over all of them."""

from __future__ import annotations

import os
import random
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def random_states() -> dict[str, Any]:
    """Of torch (CPU and CUDA), NumPy and Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """What ``random_states`` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


class BoundaryCheckpoint(Callback):
    """Saves the Trainer between two epochs, when it asks for the next task's loader, and resumes exactly there.

    Lightning's checkpoints at an epoch's end come before that epoch is counted, and a run resumed from one starts the
    loader's iterator once less than a run that went on; hence this moment, and ``on_train_start``.
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.path = path
        self.epochs = epochs
        self._random: Any = None  # of the checkpoint, until the loader is asked for

    def watch(self, trainer: Trainer, stream: Any) -> None:
        """Save before the stream's training loader is made, at every boundary."""
        make = stream.train_dataloader

        @wraps(make)
        def train_dataloader() -> Any:
            if self._random is not None:
                set_random_states(self._random)
            elif trainer.current_epoch and trainer.current_epoch % self.epochs == 0:
                self._save(trainer)
            return make()

        stream.train_dataloader = train_dataloader

    def _save(self, trainer: Trainer) -> None:
        before = random_states()
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        trainer.save_checkpoint(beside)
        os.replace(beside, self.path)
        set_random_states(before)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run is between two epochs: from here on it is a run like any other."""
        if self._random is not None:
            self._random = None
            loop = trainer.fit_loop
            loop.restarting = False
            loop.epoch_loop.reset_restart_stage()
            loop.on_iteration_done()

    def state_dict(self) -> dict[str, Any]:
        """The random states."""
        return {"random": random_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To be set when the loader is asked for."""
        self._random = state_dict["random"]
