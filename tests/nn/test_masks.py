"""Masks are found however they are held, and they mask."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lightning_plasticity.nn.masks import Mask, find_masks


def masked_net() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    mask = torch.rand(4, 5) < 0.5
    parametrize.register_parametrization(net[0], "weight", Mask(mask))
    return net, mask


def test_masked_entries_are_zero_and_get_no_gradient() -> None:
    net, mask = masked_net()
    net(torch.randn(7, 5)).square().sum().backward()
    original = net[0].parametrizations.weight.original
    assert (net[0].weight[~mask] == 0).all()
    assert torch.equal(net[0].weight[mask], original[mask])
    assert (original.grad[~mask] == 0).all()
    assert (original.grad[mask] != 0).any()


def test_find_masks_knows_parametrizations_and_prune() -> None:
    net, mask = masked_net()
    prune.random_unstructured(net[2], "weight", amount=0.5)
    masks = find_masks(net)
    assert set(masks) == {"0.parametrizations.weight.original", "2.weight_orig"}
    assert set(masks) <= set(dict(net.named_parameters()))
    assert torch.equal(masks["0.parametrizations.weight.original"], mask)
    assert torch.equal(masks["2.weight_orig"], net[2].weight != 0)


def test_a_plain_network_has_none() -> None:
    assert find_masks(nn.Linear(3, 2)) == {}


def test_another_parametrization_on_top_is_no_mask() -> None:
    net, _ = masked_net()
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    assert find_masks(net) == {}


def test_masks_survive_state_dict_and_copy() -> None:
    net, mask = masked_net()
    other, _ = masked_net()
    other[0].parametrizations.weight[0].mask.fill_(True)
    other.load_state_dict(net.state_dict())
    assert torch.equal(find_masks(other)["0.parametrizations.weight.original"], mask)
    assert torch.equal(copy.deepcopy(net)[0].weight, net[0].weight)
