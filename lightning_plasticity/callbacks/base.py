"""What all our callbacks derive from: Lightning's ``Callback``, of both packages that Lightning is published as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_plasticity._optional import if_installed

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # ``lightning.pytorch`` and ``pytorch_lightning`` are two copies with classes of their own. Each Trainer is content
    # with a callback of the other, but LightningCLI and some checks ask for their own class.
    _other = if_installed("pytorch_lightning")

    class Callback(*[package.Callback for package in (pl, _other) if package is not None]):
        """Callback for the Trainer of either package."""


__all__ = ["Callback"]
