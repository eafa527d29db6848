"""What is free, and what a graph keeps; bounds and how they are checked."""

import math
import weakref

import pytest
import torch
from problems import classes, cross_entropy, mlp
from torch import nn

from lightning_plasticity.curvature import Measured, memory
from lightning_plasticity.curvature.budget import Budget, ended_early, in_mib, training_step_bytes
from lightning_plasticity.curvature.memory import GraphMeter, forward_only, free_memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any of the files that say how much memory there is."""
    for name in ("CGROUP", "OWN_GROUP", "MEMINFO"):
        monkeypatch.setattr(memory, name, tmp_path / name.lower())
    return tmp_path


def group(path, limit, used, inactive=0):
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_this_machine_has_some():
    assert 2**20 < free_memory() < 2**45


def test_machines_that_say_little(machine, monkeypatch):
    assert free_memory() > 0  # from sysconf
    monkeypatch.setattr(memory.os, "sysconf", lambda name: -1)
    assert free_memory() == memory.UNKNOWN
    monkeypatch.delattr(memory.os, "sysconf_names")  # Windows
    assert free_memory() == memory.UNKNOWN
    (machine / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  1024 kB\n")
    assert free_memory() == 2**20


def test_containers(machine):
    (machine / "meminfo").write_text(f"MemAvailable: {2**30} kB\n")
    root = machine / "cgroup"
    group(root, 1000, 900)
    assert free_memory() == 100
    group(root, 1000, 900, inactive=300)  # files that the kernel has cached are no loss
    assert free_memory() == 400
    group(root, "max", 900)
    assert free_memory() == 2**40
    group(root, 100, 900)
    assert free_memory() == 0
    (root / "memory.current").write_text("nonsense")
    assert free_memory() == 2**40


def test_the_tightest_of_nested_groups_counts(machine):
    (machine / "meminfo").write_text(f"MemAvailable: {2**30} kB\n")
    (machine / "own_group").write_text("1:cpu:/other\n0::/job/step\n")
    group(machine / "cgroup" / "job" / "step", "max", 500)
    group(machine / "cgroup" / "job", 2000, 500)
    assert free_memory() == 1500
    group(machine / "cgroup" / "job" / "step", 700, 500)
    assert free_memory() == 200


def test_graph_meter_counts_storages_once():
    # Linear keeps its input (10 x 4 floats), Tanh its output (10 x 6); weights are ignored.
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    x = torch.randn(10, 4)
    with GraphMeter(list(net.parameters())) as meter:
        net(x.requires_grad_())
    assert meter.num_bytes == 4 * (10 * 4 + 10 * 6)
    with GraphMeter([x, *net.parameters()]) as meter, torch.no_grad():
        net(x)
    assert meter.num_bytes == 0


def test_graph_meter_frees_what_it_has_seen():
    # An operation that keeps its own output would keep itself alive, if it were handed back with its history.
    weight = torch.randn(50, requires_grad=True)
    held = [lambda gradient: None]
    gone = weakref.ref(held[0])
    with GraphMeter([weight]):
        middle = (2 * weight).tanh()
        middle.register_hook(held.pop())  # lives as long as the graph
        out = middle.exp().sigmoid()
        (gradient,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
        gradient.sum().backward()
    expected = weight.grad.clone()
    assert gone() is not None
    del middle, out, gradient
    assert gone() is None
    again = torch.autograd.grad((2 * weight).tanh().exp().sigmoid().sum(), weight, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(again.sum(), weight)[0], expected)


def test_forward_only_keeps_nothing():
    weight = torch.randn(5, requires_grad=True)
    with forward_only():
        loss = weight.exp().sum()
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="Nothing was kept"):
        loss.backward()


@pytest.mark.parametrize("name", ["max_seconds", "max_memory"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "4", [1]])
def test_bounds_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*expected a positive number of .*, or None"):
        Budget(**{name: value})


def test_bounds():
    cpu = torch.device("cpu")
    assert Budget().seconds == Budget(max_seconds=math.inf).seconds == math.inf
    assert Budget(max_memory=1000).memory(cpu) == 1000
    assert Budget(max_memory=1e30).memory(cpu) < 2**45  # what is free counts as well
    assert Budget(2.5).reason([], 2**20) == ""
    assert Budget(2.5).reason(["no basis", "x"], 2**21) == "no basis, x, to stay within 2.5 s and 2 MiB"
    assert Budget().reason(["x"], 2**21) == "x, to stay within 2 MiB"
    assert (in_mib(3 * 2**20), in_mib(2**18)) == ("3 MiB", "0.25 MiB")
    assert ended_early("the clock", 30, 120, "") == "ended by the clock after 30 of 120 Lanczos steps"
    assert ended_early("the clock", 30, 120, "a").startswith("a; ended by")


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
    ],
)
def test_bytes_of_a_training_step(optimizer, states):
    net, data = mlp(4, 6, 3), classes(10, 4, 3)
    net[0].bias.requires_grad_(False)
    weights, trained = 8 * (30 + 21), 8 * (24 + 21)
    found = training_step_bytes(Measured(net, [data], cross_entropy, optimizers=[optimizer(net.parameters())]), data)
    graph = found - weights - (1 + states) * trained
    # Inputs 10 x 4, the hidden layer's outputs 10 x 6, log-probabilities 10 x 3, labels: at least; and not much more.
    least = 8 * 10 * (4 + 6 + 3 + 1)
    assert least <= graph <= 2 * least
    assert all(parameter.grad is None for parameter in net.parameters())
