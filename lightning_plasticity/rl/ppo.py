"""``PPO``: proximal policy optimisation for continuous actions, as a LightningModule with automatic optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

Batch = Mapping[str, Tensor]


class GaussianActor(nn.Module):
    """Gaussian policy: the mean from an MLP, one learned log standard deviation for each action."""

    def __init__(self, num_observations: int, num_actions: int, hidden: Sequence[int], initial_std: float) -> None:
        super().__init__()
        self.net = MLP(num_observations, hidden, num_actions, last_gain=0.01)
        self.initial_std = initial_std
        self.log_std = nn.Parameter(torch.empty(num_actions))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the same spread in all actions; the mean's network resets itself."""
        nn.init.constant_(self.log_std, math.log(self.initial_std))

    def forward(self, observations: Tensor) -> Tensor:
        """(N, A) means of the actions."""
        means: Tensor = self.net(observations)
        return means

    def distribution(self, observations: Tensor) -> Normal:
        """Of the actions; their log probabilities are those of independent components, to be summed."""
        return Normal(self(observations), self.log_std.exp(), validate_args=False)


class PPO(LightningModule):
    """PPO with a clipped objective (Schulman et al. 2017, arXiv 1707.06347, equation 7); actor and critic apart.

    Trains on minibatches of a ``RolloutStream``, which asks ``act`` for actions and computes advantages. The loss of a
    minibatch is ``actor_loss + value_weight * critic_loss - entropy_weight * entropy``, each a mean over samples:
    advantages are standardised over the rollout, not over the minibatch. Clip gradients by the Trainer's
    ``gradient_clip_val``.

    To measure the two networks apart, name the objective and the parameters: ``HessianSpectrumMonitor(name="critic",
    objective="critic", params="critic.*")``, and for the actor besides ``loss_fn=policy_nll``, with which the GGN is
    the policy's Fisher information. The weights are initialised as is usual for PPO, orthogonally.

    Defaults are those of the Slippery Ant experiments of Prakash et al. 2026 (arXiv 2509.22335).

    Logged: ``reward`` and ``forward_reward``, means over a rollout's environment steps; ``episode_return``,
    ``episode_length``, ``episode_forward``, means over the episodes that ended in the rollout, where some did;
    ``actor_loss``, ``critic_loss``, ``entropy``, ``clip_fraction``, ``std``.

    Args:
        num_observations: O; 105 for Ant-v5.
        num_actions: A; 8 for Ant-v5.
        hidden: widths of the hidden layers, of actor and critic each.
        lr: of Adam.
        betas: of Adam.
        eps: of Adam.
        clip: how far the probability ratio may move from 1.
        value_weight: of the critic's squared error.
        entropy_weight: of the policy's entropy.
        gamma: discount.
        gae_lambda: of the advantages.
        initial_std: of the actions.
        normalize_observations: by a running mean and variance, kept as buffers; updated after each rollout, not by
            training steps.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> import torch
        >>> from lightning_plasticity.rl import PPO
        >>> PPO(num_observations=4, num_actions=2)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        num_observations: int = 105,
        num_actions: int = 8,
        hidden: Sequence[int] = (256,),
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        clip: float = 0.2,
        value_weight: float = 0.5,
        entropy_weight: float = 0.0,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        initial_std: float = 1.0,
        normalize_observations: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("clip", clip), ("initial_std", initial_std)):
            if not value > 0:
                raise ValueError(f"{name}={value!r}, expected a number above 0.")
        for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}, expected a number from 0 to 1.")
        self.lr, self.betas, self.eps = lr, (float(betas[0]), float(betas[1])), eps
        self.clip, self.value_weight, self.entropy_weight = clip, value_weight, entropy_weight
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.actor = GaussianActor(num_observations, num_actions, hidden, initial_std)
        self.critic = MLP(num_observations, hidden, 1, last_gain=1.0)
        self.normalizer = RunningNormalizer(num_observations) if normalize_observations else None

    def forward(self, observations: Tensor) -> Tensor:
        """(N, A) mean actions of raw observations (N, O)."""
        means: Tensor = self.actor(self.normalized(observations))
        return means

    # ---- what a rollout asks for -----------------------------------------------------------------------------------

    def normalized(self, observations: Tensor) -> Tensor:
        """Observations as the networks take them, (N, O) float32."""
        return observations.float() if self.normalizer is None else self.normalizer(observations)

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (N, A) for normalised observations and standard normal noise (N, A), with log probabilities (N,)."""
        policy: Any = self.actor.distribution(observations)
        actions = policy.mean + policy.stddev * noise
        return actions, policy.log_prob(actions).sum(-1)

    def value(self, observations: Tensor) -> Tensor:
        """(N,) expected discounted returns of normalised observations."""
        values: Tensor = self.critic(observations)
        return values.squeeze(-1)

    def after_rollout(self, observations: Tensor) -> None:
        """Take a rollout's raw observations (N, O) into the running mean and variance."""
        if self.normalizer is not None:
            self.normalizer.update(observations)

    # ---- losses ----------------------------------------------------------------------------------------------------

    def actor_loss(self, batch: Batch) -> Tensor:
        """Clipped surrogate objective, negated, (); also what ``objective="actor"`` measures."""
        log_ratio, _ = self._policy(batch)
        return self._surrogate(log_ratio, batch["advantages"])

    def actor_outputs(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean actions (N, A) with what ``policy_nll`` needs besides."""
        means: Tensor = self.actor(batch["observations"])
        stds = self.actor.log_std.exp().detach().expand(means.shape)
        return means, {"actions": batch["actions"], "stds": stds}

    def critic_loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the values, (); also what ``objective="critic"`` measures."""
        return F.mse_loss(self.value(batch["observations"]), batch["returns"])

    def critic_outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values (N,) and their targets."""
        return self.value(batch["observations"]), batch["returns"]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss of a minibatch; with the mean reward of its samples, so that a study can take it as its metric."""
        log_ratio, entropy = self._policy(batch)
        actor_loss = self._surrogate(log_ratio, batch["advantages"])
        critic_loss = self.critic_loss(batch)
        loss = actor_loss + self.value_weight * critic_loss - self.entropy_weight * entropy
        measures = {name: batch[name].mean() for name in ("reward", "forward_reward") if name in batch}
        told = {
            "actor_loss": actor_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "entropy": entropy.detach(),
            "clip_fraction": (log_ratio.detach().expm1().abs() > self.clip).float().mean(),
            "std": self.actor.log_std.detach().exp().mean(),
        }
        self.log_dict(told | measures, on_step=False, on_epoch=True, batch_size=len(log_ratio))
        return {"loss": loss, **measures}

    def on_train_epoch_end(self) -> None:
        """Log the episodes that ended in the rollout."""
        ended: Mapping[str, float] = getattr(getattr(self.trainer, "datamodule", None), "rollout_episodes", {})
        self.log_dict({name: torch.tensor(value) for name, value in ended.items()}, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on both networks."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas, eps=self.eps)

    def _policy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log of the probability ratio to the policy that acted, (N,), and the entropy, ()."""
        policy: Any = self.actor.distribution(batch["observations"])
        log_probs = policy.log_prob(batch["actions"]).sum(-1)
        return log_probs - batch["log_probs"], policy.entropy().sum(-1).mean()

    def _surrogate(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def policy_nll(means: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """Negative log likelihood of actions under a Gaussian policy, up to a constant, mean over samples, ().

    Its Hessian in the means is 1 / std^2 whatever the actions, so the GGN is the Fisher information of the policy in
    the weights of its mean (Kakade 2001), which natural gradients and trust regions use. The clipped objective itself
    has no GGN: it is not convex in the means.

    Args:
        means: (N, A).
        targets: ``actions`` and ``stds``, (N, A) each; as ``PPO.actor_outputs`` gives them.
    """
    return 0.5 * ((targets["actions"] - means) / targets["stds"]).square().sum(-1).mean()


class RunningNormalizer(nn.Module):
    """Observations minus their running mean, over their running standard deviation, clipped to +-10."""

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, num_observations: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_observations, dtype=torch.float64))
        self.register_buffer("var", torch.ones(num_observations, dtype=torch.float64))

    def forward(self, observations: Tensor) -> Tensor:
        """(N, O) float32."""
        scaled = (observations.double() - self.mean) / (self.var + 1e-8).sqrt()
        return scaled.clamp(-10, 10).float()

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Merge the moments of more samples (N, O) into the running ones (Chan et al. 1979)."""
        new = observations.double()
        count, total = len(new), self.count + len(new)
        delta = new.mean(0) - self.mean
        squares = self.var * self.count + new.var(0, correction=0) * count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var.copy_(squares / total)
        self.count.copy_(total)


class MLP(nn.Sequential):
    """ReLU network with orthogonal weights, of gain sqrt 2 in hidden layers, and zero biases."""

    def __init__(self, num_inputs: int, hidden: Sequence[int], num_outputs: int, last_gain: float) -> None:
        widths = [num_inputs, *hidden, num_outputs]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.last_gain = last_gain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights."""
        linear = [layer for layer in self if isinstance(layer, nn.Linear)]
        for layer in linear:
            nn.init.orthogonal_(layer.weight, gain=self.last_gain if layer is linear[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
