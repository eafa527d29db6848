"""GAE against its definition: an explicit sum over the rest of each episode, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity.rl import generalized_advantages


def by_definition(
    r: Tensor, v: Tensor, following: Tensor, dead: Tensor, over: Tensor, gamma: float, lam: float
) -> Tensor:
    """Weighted mean of all k-step advantages (Schulman et al. 2016, equations 11 to 16), the infinite tail summed."""
    steps, n = r.shape
    found = torch.zeros_like(r)
    for i in range(n):
        for t in range(steps):
            last = next((u for u in range(t, steps) if over[u, i] or u == steps - 1), steps - 1)
            estimates = []  # of k = 1, 2, ... steps; those that reach past the end equal the last
            for k in range(1, last - t + 2):
                rewards = sum(gamma**j * float(r[t + j, i]) for j in range(k))
                tail = 0.0 if dead[t + k - 1, i] else gamma**k * float(following[t + k - 1, i])
                estimates.append(rewards + tail - float(v[t, i]))
            shares = [(1 - lam) * lam**k for k in range(len(estimates) - 1)] + [lam ** (len(estimates) - 1)]
            found[t, i] = sum(share * estimate for share, estimate in zip(shares, estimates, strict=True))
    return found


def test_is_the_weighted_mean_of_k_step_advantages() -> None:
    generator = torch.Generator().manual_seed(0)
    r, v, following = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    dead = torch.rand(12, 5, generator=generator) < 0.15
    over = dead | (torch.rand(12, 5, generator=generator) < 0.15)
    following[:-1] = torch.where(over[:-1], following[:-1], v[1:])  # of a step that ends nothing: what is acted on next
    assert dead.any()
    assert (over & ~dead).any()
    for gamma, lam in ((0.9, 0.8), (0.99, 0.0), (0.5, 1.0), (1.0, 0.95)):
        ours = generalized_advantages(r, v, following, dead, over, gamma, lam)
        torch.testing.assert_close(ours, by_definition(r, v, following, dead, over, gamma, lam), rtol=1e-12, atol=1e-12)


def test_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    r, v = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    never = torch.zeros(3, 1, dtype=torch.bool)
    ours = generalized_advantages(r, v, torch.tensor([[20.0], [30.0], [8.0]]), never, never, 0.5, 1.0)
    torch.testing.assert_close(ours, torch.tensor([[1 + 1 + 1 + 1 - 10.0], [2 + 2 + 2 - 20.0], [4 + 4 - 30.0]]))
