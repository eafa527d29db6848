"""Coupled L2: what torch's optimizers call weight_decay, added once per optimizer step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_fits import Net, batches, fit, weights

from lightning_plasticity import L2, EffectiveRank, Regularization


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_equals_the_optimizers_weight_decay_bit_for_bit(optimizer: str) -> None:
    ours, theirs, none = Net(optimizer), Net(optimizer, weight_decay=0.03), Net(optimizer)
    fit(ours, callbacks=[Regularization([L2(0.03)])])
    fit(theirs)
    fit(none)
    assert torch.equal(weights(ours), weights(theirs))
    assert not torch.allclose(weights(ours), weights(none), atol=1e-4)


def test_is_added_once_for_each_optimizer_step_when_gradients_accumulate() -> None:
    ours, theirs = Net(), Net(weight_decay=0.5)
    fit(ours, callbacks=[Regularization([L2(0.5)])], accumulate_grad_batches=4)
    fit(theirs, accumulate_grad_batches=4)
    assert torch.equal(weights(ours), weights(theirs))


def test_is_clipped_with_the_rest_of_the_gradient() -> None:
    ours, strength, limit = Net(), 2.0, 0.3
    start = weights(ours)
    fit(ours, callbacks=[Regularization([L2(strength)])], gradient_clip_val=limit, limit_train_batches=1)
    net = Net()
    net.loss(batches()[0]).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]) + strength * start
    assert gradient.norm() > limit
    # 1e-6 relative: torch divides by the norm plus 1e-6, all in float32.
    torch.testing.assert_close(weights(ours), start - 0.1 * gradient * (limit / gradient.norm()), rtol=2e-6, atol=2e-6)


def test_frozen_parameters_stay() -> None:
    net = Net()
    net.net[0].requires_grad_(False)
    before = [p.detach().clone() for p in net.net[0].parameters()]
    fit(net, callbacks=[Regularization([L2(0.5)])])
    assert all(torch.equal(p, old) for p, old in zip(net.net[0].parameters(), before, strict=True))


def test_sparse_gradients_and_parameters_without_one_are_skipped() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    unused, used = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.full((2,), 3.0))
    used.grad = torch.ones(2)
    sparse = embedding.weight.grad
    assert sparse is not None
    before = sparse.to_dense().clone()
    L2(0.5).add_gradient([embedding.weight, unused, used])
    assert torch.equal(sparse.to_dense(), before)
    assert unused.grad is None
    assert torch.equal(used.grad, torch.full((2,), 2.5))


def test_strength_zero_changes_nothing() -> None:
    ours, plain = Net(), Net()
    fit(ours, callbacks=[Regularization([L2(0.0), EffectiveRank(0.0)])])
    fit(plain)
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("kind", [L2, EffectiveRank])
@pytest.mark.parametrize(
    ("strength", "error"),
    [
        (-1e-3, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        ("0.1", TypeError),
        (None, TypeError),
        (torch.tensor(0.1), TypeError),
    ],
)
def test_strengths_that_are_none_are_refused(kind: Any, strength: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"strength=.*expected a .*number >= 0"):
        kind(strength)
