"""The demo's network, as a user would write it, and the same with L2-ER."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_plasticity.callbacks import L2ERMixin


class Plain(LightningModule):
    """MLP 64-100-100-100-10 with Adam; ``online_accuracy`` has the mean accuracy before each update, task by task."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 100, 100, 100)
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))
        self.online_accuracy: list[float] = []
        self._correct: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; the logits come from the weights before the update."""
        inputs, labels = batch
        logits = self.net(inputs)
        self._correct.append((logits.detach().argmax(1) == labels).float().mean())
        return F.cross_entropy(logits, labels)

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        """Close the task's mean online accuracy."""
        self.online_accuracy.append(float(torch.stack(self._correct).mean()))
        self._correct.clear()
        for logger in trainer.loggers:
            logger.log_metrics({"online_accuracy": self.online_accuracy[-1]}, step=trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, its state kept over all tasks."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class L2ER(L2ERMixin, Plain):
    """The same network with L2-ER."""

    rank_strength = 0.1
    rank_every_n_steps = 8
    l2_strength = 1e-4


METHODS = {"plain": Plain, "l2er": L2ER}
