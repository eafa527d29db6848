"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """GAE(lambda): exponentially weighted sum of temporal-difference errors, cut where an episode ends.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16. An episode that the time limit cuts (ended but not
    terminated) is continued by the value of its last observation, one that terminated is not.

    Args:
        rewards: (T, N) of T steps in N environments.
        values: (T, N) of the observations acted on.
        next_values: (T, N) of the observations that followed, before any reset.
        terminated: (T, N) bool, the environment's own end.
        ended: (T, N) bool, any end of an episode: terminated, or cut by a time limit.
        gamma: discount.
        gae_lambda: 0 for one-step errors, 1 for discounted returns minus values.

    Returns:
        (T, N) advantages; with ``values`` added, the targets of the critic.

    Example:
        >>> import torch
        >>> one, no = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.bool)
        >>> generalized_advantages(one, 0 * one, 0 * one, no, no, gamma=0.5, gae_lambda=1.0).squeeze(1)
        tensor([1.7500, 1.5000, 1.0000])
    """
    errors = rewards + next_values * ~terminated * gamma - values
    advantages = torch.empty_like(errors)
    following = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = errors[t] + following * ~ended[t] * (gamma * gae_lambda)
        advantages[t] = following
    return advantages
