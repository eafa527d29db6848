"""The wiring that tracing finds, against brute force: change a unit's weights and look what changes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import changed, state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.nn import HiddenUnits, Wiring, find_wiring, told_wiring, undisturbed
from lightning_plasticity.nn.wiring import CONVOLUTIONS, NORMS, row_dim

WEIGHTS = (nn.Linear, *CONVOLUTIONS)


class Forward(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = function

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.stem(x))
    h = torch.tanh(h + m.second(torch.tanh(m.norm(m.first(h)))))
    return m.head(torch.tanh(m.fc(h.mean((2, 3)))))


def branching(m: Any, x: Tensor) -> Tensor:
    a, b = torch.sigmoid(m.a(x)), F.softplus(m.b(x))
    c = m.c(torch.cat([a, x, b], dim=-1))
    c = torch.cat([torch.tanh(c), torch.sigmoid(-c)], -1)  # a unit owns two columns
    return m.head(c).sum(1) + m.second(a)[:, 0] * 0.5 + m.third(b[:, 2:].flip(1)).sum(1)


def pooled(m: Any, x: Tensor) -> Tensor:
    h = F.max_pool2d(torch.tanh(m.first(x)), 2)
    h = torch.tanh(m.second(F.pad(h, (1, 1, 1, 1))))
    h = h.permute(0, 2, 3, 1).reshape(len(x), -1)  # channels last: a unit owns columns that are not neighbours
    return m.head(F.dropout(torch.tanh(m.fc(h)), 0.0))


def positions(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.first(x.reshape(len(x), -1, 4)))
    return m.head(torch.tanh(m.second(h)).mean(dim=1) * 2.0)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h.tanh_()
    h *= (h > 0) * 1.0 + 0.5
    return m.head(h.view(len(x), 2, -1).transpose(1, 2).flatten(1))


def images(batch: int = 5) -> Tensor:
    return torch.randn(batch, 2, 6, 6)


def vectors() -> Tensor:
    return torch.randn(7, 8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)
        ),
        vectors,
        {"0", "4"},
    ),
    "conv, flatten, linear": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4),
            nn.Tanh(), nn.Linear(4, 2),
        ),
        images,
        {"0", "5"},
    ),
    "transposed convolutions": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 4, 2, stride=2), nn.SiLU(), nn.Conv2d(4, 2, 1)
        ),
        images,
        {"0", "2"},
    ),
    "residual": (
        lambda: Forward(
            residual, stem=nn.Conv2d(2, 3, 3, padding=1), first=nn.Conv2d(3, 4, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(4), second=nn.Conv2d(4, 3, 3, padding=1), fc=nn.Linear(3, 5), head=nn.Linear(5, 2),
        ),
        images,
        {"first", "fc"},
    ),
    "branching": (
        lambda: Forward(
            branching, a=nn.Linear(8, 3), b=nn.Linear(8, 5), c=nn.Linear(16, 4), head=nn.Linear(8, 2),
            second=nn.Linear(3, 2), third=nn.Linear(3, 2),
        ),
        vectors,
        {"a", "b", "c"},
    ),
    "pooled": (
        lambda: Forward(
            pooled, first=nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), second=nn.Conv2d(3, 4, 3),
            fc=nn.Linear(36, 5), head=nn.Linear(5, 2),
        ),
        images,
        {"first", "second", "fc"},
    ),
    "positions": (
        lambda: Forward(positions, first=nn.Linear(4, 5), second=nn.Linear(5, 6), head=nn.Linear(6, 2)),
        vectors,
        {"first", "second"},
    ),
    "in place": (lambda: Forward(in_place, first=nn.Linear(8, 6), head=nn.Linear(6, 2)), vectors, {"first"}),
}  # fmt: skip


def traced(net: nn.Module, x: Tensor) -> Wiring:
    with undisturbed(net):
        return find_wiring(net, lambda: net(x))


def made(name: str) -> tuple[nn.Module, Tensor, Wiring, set[str]]:
    make, inputs, expected = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make().double().eval(), inputs().double()
    return net, x, traced(net, x), expected


def run(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and what each weight reads, channels last: (values, columns)."""
    reads: dict[str, Tensor] = {}
    handles = []
    for name, child in net.named_modules():
        if isinstance(child, WEIGHTS):
            dim = -1 if isinstance(child, nn.Linear) else 1

            def hook(module: nn.Module, args: Any, name: str = name, dim: int = dim) -> None:
                reads[name] = args[0].detach().clone().movedim(dim, -1).reshape(-1, args[0].shape[dim])

            handles.append(child.register_forward_pre_hook(hook))
    out = net(x).detach()
    for handle in handles:
        handle.remove()
    return out, reads


