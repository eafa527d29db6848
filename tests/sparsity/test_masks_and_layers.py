"""Layers under masks: what is put on, taken off, copied, pickled, and left out."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_plasticity import insert_layer_norm
from lightning_plasticity.interventions import UnitResets, reset_layers
from lightning_plasticity.nn import find_hidden_layers, find_wiring, named_layers, told_wiring
from lightning_plasticity.nn.masked_layers import masks_of, stored, without_masks
from lightning_plasticity.nn.masks import find_masks
from lightning_plasticity.sparsity import active_counts, sparsify
from lightning_plasticity.trainability import reinitialize


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 8, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


BOTH = pytest.mark.parametrize("make", [mlp, conv])
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def masked(make: Callable[[], nn.Sequential], **settings: object) -> nn.Sequential:
    net = make()
    sparsify(net, **({"density": 0.4} | settings))  # type: ignore[arg-type]
    return net


@BOTH
def test_the_same_parameters_exact_counts_and_nothing_left_of_the_rest(make: Callable[[], nn.Sequential]) -> None:
    dense, net = make(), make()
    layers = {name: child for name, child in net.named_modules() if isinstance(child, nn.Linear | nn.Conv1d)}
    before = {name: child.weight for name, child in layers.items()}
    shapes = {name: weight.shape for name, weight in before.items()}
    torch_state = torch.get_rng_state()
    counts = sparsify(net, 0.4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert counts == active_counts(shapes, 0.4)
    assert sum(counts.values()) == round(0.4 * sum(weight.numel() for weight in before.values()))
    for name, layer in layers.items():
        assert stored(layer) is before[name]
        mask = masks_of(layer)["weight"].mask
        assert int(mask.sum()) == counts[name]
        assert torch.equal(stored(layer), dense.get_submodule(name).weight * mask)
    again = masked(make)
    assert all(torch.equal(a, b) for a, b in zip(find_masks(net).values(), find_masks(again).values(), strict=True))
    other = masked(make, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(find_masks(net).values(), find_masks(other).values(), strict=True))


def test_an_optimizer_that_is_there_goes_on() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsify(net, 0.4)
    before = stored(net[0]).clone()
    net(X).square().sum().backward()
    optimizer.step()
    mask = masks_of(net[0])["weight"].mask
    assert not torch.equal(stored(net[0])[mask], before[mask])
    assert bool((stored(net[0])[~mask] == 0).all())


@pytest.mark.parametrize("change", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@BOTH
def test_copies_and_pickles(
    make: Callable[[], nn.Sequential], change: Callable[[nn.Sequential], nn.Sequential]
) -> None:
    net = masked(make)
    twin = change(change(net))
    assert torch.equal(twin(X), net(X))
    assert list(twin.state_dict()) == list(net.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in net.named_parameters()]
    with torch.no_grad():
        stored(twin[-1]).add_(1)
    assert not torch.equal(twin(X), net(X))


def test_a_pickle_keeps_parameters_and_optimizer_together() -> None:
    net = masked(mlp)
    net, optimizer = pickle.loads(pickle.dumps((net, torch.optim.SGD(net.parameters(), lr=0.1))))
    assert stored(net[0]) in set(optimizer.param_groups[0]["params"])


def test_without_masks_a_network_is_dense_and_then_as_before() -> None:
    net, dense = masked(mlp), mlp()
    order, parameters = list(net.state_dict()), [name for name, _ in net.named_parameters()]
    with without_masks(net):
        assert type(net[0]) is nn.Linear
        net.load_state_dict(dense.state_dict())
        net[2].weight = nn.Parameter(torch.ones(8, 9))
        assert torch.equal(net[0].weight, dense[0].weight)
    assert list(net.state_dict()) == order
    assert [name for name, _ in net.named_parameters()] == parameters
    mask = masks_of(net[0])["weight"].mask
    assert torch.equal(stored(net[0]), dense[0].weight * mask)
    assert torch.equal(net[2].weight, masks_of(net[2])["weight"].mask.float())


@BOTH
def test_a_fresh_network_is_a_fresh_dense_one_under_the_same_masks(make: Callable[[], nn.Sequential]) -> None:
    net, dense = masked(make), make()
    masks = {name: mask.clone() for name, mask in find_masks(net).items()}
    for module in (net, dense):
        torch.manual_seed(7)
        reinitialize(module)
    assert all(torch.equal(mask, masks[name]) for name, mask in find_masks(net).items())
    fresh = dict(dense.named_parameters())
    for name, parameter in net.named_parameters():
        expected = fresh[name.replace("parametrizations.weight.original", "weight")]
        assert torch.equal(parameter, expected * masks[name] if name in masks else expected), name


@pytest.mark.parametrize("built_sparse", [False, True])
def test_a_fresh_network_that_a_function_builds(built_sparse: bool) -> None:
    net = masked(mlp)
    masks = {name: mask.clone() for name, mask in find_masks(net).items()}

    def build(module: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        built = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
        if built_sparse:
            sparsify(built, 1.0)
        return built

    reinitialize(net, build)
    expected = stored(build(net)[0])  # type: ignore[index]
    assert torch.equal(stored(net[0]), expected * masks["0.parametrizations.weight.original"])
    assert all(torch.equal(mask, masks[name]) for name, mask in find_masks(net).items())


@BOTH
def test_resetting_layers_draws_active_entries_only(make: Callable[[], nn.Sequential]) -> None:
    net, dense = masked(make), make()
    for module in (net, dense):
        reset_layers(module, ["5" if make is conv else "2"], torch.Generator().manual_seed(3))
    layer, plain = (module[5 if make is conv else 2] for module in (net, dense))
    mask = masks_of(layer)["weight"].mask
    assert torch.equal(stored(layer), plain.weight * mask)
    assert torch.equal(layer.bias, plain.bias)


# ---- units, wiring, features ---------------------------------------------------------------------------------------


@BOTH
def test_wiring_and_hidden_layers_are_those_of_the_dense_network(make: Callable[[], nn.Sequential]) -> None:
    net, dense = masked(make), make()
    found, expected = (find_wiring(module, lambda module=module: module(X)) for module in (net, dense))
    assert found.describe() == expected.describe()
    assert (found.outputs, found.order, found.unsupported) == (expected.outputs, expected.order, {})
    hidden, expected_hidden = (find_hidden_layers(m, lambda m=m: m(X)) for m in (net, dense))
    assert hidden == expected_hidden
    assert named_layers(net, ["*"]) == named_layers(dense, ["*"])


def test_masked_layers_of_a_list_are_no_blocks() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    net = Listed()
    expected = find_hidden_layers(net, lambda: net(X))
    sparsify(net, 0.5)
    assert find_hidden_layers(net, lambda: net(X)) == expected


def test_reset_units_stay_inside_the_mask() -> None:
    net = masked(mlp)
    optimizer = torch.optim.Adam(net.parameters())
    net(X).square().sum().backward()
    optimizer.step()
    resets = UnitResets(net, find_wiring(net, lambda: net(X)), [optimizer])
    old = stored(net[0]).detach().clone()
    rows = resets.reset("0", torch.tensor([1, 4]), [torch.ones(9)])
    mask = masks_of(net[0])["weight"].mask
    now = stored(net[0]).detach()
    assert torch.equal(now[[1, 4]], rows)
    assert torch.equal(rows != 0, mask[[1, 4]])
    others = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(now[others], old[others])
    assert bool((stored(net[2])[:, [1, 4]] == 0).all())
    assert bool((optimizer.state[stored(net[0])]["exp_avg"][[1, 4]] == 0).all())
    assert bool((optimizer.state[stored(net[2])]["exp_avg_sq"][:, [1, 4]] == 0).all())


def test_units_behind_other_parametrizations_are_refused_not_lost() -> None:
    net = mlp()
    parametrizations.weight_norm(net[2])
    with pytest.raises(ValueError, match=r"the weight of '2' is computed from others.*plain or under a Mask"):
        told_wiring(net, {"0": ["2"]})
    assert "0" not in find_wiring(net, lambda: net(X)).layers


def test_layer_norms_beside_masks() -> None:
    net = insert_layer_norm(masked(mlp))
    assert set(find_masks(net)) == {f"{name}.parametrizations.weight.original" for name in ("0.0", "2.0", "4")}
    net = insert_layer_norm(mlp())
    assert set(sparsify(net, 0.5)) == {"0.0", "2.0", "4"}


# ---- what cannot be sparse -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.body = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.normed, self.pruned = parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
        prune.random_unstructured(self.pruned, "weight", amount=0.5)


def test_what_cannot_be_sparse_is_left_out_and_named_once() -> None:
    net = Tied()
    with pytest.warns(
        UserWarning, match=r"head \(its weight is shared\); frozen \(.*frozen\); normed \(.*pruned \("
    ) as caught:
        assert set(sparsify(net, 0.5)) == {"body"}
    assert len(caught) == 1
    assert net.head.weight is net.embedding.weight
    other = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(other, 0.5, layers=["body"])


def test_a_module_in_two_places_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert sparsify(net, 0.5) == {"0": 8}


@pytest.mark.parametrize(
    ("make", "settings", "complaint"),
    [
        (mlp, {"density": 0.0}, r"density=0.0, expected a number in \(0, 1\]"),
        (mlp, {"density": float("nan")}, r"density=nan, expected"),
        (mlp, {"density": True}, r"density=True, expected"),
        (mlp, {"density": 0.01}, r"leaves no active weight in .*raise density"),
        (mlp, {"distribution": "er"}, r"distribution='er', expected one of"),
        (mlp, {"layers": ["body.*"]}, r"'body.\*' matches no Linear.*0, 2, 4"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, r"0 have no shape yet.*run the module on one batch"),
        (lambda: nn.ReLU(), {}, r"Nothing to make sparse in ReLU.*configure_model"),
        (lambda: nn.Linear(3, 3).requires_grad_(False), {}, r"Left out:  \(its weight is frozen\)"),
        (lambda: masked(mlp), {}, r"0, 2, 4 have masks already.*sparsify once"),
    ],
)
def test_refusals(make: Callable[[], nn.Module], settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        sparsify(make(), **settings)  # type: ignore[arg-type]
