"""Two interventions that reset elements of one weight: each element is corrected once, by the later of the two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_plasticity.interventions.optimizer_state import FLAT, StepCounts, forget

SHAPE = (3, 4)
RESETS = {"row": (0, [1]), "column": (1, [2, 0]), "elements": (FLAT, [4, 6, 11])}


def reset(counts: StepCounts, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kind: str) -> torch.Tensor:
    dim, chosen = RESETS[kind]
    indices = torch.tensor(chosen)
    forget([optimizer], parameter, dim, indices)
    counts.restart([optimizer], parameter, dim, indices)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    if dim == FLAT:
        mask.flatten()[indices] = True
    else:
        mask.index_fill_(dim, indices, True)
    return mask


@pytest.mark.parametrize("first", RESETS)
@pytest.mark.parametrize("second", RESETS)
@pytest.mark.parametrize("apart", [0, 7])
def test_every_element_moves_as_under_an_adam_of_its_own(first: str, second: str, apart: int) -> None:
    """Reference: one Adam per element, made anew when the element is reset."""
    random = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(SHAPE, generator=random, dtype=torch.float64))
    values = parameter.detach().flatten().clone()
    singles = [nn.Parameter(value.clone()) for value in values]
    adams = [torch.optim.Adam([single], lr=0.1) for single in singles]
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    one, two = StepCounts({"w": parameter}), StepCounts({"w": parameter})
    for counts in (one, two):
        counts.attach([optimizer])

    def steps(number: int) -> None:
        for _ in range(number):
            gradient = torch.randn(SHAPE, generator=random, dtype=torch.float64)
            parameter.grad = gradient.clone()
            optimizer.step()
            for single, adam, value in zip(singles, adams, gradient.flatten(), strict=True):
                single.grad = value.clone()
                adam.step()
            expected = torch.stack([single.detach() for single in singles]).reshape(SHAPE)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-9)

    steps(20)
    for counts, kind, pause in ((one, first, apart), (two, second, 9), (one, second, 5), (two, first, 30)):
        for k in reset(counts, optimizer, parameter, kind).flatten().nonzero().flatten().tolist():
            adams[k] = torch.optim.Adam([singles[k]], lr=0.1)
        steps(pause)
