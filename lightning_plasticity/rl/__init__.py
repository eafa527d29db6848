"""Reinforcement learning: PPO as a LightningModule, and rollouts as a LightningDataModule. Needs the extra ``rl``."""

from lightning_plasticity.rl.advantages import generalized_advantages
from lightning_plasticity.rl.ppo import PPO, policy_nll
from lightning_plasticity.rl.rollouts import Environments, RolloutStream, Step

__all__ = ["PPO", "Environments", "RolloutStream", "Step", "generalized_advantages", "policy_nll"]
