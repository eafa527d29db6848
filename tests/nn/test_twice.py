"""Operations that torch differentiates wrongly, or not at all, the second time."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.nn import undisturbed

BEFORE = (sys.modules["torch.utils.checkpoint"].CheckpointFunction, torch._weight_norm)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm(dim: int) -> None:
    v = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    g = torch.norm_except_dim(v, 2, dim).detach().mul(1.3).requires_grad_(True)
    plain = torch._weight_norm(v, g, dim)
    with undisturbed(nn.Identity()):
        torch.testing.assert_close(torch._weight_norm(v, g, dim), plain)
        assert torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, dim), (v, g))


def test_reentrant_checkpointing_shows_the_parameters_inside() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3, requires_grad=True)
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    with undisturbed(net):
        found = torch.autograd.grad(checkpoint(net, x, use_reentrant=True).sum(), list(net.parameters()))
    torch.testing.assert_close(found, expected)


def test_torch_is_left_as_it_was() -> None:
    with undisturbed(nn.Identity()):
        assert torch._weight_norm is not BEFORE[1]
    with pytest.raises(KeyError), undisturbed(nn.Identity()):
        raise KeyError
    assert (sys.modules["torch.utils.checkpoint"].CheckpointFunction, torch._weight_norm) == BEFORE