@torch.no_grad()
def disturb(net: nn.Module, layer: HiddenUnits, unit: int) -> None:
    """Other incoming weights, bias and norm entries for one unit."""
    target = net.get_submodule(layer.layer)
    target.weight.select(row_dim(target), unit).add_(0.7)
    if target.bias is not None:
        target.bias[unit] += 0.3
    for link in layer.norms:
        entries = link.entries[link.units == unit]
        net.get_submodule(link.module).weight.view(-1)[entries] += 0.4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_are_found(name: str) -> None:
    net, _, wiring, expected = made(name)
    assert set(wiring.layers) == expected
    weights = {name for name, child in net.named_modules() if isinstance(child, WEIGHTS)}
    assert {*wiring.layers, *wiring.unsupported, *wiring.outputs} == weights == set(wiring.order)
    norms = {name for name, child in net.named_modules() if isinstance(child, NORMS)}
    assert {link.module for layer in wiring.layers.values() for link in layer.norms} == norms


@pytest.mark.parametrize("name", NETWORKS)
def test_a_unit_owns_exactly_the_columns_that_change_with_it(name: str) -> None:
    net, x, wiring, _ = made(name)
    _, before = run(net, x)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    for layer in wiring.layers.values():
        for unit in range(layer.num_units):
            disturb(net, layer, unit)
            _, after = run(net, x)
            for link in layer.readers:
                moved = (after[link.module] != before[link.module]).any(0).nonzero().reshape(-1)
                assert torch.equal(moved, link.entries[link.units == unit]), (layer.layer, unit, link.module)
            net.load_state_dict(start)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_unit_without_outgoing_weights_has_no_say(name: str) -> None:
    net, x, wiring, _ = made(name)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    for layer in wiring.layers.values():
        for unit in range(layer.num_units):
            for link in layer.readers:
                reader = net.get_submodule(link.module)
                with torch.no_grad():
                    reader.weight.index_fill_(1 - row_dim(reader), link.entries[link.units == unit], 0.0)
            silent, _ = run(net, x)
            disturb(net, layer, unit)
            assert torch.equal(run(net, x)[0], silent), (layer.layer, unit)
            net.load_state_dict(start)
            disturb(net, layer, unit)
            assert not torch.equal(run(net, x)[0], silent)
            net.load_state_dict(start)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)])
def test_entries_of_a_norm_that_couples_units(norm: nn.Module) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6), norm, nn.Tanh(), nn.Linear(6, 2)), torch.randn(7, 8)
    (link,) = traced(net, x).layers["0"].norms
    assert link.module == "1"
    assert link.entries.tolist() == link.units.tolist() == list(range(6))


def test_a_layer_norm_over_a_whole_map_gives_a_channel_many_entries() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 4, 4)), nn.ReLU(), nn.Conv2d(3, 1, 1))
    (link,) = traced(net, images()).layers["0"].norms
    assert link.units.tolist() == [c for c in range(3) for _ in range(16)]


# ---- what cannot be followed is named ------------------------------------------------------------------------------


