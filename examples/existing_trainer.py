"""Two lines in code that you have: monitors on an existing LightningModule and Trainer.

A small network learns two tasks with new random labels. Expect one record from each monitor at the start of each
task, and about 210 GGN eigenvalues above 0.01 in the fresh network (its logits are small), twice as many once it has
learnt something.
"""

import logging

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from lightning_plasticity.streams import RandomLabelDigits


class MyModule(L.LightningModule):
    """Your module, unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(max_epochs: int = 20) -> None:
    """Train and print what the monitors saw."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    stream, net = RandomLabelDigits(), MyModule()
    spectra, features = HessianSpectrumMonitor(when="start"), FeatureRankMonitor(when="start")
    for task in range(2):
        trainer = L.Trainer(
            max_epochs=max_epochs,
            callbacks=[spectra, features],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(TensorDataset(*stream.task_data(task)), batch_size=16, shuffle=True)
        trainer.fit(net, loader)
    for curvature, ranks in zip(spectra.records, features.records, strict=True):
        eps_rank = curvature.values["plasticity/ggn/eps_rank_0.01"].value
        rank = ranks.values["plasticity/features/effective_rank"].value
        print(f"task {curvature.task}: {eps_rank:.0f} GGN eigenvalues > 0.01, effective rank {rank:.1f}")


if __name__ == "__main__":
    main()
