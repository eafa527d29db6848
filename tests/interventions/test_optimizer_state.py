"""Reset elements against an Adam of our own that counts steps element by element, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.optimizer_state import FLAT, StepCounts, fill, forget, forget_all

LR, B1, B2, EPS = 0.1, 0.9, 0.95, 1e-8


class ElementAdam:
    """Kingma and Ba's algorithm 1, with a step count for every element."""

    def __init__(self, weight: Tensor, amsgrad: bool = False, decay: float = 0.0, decoupled: bool = False) -> None:
        self.weight, self.steps = weight.clone(), torch.zeros_like(weight)
        self.m, self.v, self.top = (torch.zeros_like(weight) for _ in range(3))
        self.amsgrad, self.decay, self.decoupled = amsgrad, decay, decoupled

    def step(self, gradient: Tensor) -> None:
        if self.decoupled:
            self.weight = self.weight * (1 - LR * self.decay)
        else:
            gradient = gradient + self.decay * self.weight
        self.steps += 1
        self.m = B1 * self.m + (1 - B1) * gradient
        self.v = B2 * self.v + (1 - B2) * gradient**2
        self.top = torch.maximum(self.top, self.v)
        second = (self.top if self.amsgrad else self.v) / (1 - B2**self.steps)
        self.weight = self.weight - LR * self.m / (1 - B1**self.steps) / (second.sqrt() + EPS)

    def reset(self, index: Any) -> None:
        for tensor in (self.m, self.v, self.top, self.steps):
            tensor[index] = 0.0


def adam(parameter: nn.Parameter, kind: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    options: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "eps": EPS}
    if kind == "adamw":
        return torch.optim.AdamW([parameter], weight_decay=0.1, **options), {"decay": 0.1, "decoupled": True}
    if kind == "coupled":
        return torch.optim.Adam([parameter], weight_decay=0.1, **options), {"decay": 0.1}
    extra = {} if kind == "plain" else {kind: True}
    return torch.optim.Adam([parameter], **options, **extra), {"amsgrad": kind == "amsgrad"}


RESETS: dict[int, tuple[int, list[int]]] = {5: (0, [1, 3]), 9: (1, [0]), 13: (0, [3]), 14: (1, [2, 4]), 30: (0, [2])}


@pytest.mark.parametrize("kind", ["plain", "adamw", "coupled", "amsgrad", "maximize", "foreach", "fused"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_rows_and_columns_count_for_themselves(kind: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer, options = adam(parameter, kind)
    steps = StepCounts({"w": parameter})
    steps.attach([optimizer])
    mine = ElementAdam(start, **options)
    for step in range(60):
        gradient = torch.randn(shape, dtype=torch.float64, generator=generator) * 10.0 ** (step % 3)
        parameter.grad = gradient.clone()
        optimizer.step()
        mine.step(-gradient if kind == "maximize" else gradient)
        torch.testing.assert_close(parameter.detach(), mine.weight, rtol=1e-12, atol=1e-12)
        if step in RESETS:
            dim, indices = RESETS[step]
            forget([optimizer], parameter, dim, torch.tensor(indices))
            steps.restart([optimizer], parameter, dim, torch.tensor(indices))
            mine.reset((slice(None),) * dim + (indices,))


@pytest.mark.parametrize(("shape", "dim"), [((6,), 0), ((6,), FLAT), ((2, 3), FLAT)])
def test_vectors_and_single_elements_count_for_themselves(shape: tuple[int, ...], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer, options = adam(parameter, "plain")
    steps = StepCounts({"w": parameter})
    steps.attach([optimizer])
    mine = ElementAdam(start.reshape(-1), **options)
    for step in range(30):
        parameter.grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        mine.step(parameter.grad.reshape(-1))
        optimizer.step()
        torch.testing.assert_close(parameter.detach().reshape(-1), mine.weight, rtol=1e-12, atol=1e-12)
        if step in (4, 11):
            forget([optimizer], parameter, dim, torch.tensor([1, 4]))
            steps.restart([optimizer], parameter, dim, torch.tensor([1, 4]))
            mine.reset([1, 4])


def test_without_counts_of_their_own_the_first_steps_are_too_long() -> None:
    """The size of the defect that ``StepCounts`` mends: (1 - beta1) / sqrt(1 - beta2) after many steps."""
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.5, 0.99))
    for _ in range(2000):
        parameter.grad = torch.ones(2, 2, dtype=torch.float64)
        optimizer.step()
    for steps, factor in ((None, 0.5 / 0.01**0.5), (StepCounts({"w": parameter}), 1.0)):
        forget([optimizer], parameter, 0, torch.tensor([0]))
        if steps is not None:
            steps.attach([optimizer])
            steps.restart([optimizer], parameter, 0, torch.tensor([0]))
        before = parameter.detach().clone()
        parameter.grad = torch.ones(2, 2, dtype=torch.float64)
        optimizer.step()
        moved = (before - parameter.detach())[0, 0]
        assert float(moved) == pytest.approx(factor, rel=1e-3)


def test_counts_end_where_they_no_longer_matter() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([parameter], betas=(0.5, 0.6))
    steps = StepCounts({"w": parameter})
    steps.attach([optimizer])
    for step in range(60):
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
        if step == 3:
            steps.restart([optimizer], parameter, 0, torch.tensor([1]))
        assert bool(steps.state_dict()) == (3 <= step < 3 + 36)  # 0.6 ** 36 is an eighth of float32's rounding


def test_a_new_optimizer_drops_old_counts_and_a_loaded_one_keeps_them() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([parameter])
    steps = StepCounts({"w": parameter})
    for _ in range(5):
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
    steps.restart([optimizer], parameter, 1, torch.tensor([1]))
    saved = steps.state_dict()
    assert saved["w"]["1"].tolist() == [0, 5]
    loaded = torch.optim.Adam([parameter])
    loaded.load_state_dict(optimizer.state_dict())
    for fresh, expected in ((loaded, saved), (torch.optim.Adam([parameter]), {})):
        other = StepCounts({"w": parameter})
        other.load_state_dict(saved)
        other.attach([fresh])
        assert str(other.state_dict()) == str(expected)


@pytest.mark.parametrize(
    ("kind", "options", "keys"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, {"square_avg", "momentum_buffer", "grad_avg"}),
        (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq"}),
        (torch.optim.Adagrad, {}, {"sum"}),
    ],
)
def test_every_state_of_the_parameters_shape_is_zeroed(kind: Any, options: dict[str, Any], keys: set[str]) -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = kind([parameter], lr=0.01, **options)
    for _ in range(3):
        parameter.grad = torch.randn(3, 2)
        optimizer.step()
    forget([optimizer], parameter, 0, torch.tensor([2]))
    shaped = {key: v for key, v in optimizer.state[parameter].items() if getattr(v, "shape", None) == parameter.shape}
    assert set(shaped) == keys
    for value in shaped.values():
        assert (value[2] == 0).all()
        assert (value[:2] != 0).all()


def test_a_whole_parameter_starts_anew() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([one, other])
    for parameter in (one, other):
        parameter.grad = torch.ones(2)
    optimizer.step()
    forget_all([optimizer], [one])
    optimizer.step()
    assert int(optimizer.state[one]["step"]) == 1
    assert int(optimizer.state[other]["step"]) == 2


def test_fill_counts_elements_of_any_layout() -> None:
    tensor = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    fill(tensor, FLAT, torch.tensor([0, 13]), 0.0)
    expected = torch.ones(24)
    expected[[0, 13]] = 0.0
    assert torch.equal(tensor.flatten(), expected)
