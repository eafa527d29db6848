"""Fresh initialisations in place: the distribution of the constructors, and refusals that name parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.trainability import reinitialize, trainability

DATA = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
LAYERS = [
    lambda: nn.Linear(4, 3),
    lambda: nn.Conv2d(2, 3, 2),
    lambda: nn.Embedding(5, 3),
    lambda: nn.LSTM(3, 4, 2),
    lambda: nn.BatchNorm1d(4),
    lambda: nn.LayerNorm(4),
    lambda: nn.PReLU(),
    lambda: nn.Bilinear(2, 3, 4),
]


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
def test_a_single_layer_is_as_its_constructor_makes_it(make: object) -> None:
    assert callable(make)
    torch.manual_seed(3)
    expected = make()
    torch.manual_seed(4)
    layer = make()
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(7)
    torch.manual_seed(3)
    reinitialize(layer)
    for (name, value), then in zip(layer.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, then), name


def test_attention_and_transformers_are_covered() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    reinitialize(layer)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())
    assert torch.equal(layer.self_attn.out_proj.bias, torch.zeros(8))  # set by the outer module, after the inner one


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain, self.shift = nn.Linear(4, 2), nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.body(x) + self.shift


def test_parameters_without_a_reset_are_named() -> None:
    net = nn.Sequential(Scaled())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(MeasurementError, match=r"sets 0\.gain, 0\.shift; give their module a reset_parameters.*fresh="):
        trainability(net, F.cross_entropy, DATA, num_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    found = trainability(net, F.cross_entropy, DATA, num_steps=2, target="relative")
    assert found.fresh_curves == ()
    assert found.fresh_failure is not None


def test_weight_normalised_layers_are_named_too() -> None:
    """The reset of such a layer writes to a computed tensor, and so to nothing."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    with pytest.raises(MeasurementError, match=r"parametrizations\.weight\.original0"):
        reinitialize(layer)


def test_a_function_of_the_users_initialises_in_place_or_builds() -> None:
    def in_place(net: Scaled) -> None:
        net.gain.data.fill_(3.0)

    built = Scaled()
    built.gain.data.fill_(5.0)
    net = Scaled()
    reinitialize(net, in_place)
    assert net.gain.tolist() == [3.0, 3.0]
    gain = net.gain
    reinitialize(net, lambda _: built)
    assert net.gain is gain
    assert net.gain.tolist() == [5.0, 5.0]
    assert torch.equal(net.body.weight, built.body.weight)
    with pytest.raises(MeasurementError, match="another architecture"):
        reinitialize(net, lambda _: nn.Linear(4, 2))


def test_frozen_parameters_and_a_reset_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.constant_(self.head.weight, 0.5)

    net = Own()
    net.body.requires_grad_(False)
    before = net.body.weight.clone()
    net.head.weight.data.zero_()
    reinitialize(net)
    assert torch.equal(net.body.weight, before)
    assert set(net.head.weight.flatten().tolist()) == {0.5}
