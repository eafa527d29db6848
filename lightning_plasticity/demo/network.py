"""The demo's network, as a user would write it, and the same with L2-ER."""

from __future__ import annotations

from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.callbacks import L2ERMixin


class Plain(LightningModule):
    """MLP 64-100-100-100-10 with ReLU, cross-entropy and Adam."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 100, 100, 100)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Loss and accuracy, both of the weights before the update."""
        inputs, labels = batch
        logits = self.net(inputs)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; in the demo its state is kept over all tasks."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class L2ER(L2ERMixin, Plain):
    """The same network with L2-ER."""

    rank_strength = 0.1
    rank_every_n_steps = 8
    l2_strength = 1e-4


METHODS = {"plain": Plain, "l2er": L2ER}
