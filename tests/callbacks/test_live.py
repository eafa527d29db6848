"""What a step sets on its Trainer and the datamodule is put back after measuring."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from runs import Classifier, mlp, run_tasks
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor


class Levels(L.LightningDataModule):
    """A curriculum whose level every step raises."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.history, self.weights = 0, [[0]], torch.zeros(2)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(12, 16, generator=generator), torch.arange(12) % 3)
        return DataLoader(data, batch_size=4)


class Climbs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        data.level += 1
        data.history[0].append(data.level)
        data.weights += 1
        return super().training_step((batch[0] * (1 + 0.1 * data.level), batch[1]), batch_idx)


def test_the_datamodule_is_as_it_was() -> None:
    found = []
    for callbacks in ([], [HessianSpectrumMonitor(("ggn", "hessian")), FeatureRankMonitor()]):
        data = Levels()
        outcome, told = run_tasks(lambda: Climbs(mlp()), [data], callbacks)
        found.append((data.level, data.history, data.weights.tolist(), outcome, told))
    plain, watched = found
    assert plain[0] == 3
    assert plain[:3] == watched[:3]
    assert {key for key in plain[3] if plain[3][key] != watched[3][key]} == set()
    assert watched[4] == []