class ThroughNumpy(torch.autograd.Function):
    """An activation that torch's functions do not show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def shared(m: Any, x: Tensor) -> Tensor:
    return m.head(m.third(torch.relu(m.first(x))) + m.third(torch.relu(m.second(x))))


def gated(m: Any, x: Tensor) -> Tensor:
    return m.head(m.first(x) * torch.sigmoid(m.second(x)))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.head(m.rnn(torch.relu(m.first(x))[None])[0])


def attending(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.first(x))[None]
    return m.head(m.attention(h, h, h)[0])


def unseen(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.head(ThroughNumpy.apply(h)) + m.second(torch.relu(h))


def by_hand(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.first(x)) @ m.head.weight.T


def rolled(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.first(x))
    return m.head(torch.stack([h, h.roll(1, 1)], 1)).sum(1)


def own(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.relu(m.first(torch.relu(m.first(x)))))


def softmaxed(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.softmax(m.first(x), 1))


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], dict[str, str]]] = {
    "shared reader": (
        shared, {"third": nn.Linear(8, 8)}, {"first": "several activations", "second": "several activations"},
    ),
    "gate": (gated, {}, {"first": "multiplied with those of second", "second": "multiplied with those of first"}),
    "recurrent": (recurrent, {"rnn": nn.LSTM(8, 8)}, {"first": "lstm", "rnn": "LSTM is no Linear"}),
    "attention": (
        attending, {"attention": nn.MultiheadAttention(8, 2)},
        {"first": "multi_head_attention_forward", "attention": "MultiheadAttention is no"},
    ),
    "unseen function": (unseen, {}, {"first": "the way from it to head cannot be followed"}),
    "weight by hand": (by_hand, {}, {"head": "not called as a layer"}),
    "other columns elsewhere": (rolled, {}, {"first": "other columns"}),
    "itself": (own, {}, {"first": "several activations|its own"}),
    "softmax": (softmaxed, {}, {"first": "softmax"}),
    "input residual": (lambda m, x: m.head(torch.relu(x + m.first(x))), {}, {"first": "not a hidden unit's"}),
    "learned offset": (
        lambda m, x: m.head(torch.relu(m.first(x) + m.second.bias)), {}, {"first": "added to a learned tensor"},
    ),
    "grouped": (
        lambda m, x: m.head(m.third(m.conv(x[:, None])).flatten(1)),
        {"conv": nn.Conv1d(1, 4, 1), "third": nn.Conv1d(4, 4, 1, groups=2), "head": nn.Linear(32, 2)},
        {"conv": "grouped convolution"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_left_alone_and_named(case: str) -> None:
    function, layers, reasons = REFUSED[case]
    net = Forward(
        function, **{"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "head": nn.Linear(8, 8)} | dict(layers)
    )
    wiring = traced(net, vectors())
    for name, reason in reasons.items():
        assert name not in wiring.layers
        assert any(part in wiring.unsupported[name] for part in reason.split("|")), wiring.describe()
        assert f"{name}: left alone, " in wiring.describe()


def test_tied_frozen_and_parametrised_weights_are_left_alone() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    net[1].weight = net[0].weight
    assert "shares its parameters" in traced(net, vectors()).unsupported["0"]
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    net[2].requires_grad_(False)
    wiring = traced(net, vectors())
    assert set(wiring.layers) == {"0"}
    assert wiring.unsupported == {"1": "the weight of 2 is frozen", "2": "the weight of 2 is frozen"}
    assert not net[2].weight.requires_grad
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    nn.utils.parametrizations.weight_norm(net[1])
    wiring = traced(net, vectors())
    assert set(wiring.layers) == {"2"}
    assert "not called as a layer with its own weight" in wiring.unsupported["1"]


def test_tracing_changes_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 3))
    x = vectors()
    before = state(net)
    traced(net, x)
    assert changed(before, state(net)) == []


# ---- told by the user ----------------------------------------------------------------------------------------------


def test_told_wiring_is_the_traced_one() -> None:
    net, _, wiring, _ = made("conv, flatten, linear")
    told = told_wiring(net, {"0": ["1", "5"], "5": ["7"]})
    assert told.describe() == wiring.describe()
    for name, layer in told.layers.items():
        for mine, theirs in zip(layer.readers, wiring.layers[name].readers, strict=True):
            assert torch.equal(mine.entries, theirs.entries)
            assert torch.equal(mine.units, theirs.units)
    assert told.outputs == wiring.outputs == ("7",)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"9": ["5"]}, "'9' is no module. Layers and norms that exist: 0, 1, 5, 7"),
        ({"0": ["2"]}, "'2' is a Softplus, expected one of"),
        ({"0": ["7"]}, "'7' takes 4 inputs .* a multiple of the 3 units"),
        ({"0": ["1"]}, "no Linear or convolution that reads it"),
        ({"0": "5"}, "is one string"),
    ],
)
def test_a_wrong_wiring_is_refused(told: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        told_wiring(made("conv, flatten, linear")[0], told)


def test_only_some_layers() -> None:
    _, _, wiring, _ = made("branching")
    assert list(wiring.only(["b", "a"]).layers) == ["a", "b"]
    assert list(wiring.only(["*"]).layers) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'head' is no layer whose units can be reset"):
        wiring.only(["head"])


# A loss that looks at hidden units itself

LOSSES = {
    "the head": (lambda h, out: out.square().mean(), {"0", "2"}),
    "a layer too": (lambda h, out: out.square().mean() + 0.1 * torch.relu(h).mean(), {"0"}),
    "a dict": (lambda h, out: {"loss": out.square().mean(), "size": h.square().mean()}, {"0", "2"}),
    "a dict, a layer too": (lambda h, out: {"loss": out.square().mean() + h.var(), "out": out}, {"0"}),
    "detached": (lambda h, out: out.square().mean() + h.detach().mean(), {"0", "2"}),
    "no loss": (lambda h, out: (h, out), {"0", "2"}),
}


@pytest.mark.parametrize("case", LOSSES)
def test_units_that_the_loss_looks_at_are_left_alone(case: str) -> None:
    loss, expected = LOSSES[case]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    def step() -> Any:
        hidden = net[:4](vectors().float())
        return loss(hidden, net[4](hidden))

    with undisturbed(net):
        wiring = find_wiring(net, step)
    assert set(wiring.layers) == expected
    assert wiring.outputs == ("4",)
    if "2" not in expected:
        assert "go into the loss past the weights" in wiring.unsupported["2"]
        # It can still be told.
        assert set(told_wiring(net, {"2": ["4"]}).layers) == {"2"}
