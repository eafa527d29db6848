"""Masks are found however they are held, and they mask."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lightning_plasticity.nn.masks import (
    Mask,
    active_entries,
    copy_with_plain_weights,
    find_masks,
    parameter_of,
    plain_names,
)


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


def test_a_copy_with_plain_weights_leaves_the_module_masked() -> None:
    net, mask = masked_net()
    prune.random_unstructured(net[2], "weight", amount=0.5)
    x = torch.randn(3, 5)
    outputs = net(x)  # the pruned weight now has a graph
    with torch.no_grad():
        net[0].parametrizations.weight.original[~mask] = 5.0
    twin = copy_with_plain_weights(net)
    assert set(dict(twin.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [type(twin[0]), type(twin[2])] == [nn.Linear, nn.Linear]
    assert torch.equal(twin(x), outputs)
    assert torch.equal(net(x), outputs)
    assert len(find_masks(net)) == 2


def test_parameters_behind_weights() -> None:
    net, mask = masked_net()
    prune.random_unstructured(net[2], "weight", amount=0.5)
    assert parameter_of(net[0], "weight")[0] is net[0].parametrizations.weight.original
    assert torch.equal(parameter_of(net[0], "weight")[1], mask)
    assert parameter_of(net[0], "bias") == (net[0].bias, None)
    assert parameter_of(net[1], "weight") == (None, None)
    assert parameter_of(net[2], "weight")[0] is net[2].weight_orig
    assert set(plain_names(net).values()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    assert parameter_of(net[0], "weight") == (None, None)


def test_a_parameter_that_another_layer_uses_whole_is_active_everywhere() -> None:
    net, mask = masked_net()
    assert torch.equal(active_entries(net)[net[0].parametrizations.weight.original], mask)
    net.append(nn.Linear(5, 4))
    net[3].weight = net[0].parametrizations.weight.original
    assert active_entries(net) == {}
