"""Networks of the paper on spectral collapse (arXiv 2509.22335), after its released code, in any width."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_plasticity.demo.network import Plain


class _Paper(Plain):
    """SGD on cross-entropy; the demo's training step and accuracy."""

    def __init__(self, net: nn.Module, lr: float, momentum: float) -> None:
        super().__init__()
        self.net = net
        self.lr, self.momentum = lr, momentum

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


class PermutedMNISTNet(_Paper):
    """MLP 784-width-width-width-10, He-uniform weights and zero biases."""

    def __init__(self, width: int = 1000, lr: float = 1e-2) -> None:
        sizes = (784, width, width, width)
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(nn.Sequential(*hidden, nn.Linear(width, 10)), lr, 0.0)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


class CIFARNet(_Paper):
    """ResNet-18 with a 3 x 3 stem, no first pooling, and two layers before the head; ``width`` channels at first."""

    def __init__(self, width: int = 64, lr: float = 1e-2, momentum: float = 0.9) -> None:
        net: Any = resnet18(num_classes=100)
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        size = 8 * width
        net.fc = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 100))
        if width != 64:
            _narrow(net, width)
        super().__init__(net, lr, momentum)


class ImageNetNet(_Paper):
    """Convolutions 5 x 5 x 32, 3 x 3 x 64, 3 x 3 x 128 with max-pooling, two layers of 128, and a head of two."""

    def __init__(self, lr: float = 1e-3, momentum: float = 0.9) -> None:
        channels, kernels = (3, 32, 64, 128), (5, 3, 3)
        blocks: list[nn.Module] = []
        for fan_in, fan_out, kernel in zip(channels[:-1], channels[1:], kernels, strict=True):
            blocks += [nn.Conv2d(fan_in, fan_out, kernel), nn.ReLU(), nn.MaxPool2d(2)]
        blocks += [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)]
        super().__init__(nn.Sequential(*blocks), lr, momentum)


def _narrow(net: nn.Module, width: int) -> None:
    """The same layers with ``width / 64`` of their channels."""

    def fewer(channels: int) -> int:
        return channels if channels == 3 else channels * width // 64

    for name, layer in list(net.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(layer, nn.Conv2d):
            sizes = fewer(layer.in_channels), fewer(layer.out_channels)
            new = nn.Conv2d(*sizes, layer.kernel_size, layer.stride, layer.padding, bias=False)
            setattr(net.get_submodule(parent), own, new)
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(net.get_submodule(parent), own, nn.BatchNorm2d(fewer(layer.num_features)))
