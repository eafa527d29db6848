"""Networks and synthetic data that every library is run on; cross-entropy, mean over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A network and its data; made anew in every process, the same each time."""

    name: str
    model: nn.Module
    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N,)

    @property
    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_samples(self) -> int:
        return len(self.inputs)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two convolutions and two linear layers on 1 x 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 in eval mode, with running statistics of the kind that training leaves."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=10)
    model.avgpool = nn.AvgPool2d(1)  # the same here, where the last map is 1 x 1, and BackPACK knows it
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, 3, 32, 32))
    return model.eval()


class Transformer(nn.Module):
    """A small encoder on sequences of tokens, classified by the mean over positions."""

    def __init__(self, vocabulary: int = 32, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def _images(*shape: int) -> Callable[[int], Tensor]:
    return lambda num_samples: torch.randn(num_samples, *shape)


def _tokens(num_samples: int) -> Tensor:
    return torch.randint(32, (num_samples, 16))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: mlp(784, 1000, 1000, 1000, 10), _images(784)),
    "small": (lambda: mlp(784, 256, 256, 10), _images(784)),
    "tiny": (lambda: mlp(10, 12, 12, 4).double(), lambda n: torch.randn(n, 10, dtype=torch.float64)),
    "cnn": (cnn, _images(1, 28, 28)),
    "resnet18": (resnet18, _images(3, 32, 32)),
    "transformer": (Transformer, _tokens),
}
ABOUT = {
    "mlp": "MLP 784-1000-1000-1000-10, ReLU, 2.80 M parameters",
    "small": "MLP 784-256-256-10, ReLU, 0.27 M parameters",
    "tiny": "MLP 10-12-12-4, ReLU, 340 parameters, float64",
    "cnn": "CNN, 2 convolutions and 2 linear layers on 1x28x28, 1.20 M parameters",
    "resnet18": "ResNet-18 (torchvision) on 3x32x32, eval mode, 11.2 M parameters",
    "transformer": "transformer encoder, 2 layers of width 64, 16 tokens, 0.07 M parameters",
}


def make(name: str) -> Problem:
    """``"mlp-500"`` is the network ``mlp`` on 500 samples.

    Raises:
        ValueError: for a name that is not ``<network>-<samples>``.
    """
    network, _, num_samples = name.partition("-")
    if network not in NETWORKS or not num_samples.isdigit():
        raise ValueError(f"problem={name!r}, expected <network>-<samples> with one of {', '.join(NETWORKS)}.")
    build, draw = NETWORKS[network]
    torch.manual_seed(0)
    model = build()
    inputs = draw(int(num_samples))
    num_classes = 4 if network == "tiny" else 10
    return Problem(name, model, inputs, torch.randint(num_classes, (int(num_samples),)))
