"""PPO's losses against formulas written out, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.rl import PPO, policy_nll
from lightning_plasticity.rl.ppo import RunningNormalizer


def batch(module: PPO, size: int = 7, old: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = {"observations": (size, 4), "actions": (size, 2), "log_probs": (size,), "advantages": (size,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in draw.items()}
    found["returns"] = torch.randn(size, generator=generator)
    with torch.no_grad():  # near enough to the present policy that some ratios are clipped and some are not
        logs = module.actor.distribution(found["observations"]).log_prob(found["actions"]).sum(-1)
    found["log_probs"] = logs - old * found["log_probs"]
    return found


def module(**settings: Any) -> PPO:
    torch.manual_seed(0)
    made = PPO(4, 2, hidden=(6,), **settings)
    with torch.no_grad():
        made.actor.log_std.copy_(torch.tensor([-0.3, 0.2]))
    return made


def test_loss_is_written_out() -> None:
    net = module(clip=0.2, value_weight=0.7, entropy_weight=0.03)
    samples = batch(net)
    x = samples["observations"].double().numpy()

    def forward(layers: Any) -> np.ndarray:
        (w1, b1), (w2, b2) = [(k.weight.detach().double().numpy(), k.bias.detach().double().numpy()) for k in layers]
        return np.maximum(x @ w1.T + b1, 0) @ w2.T + b2

    std = np.exp([-0.3, 0.2])
    means, values = forward([net.actor.net[0], net.actor.net[2]]), forward([net.critic[0], net.critic[2]])[:, 0]
    density = np.exp(-0.5 * ((samples["actions"].numpy() - means) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    ratio = density.prod(1) / np.exp(samples["log_probs"].numpy())
    advantages = samples["advantages"].numpy()
    kept = np.where(advantages >= 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8))  # the pessimistic bound
    assert 0 < np.sum(kept != ratio) < 7
    entropy = np.sum(0.5 * np.log(2 * math.pi * math.e * std**2))
    error = np.mean((values - samples["returns"].numpy()) ** 2)
    expected = -np.mean(kept * advantages) + 0.7 * error - 0.03 * entropy
    net.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert net.training_step(samples, 0)["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert net.actor_loss(samples).item() == pytest.approx(-np.mean(kept * advantages), rel=1e-5)
    assert net.critic_loss(samples).item() == pytest.approx(error, rel=1e-5)


def test_clipped_samples_give_the_actor_no_gradient() -> None:
    net = module()
    samples = batch(net)
    samples["log_probs"] = samples["log_probs"] - 5  # ratios far above 1
    samples["advantages"] = samples["advantages"].abs()
    gradients = torch.autograd.grad(net.actor_loss(samples), list(net.actor.parameters()))
    assert all(not g.any() for g in gradients)


def test_log_probabilities_are_those_of_the_actions() -> None:
    net = module()
    observations, noise = torch.randn(5, 4), torch.randn(5, 2)
    actions, logs = net.act(observations, noise)
    std = net.actor.log_std.exp()
    torch.testing.assert_close((actions - net.actor(observations)) / std, noise)
    by_noise = -0.5 * noise.square().sum(1) - math.log(2 * math.pi) - net.actor.log_std.sum()
    torch.testing.assert_close(logs, by_noise)


def test_ggn_of_the_policy_is_its_fisher_information() -> None:
    """E[score score^T] over the policy's own actions, with E (a - mean)^2 = std^2 put in by hand."""
    net = module()
    samples = batch(net)
    weights = list(net.actor.net.parameters())
    spectrum = ggn_spectrum(_Actor(net), policy_nll, _pairs(net, samples))
    fisher = torch.zeros(sum(p.numel() for p in weights), sum(p.numel() for p in weights), dtype=torch.float64)
    std = net.actor.log_std.exp().detach()
    for x in samples["observations"]:
        for k in range(2):  # score = J_k^T (a_k - mean_k) / std_k^2, and E (a_k - mean_k)^2 = std_k^2
            row = torch.autograd.grad(net.actor(x[None])[0, k], weights)
            flat = torch.cat([g.reshape(-1) for g in row]).double() / std[k]
            fisher += torch.outer(flat, flat) / len(samples["observations"])
    expected = torch.linalg.eigvalsh(fisher)
    expected = expected[expected > 1e-6 * expected.max()]
    found = spectrum.eigenvalues[spectrum.eigenvalues > 1e-6 * expected.max()]
    torch.testing.assert_close(found.sort().values, expected, rtol=1e-4, atol=1e-8)


class _Actor(torch.nn.Module):
    def __init__(self, net: PPO) -> None:
        super().__init__()
        self.net = net.actor.net

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


def _pairs(net: PPO, samples: dict[str, Tensor]) -> tuple[Tensor, Any]:
    _, targets = net.actor_outputs(samples)
    return samples["observations"], targets


def test_running_moments_are_those_of_all_samples() -> None:
    parts = [torch.randn(n, 3, dtype=torch.float64) * 5 + 2 for n in (4, 1, 30)]
    normalizer = RunningNormalizer(3)
    for part in parts:
        normalizer.update(part)
    whole = torch.cat(parts)
    torch.testing.assert_close(normalizer.mean, whole.mean(0))
    torch.testing.assert_close(normalizer.var, whole.var(0, correction=0))
    assert float(normalizer.count) == 35
    assert float(normalizer(torch.full((1, 3), 1e9)).max()) == 10


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"gamma": 1.1}, {"clip": -0.1}, {"initial_std": 0.0}])
def test_bad_settings_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PPO(**settings)
