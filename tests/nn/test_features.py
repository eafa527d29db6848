"""Hidden layers are found, named and tapped in networks of every common shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.nn import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers, undisturbed


def found(module: nn.Module, *inputs: Tensor) -> list[HiddenLayer]:
    with undisturbed(module):
        return find_hidden_layers(module, lambda: module(*inputs))


def names(module: nn.Module, *inputs: Tensor) -> list[str]:
    return [layer.name for layer in found(module, *inputs)]


def tapped(module: nn.Module, layers: list[HiddenLayer], *inputs: Tensor) -> dict[str, Tensor]:
    with FeatureTaps(module, layers) as taps:
        module(*inputs)
    return taps.features


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    act = nn.ReLU() if act is None else act
    return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 6), type(act)(), nn.Linear(6, 2))


class Functional(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x), inplace=self.inplace))


class SharedActivation(nn.Module):
    """One activation module in two places of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.act(self.one(x))))


class Frozen(nn.Module):
    """A backbone under no_grad, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU()).requires_grad_(False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(7, 3), nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(tokens))
        return self.head(out[:, -1])


def transformer(num_layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, num_layers), nn.Linear(8, 2))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (mlp(), X, ["1", "3"]),
        (mlp(nn.ReLU(inplace=True)), X, ["1", "3"]),
        (nn.Sequential(nn.Flatten(), mlp()), X, ["1.1", "1.3"]),
        (Functional(), X, ["fc2.input"]),
        (Functional(inplace=True), X, ["fc2.input"]),
        (SharedActivation(), X, ["b.input", "c.input"]),
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2)), X, ["2"]),
        (conv_net(), IMAGES, ["3", "6"]),
        (nn.Sequential(nn.Linear(4, 5), Block(5), Block(5), nn.Linear(5, 2)), X, ["1", "2"]),
        (nn.Sequential(nn.Linear(4, 5), nn.Sequential(Block(5), Block(5))), X, ["1.0"]),
        (transformer(), X.reshape(2, 3, 4), ["1.layers.0", "1.layers.1"]),
        (transformer(1), X.reshape(2, 3, 4), ["1.layers.0"]),
        (Recurrent(), torch.tensor([[1, 2, 3]]), ["embed", "head.input"]),
        (mlp().requires_grad_(False), X, ["1", "3"]),
        (Frozen(), X, ["backbone.1", "backbone.3"]),
        (nn.Linear(4, 2), X, []),
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)), X, []),
        (nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), X, []),
    ],
    ids=[
        "mlp", "in-place", "wrapped", "functional", "functional in-place", "shared activation", "dropout", "conv",
        "residual", "last block is the output", "transformer", "one transformer layer", "lstm", "all frozen",
        "frozen backbone", "linear", "nothing hidden", "softmax at the end",
    ],
)  # fmt: skip
def test_layers_found(module: nn.Module, inputs: Tensor, expected: list[str]) -> None:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    assert names(module, inputs) == expected
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_network_that_runs_twice_keeps_its_names() -> None:
    module = mlp()
    with undisturbed(module):
        layers = find_hidden_layers(module, lambda: module(X) + module(2 * X))
    assert [layer.name for layer in layers] == ["1", "3"]


def test_a_found_layer_holds_what_the_next_weight_reads() -> None:
    for module in (mlp(nn.ReLU(inplace=True)), Functional(), Functional(inplace=True), SharedActivation(), Frozen()):
        layers = found(module, X)
        features = tapped(module, layers, X)
        assert list(features) == [layer.name for layer in layers]
        for tensor in features.values():
            assert (tensor >= 0).all(), type(module)
            assert (tensor == 0).any()


def test_channel_dims() -> None:
    assert [layer.channel_dim for layer in found(conv_net(), IMAGES)] == [1, -1]
    layers = named_layers(conv_net(), ["0", "2", "3", "7", "4.input", "7.input"])
    assert [layer.channel_dim for layer in layers] == [1, None, 1, -1, 1, -1]


def test_no_hooks_and_flags_left_when_the_run_fails() -> None:
    module = mlp().requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_hidden_layers(module, lambda: module(torch.ones(2, 3)))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


# ---- by name -------------------------------------------------------------------------------------------------------


def test_named_layers() -> None:
    module = nn.ModuleDict({"enc": nn.ModuleList([Block(2), Block(2)]), "head": nn.Linear(2, 1)})

    def chosen(*patterns: str) -> list[str]:
        return [layer.name for layer in named_layers(module, list(patterns))]

    assert chosen("head", "enc.0.one") == ["head", "enc.0.one"]
    assert chosen("enc.?") == ["enc.0", "enc.1"]
    assert chosen("*.one", "enc.0.one") == ["enc.0.one", "enc.1.one"]
    assert chosen("head.input", "*.two.input") == ["head.input", "enc.0.two.input", "enc.1.two.input"]
    assert "enc" not in chosen("*")  # a ModuleList is never called


def test_a_module_that_is_called_input() -> None:
    module = nn.ModuleDict({"input": nn.Linear(2, 2), "net": nn.Sequential()})
    module["net"].add_module("input", nn.Linear(2, 2))
    assert [(layer.module, layer.at_input) for layer in named_layers(module, ["net.input", "net.input.input"])] == [
        ("net.input", False), ("net.input", True),
    ]  # fmt: skip


def test_a_module_under_two_names_answers_to_both() -> None:
    shared = nn.Linear(3, 3)
    module = nn.ModuleDict({"a": shared, "b": shared})
    assert [layer.name for layer in named_layers(module, ["b"])] == ["b"]
    assert [layer.name for layer in named_layers(module, ["*"])] == ["a"]
    assert names(nn.Sequential(shared, shared, nn.Linear(3, 1)), torch.ones(2, 3)) == ["0"]


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"layers: 'net.9' matches no layer of Sequential.*exist: 0, 1, 2, 3, 4. Use"):
        named_layers(mlp(), ["0", "net.9"])
    with pytest.raises(ValueError, match="exist: none"):
        named_layers(nn.ReLU(), ["x"])


def test_one_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layers='net.1' is one string.*write layers=\['net.1'\]"):
        named_layers(mlp(), "net.1")


# ---- taps ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)  # without a __dict__, as chemprop's graphs
class Output:
    index: int
    hidden: Tensor


class Shaped(nn.Module):
    """Returns its input in the wrapping that it is told, and keeps the tensor in reach."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        self.out = x * 1
        return self.wrap(self.out)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (torch.tensor([1]), x),
        lambda x: {"mask": x > 0, "x": [x]},
        lambda x: Output(3, x),
        lambda x: [None, "text", (x,)],
        lambda x: nn.utils.rnn.pack_sequence([x]),
    ],
    ids=["tensor", "tuple", "dict", "dataclass", "list", "packed"],
)
def test_taps_keep_the_value_before_an_in_place_change(wrap: Any) -> None:
    module = nn.Sequential(Shaped(wrap))
    with FeatureTaps(module, named_layers(module, ["0"])) as taps:
        out = module(X)
        module[0].out.zero_()
        if isinstance(out, Tensor):
            out.zero_()
    assert torch.equal(taps.features["0"], X)


