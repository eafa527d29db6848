"""Networks of the studies beside the demo's: one for permuted MNIST, one of convolutions for the digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_plasticity.demo.network import Plain


class MNISTNet(Plain):
    """MLP 784-width-width-width-10, ReLU, Adam; at this step size it declines within thirty tasks."""

    def __init__(self, lr: float = 1e-2, width: int = 100) -> None:
        super().__init__()
        self.lr = lr
        hidden = [module for _ in range(2) for module in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class DigitsNet(Plain):
    """The demo's network in any width: 64-width-width-width-10."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        hidden = [module for _ in range(2) for module in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


class ConvNet(Plain):
    """Two convolutions and a hidden layer on 8 x 8 images that come as rows of 64."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)
