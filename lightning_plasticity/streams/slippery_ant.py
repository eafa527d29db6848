"""Slippery Ant: MuJoCo's ant on a floor whose friction changes. Needs the extra ``rl`` (gymnasium with MuJoCo)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_plasticity._optional import require
from lightning_plasticity.rl import RolloutStream, Step


class SlipperyAnt(RolloutStream):
    """Gymnasium's Ant-v5 with another friction in each task; rollouts of it, gathered with the policy in training.

    Source: Dohare et al. 2024 (Nature 632), who change the friction every 2e6 of 2e7 steps, within [0.02, 2] in their
    code; Prakash et al. 2026 (arXiv 2509.22335), 1e7 steps. Theirs are read from a file; here task t's is drawn
    log-uniformly from that range by ``seed`` and t. MuJoCo takes the larger friction of the two bodies in contact, so
    that of all bodies is set, not only the floor's. Reward and termination are those of Ant-v5, unchanged.

    Where an episode is under way when the friction changes, it is dropped and all begin anew. Defaults are those of the
    paper: 2048 steps a rollout, 10 passes of 128 minibatches; see ``RolloutStream`` for how to train on it.

    Args:
        num_tasks: frictions; 5 of 2e6 steps are the paper's 1e7.
        change_every: environment steps with one friction, rounded up to whole rollouts.
        rollout_steps: environment steps of a rollout, all ants together.
        num_envs: ants, stepped one after the other in this process.
        num_minibatches: in one pass over a rollout.
        passes: over each rollout, PPO's epochs.
        seed: of frictions, starts, actions and minibatches.
        friction: (lowest, highest).
        max_episode_steps: time limit of an episode.

    Raises:
        ValueError: for sizes out of range.
        ModuleNotFoundError: without gymnasium and MuJoCo, when the first rollout begins.

    Example:
        >>> from lightning_plasticity.streams import SlipperyAnt
        >>> stream = SlipperyAnt(seed=0)
        >>> stream.epochs_per_task, [round(stream.friction_of(task), 3) for task in range(3)]
        (977, [0.376, 1.204, 0.029])
    """

    def __init__(
        self,
        num_tasks: int = 5,
        change_every: int = 2_000_000,
        rollout_steps: int = 2048,
        num_envs: int = 1,
        num_minibatches: int = 128,
        passes: int = 10,
        seed: int = 0,
        friction: tuple[float, float] = (0.02, 2.0),
        max_episode_steps: int = 1000,
    ) -> None:
        super().__init__(num_tasks, change_every, rollout_steps, num_envs, num_minibatches, passes, seed)
        low, high = (float(bound) for bound in friction)
        if not 0 < low <= high:
            raise ValueError(f"friction={friction!r}, expected (lowest, highest) with 0 < lowest <= highest.")
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps={max_episode_steps!r}, expected a whole number >= 1.")
        self.friction = (low, high)
        self.max_episode_steps = max_episode_steps

    def friction_of(self, task: int) -> float:
        """Sliding friction of a task; the same at every call."""
        low, high = map(math.log, self.friction)
        return math.exp(np.random.default_rng([self.seed, task]).uniform(low, high))

    def make_environments(self) -> Ants:
        """The ants."""
        return Ants(self)


class Ants:
    """N ants that share a friction.

    Args:
        stream: says how many, how slippery each task is and how long episodes are.
    """

    num_actions = 8

    def __init__(self, stream: SlipperyAnt) -> None:
        ant = require("gymnasium.envs.mujoco.ant_v5", "Slippery Ant")
        self._mujoco = require("mujoco", "Slippery Ant")
        self.stream = stream
        self.num_envs = stream.num_envs
        self.envs = [ant.AntEnv() for _ in range(stream.num_envs)]
        self.lengths = [0] * stream.num_envs
        self.observations: NDArray[np.float64] = np.zeros((stream.num_envs, *self.envs[0].observation_space.shape))

    def begin_task(self, task: int) -> None:
        """Set the task's friction, and start all episodes from seeds that are the task's own."""
        self._set_friction(self.stream.friction_of(task))
        for k, env in enumerate(self.envs):
            seed = np.random.SeedSequence([self.stream.seed, task, k]).generate_state(1)[0]
            self.observations[k], _ = env.reset(seed=int(seed))
            self.lengths[k] = 0

    def step(self, actions: NDArray[np.float64]) -> Step:
        """Act in each, within the torques' limits of -1 and 1."""
        n = self.num_envs
        rewards, forward = np.zeros(n), np.zeros(n)
        terminated, truncated = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
        after = np.empty_like(self.observations)
        for k, (env, action) in enumerate(zip(self.envs, actions.clip(-1, 1), strict=True)):
            after[k], rewards[k], terminated[k], _, info = env.step(action)
            forward[k] = info["reward_forward"]
            self.lengths[k] += 1
            truncated[k] = self.lengths[k] >= self.stream.max_episode_steps and not terminated[k]
            self.observations[k] = after[k]
            if terminated[k] or truncated[k]:
                self.observations[k], _ = env.reset()
                self.lengths[k] = 0
        return Step(rewards, after, terminated, truncated, forward)

    def state_dict(self) -> dict[str, Any]:
        """MuJoCo's whole integration state, what the reward reads of the last step, and the random generators."""
        return {
            "friction": float(self.envs[0].model.geom_friction[0, 0]),
            "observations": torch.tensor(self.observations),
            "lengths": list(self.lengths),
            "physics": [torch.tensor(self._physics(env)) for env in self.envs],
            "positions": [torch.tensor(env.data.xpos) for env in self.envs],
            "random": [env.np_random.bit_generator.state for env in self.envs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same episodes."""
        self._set_friction(state["friction"])
        self.observations[:] = state["observations"].cpu().numpy()
        self.lengths = list(state["lengths"])
        spec = self._mujoco.mjtState.mjSTATE_INTEGRATION
        for k, env in enumerate(self.envs):
            self._mujoco.mj_setState(env.model, env.data, state["physics"][k].cpu().numpy(), spec)
            env.data.xpos[:] = state["positions"][k].cpu().numpy()
            env.np_random.bit_generator.state = state["random"][k]

    def _set_friction(self, friction: float) -> None:
        for env in self.envs:
            env.model.geom_friction[:, 0] = friction  # sliding; torsion and rolling do not act in Ant's contacts

    def _physics(self, env: Any) -> NDArray[np.float64]:
        spec = self._mujoco.mjtState.mjSTATE_INTEGRATION
        values: NDArray[np.float64] = np.empty(self._mujoco.mj_stateSize(env.model, spec))
        self._mujoco.mj_getState(env.model, env.data, values, spec)
        return values
