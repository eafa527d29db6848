"""A module's own code without a Trainer: what one would do to a batch, and what to say when one is missed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_plasticity.cli.common import UsageError
from lightning_plasticity.curvature import MeasurementError

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
STEP = "training_step"
MISSING = "not attached to a `Trainer`"  # Lightning's words


def transferred(batch: Any, datamodule: LightningDataModule | None, module: nn.Module) -> Any:
    """The batch as ``training_step`` gets it: each hook is the datamodule's if it has its own, else the module's."""
    with without_a_trainer():
        for name in HOOKS:
            owner = datamodule if datamodule is not None and is_overridden(name, datamodule) else module
            if isinstance(owner, LightningDataModule | LightningModule):
                device = (torch.device("cpu"),) if name == "transfer_batch_to_device" else ()
                batch = getattr(owner, name)(batch, *device, 0)
    return batch


@contextmanager
def without_a_trainer() -> Iterator[None]:
    """Make of an error in a step or hook one that says that there is no Trainer, and what to do.

    Raises:
        UsageError: where a Trainer was asked for.
        RuntimeError: for any other error of a step or hook; it may come from the lack of one.
    """
    try:
        yield
    except (MeasurementError, UsageError):
        raise
    except Exception as error:
        ran = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.name in (STEP, *HOOKS)]
        if not ran:
            raise
        instead = "give --loss FUNCTION, or " if ran[-1] == STEP else ""
        instead += "measure during training, with HessianSpectrumMonitor in the Trainer's callbacks"
        if MISSING in str(error):
            raise UsageError(f"{ran[-1]} asks for the Trainer, and measure has none; {instead}.") from error
        raise RuntimeError(
            f"{ran[-1]} failed: {type(error).__name__}: {error}. It was run without a Trainer, logger and optimizers; "
            f"where it needs one, {instead}."
        ) from error
