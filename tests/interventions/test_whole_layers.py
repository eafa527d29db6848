"""Shrink and perturb, layer resets, layer norms and CReLU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.interventions import CReLU, insert_layer_norm, reset_layers, shrink_and_perturb, use_crelu
from lightning_plasticity.interventions.layer_reset import last_layers, named_resets, resettable
from lightning_plasticity.interventions.shrink_and_perturb import chosen_parameters
from lightning_plasticity.nn import find_wiring


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(),
        nn.Dropout(0.1), nn.Linear(6, 3),
    )  # fmt: skip


def images() -> Tensor:
    return torch.randn(5, 2, 6, 6)


# ---- shrink and perturb --------------------------------------------------------------------------------------------


def test_shrink_and_perturb_is_a_factor_and_noise() -> None:
    net = nn.Linear(300, 200)
    net.bias.requires_grad_(False)
    before = copy.deepcopy(net)
    state = torch.get_rng_state()
    shrink_and_perturb(net.parameters(), 0.6, 0.01, torch.Generator().manual_seed(3))
    noise = net.weight.detach() - 0.6 * before.weight.detach()
    assert float(noise.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(noise.mean())) < 2e-4
    assert torch.equal(net.bias, before.bias)
    assert torch.equal(torch.get_rng_state(), state)
    shrink_and_perturb(before.parameters(), 0.6, 0.01, torch.Generator().manual_seed(3))
    assert torch.equal(net.weight, before.weight)
    shrink_and_perturb(net.parameters(), 0.0, 0.0)
    assert net.weight.abs().max() == 0


def test_parameters_by_name() -> None:
    net = convnet()
    assert [id(p) for p in chosen_parameters(net, ["8.*", "0.weight"])] == [
        id(net[8].weight), id(net[8].bias), id(net[0].weight)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'9.weight' matches none of: 0\.weight"):
        chosen_parameters(net, ["9.weight"])


# ---- resets --------------------------------------------------------------------------------------------------------


def test_a_reset_layer_has_new_parameters_and_no_optimizer_state() -> None:
    net = convnet()
    optimizer = torch.optim.Adam(net.parameters())
    net(images()).sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    reset_layers(net, ["8", "1"], torch.Generator().manual_seed(0), [optimizer])
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {"8.weight", "8.bias", "1.running_mean", "1.running_var"} <= changed
    assert not any(name.startswith(("0.", "5.")) for name in changed)
    assert float(net[8].weight.detach().abs().max()) <= 1 / 6**0.5
    assert {id(p) for p in optimizer.state} == {id(p) for k in (0, 5) for p in net[k].parameters()}
    reset_layers(net, ["8"], torch.Generator(), init="zero")
    assert net[8].weight.abs().max() == net[8].bias.abs().max() == 0


def test_which_layers() -> None:
    net = convnet()
    wiring = find_wiring(net, lambda: net(images()))
    assert last_layers(wiring, "head") == ["8"]
    assert last_layers(wiring, 2) == ["5", "8"]
    with pytest.raises(ValueError, match="there are 3 Linear and convolution layers"):
        last_layers(wiring, 4)
    assert resettable(net) == ["0", "1", "5", "8"]
    assert named_resets(net, ["8", "[01]"]) == ["8", "0", "1"]
    with pytest.raises(ValueError, match=r"'2' matches no module with reset_parameters.*0, 1, 5, 8"):
        named_resets(net, ["2"])
    net.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="nothing says how to draw scale"):
        resettable(net)
    attention = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.LSTM(4, 4))
    names = resettable(attention)
    before = [p.clone() for p in attention.parameters()]
    reset_layers(attention, names, torch.Generator().manual_seed(1))
    owned = {id(p) for name in names for p in attention.get_submodule(name).parameters()}
    assert owned == {id(p) for p in attention.parameters()}
    weights = [(p, q) for p, q in zip(attention.parameters(), before, strict=True) if p.ndim > 1]
    assert not any(torch.equal(p, q) for p, q in weights)


# ---- layer norms ---------------------------------------------------------------------------------------------------


def test_layer_norms_sit_before_the_activations_and_keep_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 3))
    old, x = copy.deepcopy(net), images()
    assert insert_layer_norm(net) is net
    h = torch.relu(nn.functional.group_norm(old[0](x), 1))
    h = nn.functional.gelu(nn.functional.layer_norm(old[3](h.flatten(1)), (6,)))
    torch.testing.assert_close(net(x), old[5](h))
    wiring = find_wiring(net, lambda: net(x))
    assert {name: layer.norms[0].module for name, layer in wiring.layers.items()} == {"0.0": "0.1", "3.0": "3.1"}


class Functional(nn.Module):
    """Activations that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))))


def test_layer_norms_by_example_by_name_and_not_twice() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"found no hidden layer.*first, second, head.*pass example_input"):
        insert_layer_norm(Functional())
    net = insert_layer_norm(Functional(), example_input=x)
    assert [isinstance(layer, nn.Sequential) for layer in (net.first, net.second, net.head)] == [True, True, False]
    net = insert_layer_norm(Functional(), layers=["second"])
    assert isinstance(net.second[1], nn.LayerNorm)
    with pytest.raises(ValueError, match=r"\['second'\] are no Linear or convolution"):
        insert_layer_norm(net, layers=["second"])
    insert_layer_norm(net, example_input=x)
    assert [isinstance(layer, nn.Sequential) for layer in (net.first, net.second, net.head)] == [True, True, False]
    assert isinstance(net.second[0], nn.Linear)
    normed = insert_layer_norm(convnet())  # the convolution has its BatchNorm already
    assert isinstance(normed[0], nn.Conv2d)
    assert isinstance(normed[5], nn.Sequential)


# ---- CReLU ---------------------------------------------------------------------------------------------------------


def test_crelu_is_both_halves() -> None:
    x = torch.randn(3, 4, 5)
    assert torch.equal(CReLU()(x), torch.cat([x.clamp(min=0), (-x).clamp(min=0)], 1))
    assert torch.equal(CReLU(dim=-1)(x)[..., 5:], (-x).clamp(min=0))
    halves = CReLU()(x).split(4, 1)
    assert torch.equal(halves[0] - halves[1], x)


@pytest.mark.parametrize("keep", ["parameters", "units"])
def test_crelu_in_a_network(keep: str) -> None:
    plain = convnet()
    net = use_crelu(convnet(), keep=keep)  # type: ignore[arg-type]
    assert [type(child) for child in net] == [CReLU if type(c) is nn.ReLU else type(c) for c in plain]
    x = images()
    assert net(x).shape == plain(x).shape
    widths = (2, 2, 16, 3, 6) if keep == "parameters" else (4, 4, 32, 6, 12)
    sizes = (net[0].out_channels, net[1].num_features, net[5].in_features, net[5].out_features, net[8].in_features)
    assert sizes == widths
    net(x).sum().backward()
    wiring = find_wiring(net, lambda: net(x))
    assert {name: len(layer.readers[0].entries) // layer.num_units for name, layer in wiring.layers.items()} == {
        "0": 8, "5": 2
    }  # fmt: skip


def test_crelu_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(ValueError, match="odd widths"):
        use_crelu(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    with pytest.raises(ValueError, match="flat Sequential"):
        use_crelu(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    with pytest.raises(ValueError, match="keep='all'"):
        use_crelu(convnet(), keep="all")  # type: ignore[arg-type]