def test_taps_at_the_input_positional_or_by_keyword() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(4, 2)})
    layers = named_layers(module, ["fc.input"])
    with FeatureTaps(module, layers) as taps:
        x = X.clone()
        module["fc"](x)
        x.zero_()
        module["fc"](input=2 * X)
    assert torch.equal(taps.features["fc.input"], torch.cat([X, 2 * X]))
    assert [len(call) for call in taps.calls("fc.input")] == [6, 6]


def test_taps_do_not_touch_the_forward_pass_and_keep_the_graph() -> None:
    module = mlp(nn.ReLU(inplace=True))
    plain = module(X)
    with FeatureTaps(module, named_layers(module, ["*"])) as taps:
        assert torch.equal(module(X), plain)
    (gradient,) = torch.autograd.grad(taps.features["1"].sum(), [module[0].weight])
    assert torch.equal(gradient, (plain.new_ones(6, 5) * (taps.features["0"] > 0)).T @ X)
    assert (taps.features["0"] < 0).any()  # before the in-place ReLU


def test_clear_and_layers_that_are_never_reached() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    with FeatureTaps(module, named_layers(module, ["b", "a"])) as taps:
        module["a"](X)
        assert list(taps.features) == ["a"]
        taps.clear()
        assert taps.features == {}
        module["a"](X), module["b"](X)
    module["a"](X)  # no longer watched
    assert list(taps.features) == ["b", "a"]
    assert len(taps.features["a"]) == 6


def test_hooks_are_removed_after_an_exception() -> None:
    module = mlp()
    with pytest.raises(RuntimeError), FeatureTaps(module, named_layers(module, ["0", "2.input"])):
        module(torch.ones(1, 9))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
