"""SET and RigL: which entries they exchange, by brute force on plain lists, and what is left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.masked_layers import masks_of, stored
from lightning_plasticity.sparsity import SparseTopologyEngine, exchanged, fraction_at, sparsify

VALUES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0])  # ties on purpose
ENTRIES = st.lists(st.tuples(VALUES, st.booleans(), VALUES), min_size=1, max_size=30)
FRACTION = st.floats(0, 1)


def tensors(entries: list[tuple[float, bool, float]]) -> tuple[Tensor, Tensor, Tensor]:
    weight, mask, gradient = zip(*entries, strict=True)
    return torch.tensor(weight), torch.tensor(mask), torch.tensor(gradient)


@given(ENTRIES, FRACTION)
def test_rigl_by_brute_force(entries: list[tuple[float, bool, float]], fraction: float) -> None:
    weight, mask, gradient = tensors(entries)
    dropped, grown = exchanged(weight, mask, fraction, gradient, torch.Generator())
    active = [i for i, (_, on, _) in enumerate(entries) if on]
    masked = [i for i, (_, on, _) in enumerate(entries) if not on]
    count = min(math.floor(fraction * len(active) + 1e-9), len(masked))
    if not any(entries[i][2] for i in masked):
        count = 0
    assert dropped.tolist() == sorted(active, key=lambda i: (abs(entries[i][0]), i))[:count]
    assert grown.tolist() == sorted(masked, key=lambda i: (-abs(entries[i][2]), i))[:count]


@given(ENTRIES, FRACTION, st.integers(0, 3))
def test_set_by_brute_force(entries: list[tuple[float, bool, float]], fraction: float, seed: int) -> None:
    weight, mask, _ = tensors(entries)
    dropped, grown = exchanged(weight, mask, fraction, None, torch.Generator().manual_seed(seed))
    masked = {i for i, (_, on, _) in enumerate(entries) if not on}
    chosen: list[int] = []
    for sign in (False, True):
        own = [i for i, (w, on, _) in enumerate(entries) if on and (w < 0) == sign]
        own.sort(key=lambda i: (abs(entries[i][0]), i))
        chosen += own[: math.floor(fraction * len(own) + 1e-9)]
    chosen.sort(key=lambda i: (abs(entries[i][0]), i))
    assert dropped.tolist() == chosen[: len(masked)]
    assert len(set(grown.tolist())) == len(grown) == len(dropped)
    assert set(grown.tolist()) <= masked


def test_set_grows_every_masked_entry_as_often() -> None:
    weight, mask = torch.linspace(0.1, 1, 10), torch.arange(10) < 5
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(10)
    for _ in range(600):
        seen[exchanged(weight, mask, 0.4, None, generator)[1]] += 1
    assert not seen[:5].any()
    assert float((seen[5:] - 240).abs().max()) < 4.5 * math.sqrt(600 * 0.4 * 0.6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_moves_where_nothing_tells(bad: float) -> None:
    weight, mask = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    gradient = torch.tensor([1.0, 1.0, 2.0, 3.0])
    for own, told in (
        (weight * bad, gradient), (weight * bad, None), (weight, gradient * bad), (weight, torch.zeros(4)),
    ):  # fmt: skip
        assert [len(found) for found in exchanged(own, mask, 0.5, told, torch.Generator())] == [0, 0]


def test_the_fraction_over_time() -> None:
    assert [fraction_at(t, 0.3, 100, "rigl") for t in (0, 50, 100, 101)] == pytest.approx([0.3, 0.15, 0, 0])
    assert [fraction_at(t, 0.3, 100, "set") for t in (0, 99, 100)] == [0.3, 0.3, 0]
    assert fraction_at(10**9, 0.3, None, "rigl") == 0.3


# ---- the engine ----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    sparsify(net, 0.3)
    return net


def masked_layers(net: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in net.named_modules() if masks_of(child)}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 16, generator=generator), torch.randint(3, (8,), generator=generator)


def loss(net: nn.Module, seed: int) -> Tensor:
    inputs, labels = batch(seed)
    return nn.functional.cross_entropy(net(inputs), labels)


def dense_gradients(net: nn.Module, seeds: list[int]) -> dict[str, Tensor]:
    """Of a dense network with the sparse one's effective weights, from scratch."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for name in ("1", "4", "6"):
            plain.get_submodule(name).weight.copy_(net.get_submodule(name).weight)
            plain.get_submodule(name).bias.copy_(net.get_submodule(name).bias)
    for seed in seeds:
        loss(plain, seed).backward()
    return {name: plain.get_submodule(name).weight.grad for name in ("1", "4", "6")}


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_rigl_grows_by_the_dense_gradient_of_all_passes_of_its_step_alone(seeds: list[int]) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    engine = SparseTopologyEngine(masked_layers(net), [optimizer], every_n_steps=2)
    engine.begin()
    loss(net, 9).backward()  # of a step without an update
    assert engine.step() == {}
    for seed in seeds:
        engine.begin()
        with undisturbed(net):
            loss(net, 50).backward(inputs=[net[6].bias])
        loss(net, seed).backward()
        engine.pause()
        loss(net, 77)  # not recorded
    expected = dense_gradients(net, seeds)
    before = {name: masks_of(layer)["weight"].mask.clone() for name, layer in engine.layers.items()}
    old = {name: stored(layer).detach().clone() for name, layer in engine.layers.items()}
    done = engine.step()
    for name, layer in engine.layers.items():
        mask = masks_of(layer)["weight"].mask
        active = int(before[name].sum())
        assert done[name] == math.floor(0.3 * active) > 0
        grown, dropped = mask & ~before[name], before[name] & ~mask
        assert int(grown.sum()) == int(dropped.sum()) == done[name]
        smallest = old[name].abs()[before[name]].sort().values[: done[name]]
        assert torch.equal(old[name].abs()[dropped].sort().values, smallest)
        largest = expected[name].abs()[~before[name]].sort(descending=True).values[: done[name]]
        torch.testing.assert_close(expected[name].abs()[grown].sort(descending=True).values, largest)
        assert bool((stored(layer)[dropped | grown] == 0).all())
        kept = before[name] & mask
        assert torch.equal(stored(layer)[kept], old[name][kept])


@pytest.mark.parametrize("init", ["zero", "default"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_training_loop_keeps_densities_zeros_and_optimizer_state(method: Any, init: Any) -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    engine = SparseTopologyEngine(masked_layers(net), [optimizer], method=method, every_n_steps=3, init=init)
    counts = {name: int(masks_of(layer)["weight"].mask.sum()) for name, layer in engine.layers.items()}
    first = {name: masks_of(layer)["weight"].mask.clone() for name, layer in engine.layers.items()}
    for step in range(12):
        optimizer.zero_grad()
        engine.begin()
        loss(net, step).backward()
        optimizer.step()
        before = {name: masks_of(layer)["weight"].mask.clone() for name, layer in engine.layers.items()}
        done = engine.step()
        assert bool(done) == (step % 3 == 2)
        for name, layer in engine.layers.items():
            mask, weight = masks_of(layer)["weight"].mask, stored(layer)
            assert int(mask.sum()) == counts[name]
            assert bool((weight[~mask] == 0).all())
            new = mask & ~before[name]
            for key in ("exp_avg", "exp_avg_sq"):
                assert bool((optimizer.state[weight][key][new | ~mask] == 0).all())
            bound = 0.0 if init == "zero" else 1 / math.sqrt(weight[0].numel())
            assert bool((weight[new].abs() <= bound).all())
            assert init == "zero" or bool((weight[new] != 0).all())
    assert all(not torch.equal(first[name], masks_of(layer)["weight"].mask) for name, layer in engine.layers.items())


def test_a_grown_weight_takes_adams_first_step() -> None:
    """Right after growing, with a step count of its own, the update is lr * sign(g) as for a new weight."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-12)
    engine = SparseTopologyEngine(masked_layers(net), [optimizer], method="set", every_n_steps=5)
    for step in range(5):
        optimizer.zero_grad()
        loss(net, step).backward()
        optimizer.step()
        before = masks_of(net[4])["weight"].mask.clone()
        engine.step()
    new = masks_of(net[4])["weight"].mask & ~before
    optimizer.zero_grad()
    loss(net, 6).backward()
    gradient = stored(net[4]).grad[new]
    optimizer.step()
    torch.testing.assert_close(stored(net[4])[new], -0.01 * gradient.sign(), rtol=1e-4, atol=0)


def test_masks_stay_from_the_end_on_and_dense_layers_always() -> None:
    net = network()
    engine = SparseTopologyEngine(masked_layers(net), method="set", every_n_steps=1, end_step=2)
    assert [bool(engine.step()) for _ in range(4)] == [True, False, False, False]
    dense = nn.Linear(4, 4)
    sparsify(dense, 1.0)
    assert SparseTopologyEngine({"": dense}, method="set", every_n_steps=1).step() == {"": 0}
    with pytest.raises(ValueError, match=r"0 have no masks.*call sparsify first"):
        SparseTopologyEngine({"0": nn.Linear(2, 2)})


def test_no_hooks_stay() -> None:
    net = network()
    engine = SparseTopologyEngine(masked_layers(net), every_n_steps=2)
    for _ in range(4):
        engine.begin()
        hooks = [len(masks_of(layer)["weight"]._forward_hooks) for layer in engine.layers.values()]
        assert hooks == [int(engine.due)] * 3
        engine.step()
    engine.begin(True)
    engine.close()
    assert not any(masks_of(layer)["weight"]._forward_hooks for layer in engine.layers.values())
