"""``RolloutStream``: a LightningDataModule that gathers rollouts with the policy that is being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_plasticity.rl.advantages import generalized_advantages

EPISODE = ("task", "step", "return", "length", "forward")  # columns of ``RolloutStream.episodes``


@dataclass(frozen=True)
class Step:
    """What one step in each of N environments gave.

    Attributes:
        rewards: (N,).
        observations: (N, O) after the step, before any reset.
        terminated: (N,) bool, by the environment.
        truncated: (N,) bool, by a time limit.
        forward_rewards: (N,) the part of the rewards that is for progress.
    """

    rewards: NDArray[np.float64]
    observations: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    forward_rewards: NDArray[np.float64]


class Environments(Protocol):
    """N environments that are stepped together, and begin again by themselves where an episode has ended."""

    num_envs: int
    num_actions: int
    observations: NDArray[np.float64]  # (N, O), to act on next

    def begin_task(self, task: int) -> None:
        """Change to a task and begin all episodes anew."""

    def step(self, actions: NDArray[np.float64]) -> Step:
        """Act (N, A) once in each."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, in tensors and plain Python."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""


class RolloutDataset(Dataset[Any]):
    """The samples of the last rollout, a dict of tensors (B, ...), new in every epoch.

    A map-style dataset, so that monitors can take samples of it without a step in any environment.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.samples: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.samples.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch at once."""
        chosen = torch.as_tensor(indices)
        return {name: values[chosen] for name, values in self.samples.items()}


class RolloutSampler(Sampler[list[int]]):
    """Gathers a rollout when an epoch begins, then deals it out in shuffled minibatches, several times over."""

    def __init__(self, stream: RolloutStream) -> None:
        self.stream = stream
        self.batch_size = stream.rollout_steps // stream.num_minibatches

    def __len__(self) -> int:
        return self.stream.passes * self.stream.num_minibatches

    def __iter__(self) -> Iterator[list[int]]:
        stream = self.stream
        stream.collect()
        for _ in range(stream.passes):
            order = torch.randperm(stream.rollout_steps, generator=stream.generator).tolist()
            for start in range(0, stream.rollout_steps, self.batch_size):
                yield order[start : start + self.batch_size]


@dataclass
class _Running:
    """Sums of the episodes that are under way, (N,) each."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.float64]
    forward: NDArray[np.float64]


@dataclass
class _Gathered:
    """Lists over the T steps of a rollout."""

    raw: list[Tensor] = field(default_factory=list)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.samples.setdefault(name, []).append(value)

    def stacked(self) -> dict[str, Tensor]:
        return {name: torch.stack(values) for name, values in self.samples.items()}  # (T, N, ...)


class RolloutStream(LightningDataModule):
    """Continual reinforcement learning as a stream: an epoch is a rollout, a task so many rollouts in one world.

    When an epoch begins, ``rollout_steps`` environment steps are gathered with the module's present policy (``act``,
    ``value``, ``normalized``, ``after_rollout``, ``gamma``, ``gae_lambda``: see ``PPO``); its batches are the
    rollout's minibatches, shuffled, ``passes`` times over. Train on it in one fit with ``max_epochs=num_tasks *
    epochs_per_task``; the attribute ``task_id`` shows each change, so that a ``TaskTracker`` finds it without being
    told.

    Actions, minibatches and worlds depend on ``seed`` alone and consume no global random state. A checkpoint made
    between two epochs goes on exactly, environments included; one made inside an epoch gathers a new rollout.
    One process only.

    A subclass says in ``make_environments`` what to act in.

    Args:
        num_tasks: length of the stream.
        change_every: environment steps of a task, rounded up to whole rollouts.
        rollout_steps: environment steps of a rollout, all environments together.
        num_envs: stepped together.
        num_minibatches: in one pass over a rollout.
        passes: over each rollout, PPO's epochs.
        seed: of worlds, actions and minibatches.

    Attributes:
        episodes: finished ones, each ``[task, step, return, length, forward]``: the task, the environment steps taken
            so far, the undiscounted return, the steps it lasted, and what of the return was for progress.

    Raises:
        ValueError: for sizes out of range or that do not divide each other.
    """

    def __init__(
        self,
        num_tasks: int,
        change_every: int,
        rollout_steps: int,
        num_envs: int,
        num_minibatches: int,
        passes: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "num_tasks": num_tasks,
            "change_every": change_every,
            "rollout_steps": rollout_steps,
            "num_envs": num_envs,
            "num_minibatches": num_minibatches,
            "passes": passes,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r}, expected a whole number >= 1.")
        for name in ("num_envs", "num_minibatches"):
            if rollout_steps % sizes[name]:
                raise ValueError(f"rollout_steps={rollout_steps} is no multiple of {name}={sizes[name]}.")
        self.num_tasks, self.change_every, self.rollout_steps = num_tasks, change_every, rollout_steps
        self.num_envs, self.num_minibatches, self.passes = num_envs, num_minibatches, passes
        self.seed = seed
        self.epochs_per_task = -(-change_every // rollout_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.episodes: list[list[float]] = []
        self.dataset = RolloutDataset(rollout_steps)
        self._rollouts = 0
        self._task: int | None = None  # that the environments are in
        self._fixed_task: int | None = None
        self._running = _Running(*(np.zeros(num_envs) for _ in range(3)))
        self._environments: Environments | None = None
        self._episodes_before = 0  # the last rollout

    def make_environments(self) -> Environments:
        """What to act in; called once."""
        raise NotImplementedError

    @property
    def task_id(self) -> int:
        """Task of the last rollout. Set it, for a fit of its own, to act in that task until it is set again."""
        return 0 if self._task is None else self._task

    @task_id.setter
    def task_id(self, task: int | None) -> None:
        self._fixed_task = task

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self._rollouts * self.rollout_steps

    @property
    def rollout_episodes(self) -> dict[str, float]:
        """Means over the episodes that ended in the last rollout; empty where none did."""
        ended = self.episodes[self._episodes_before :]
        columns = {f"episode_{name}": EPISODE.index(name) for name in ("return", "length", "forward")}
        return {name: sum(row[k] for row in ended) / len(ended) for name, k in columns.items()} if ended else {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Minibatches of a new rollout in every epoch."""
        # The generator keeps the loader from drawing a seed for workers, which there are none of, off the global state.
        loader: DataLoader[Any] = DataLoader(
            self.dataset, batch_sampler=RolloutSampler(self), collate_fn=as_it_is, generator=torch.Generator()
        )
        return loader

    @torch.no_grad()
    def collect(self) -> None:
        """Gather a rollout with the policy of the Trainer's module.

        Raises:
            RuntimeError: when the policy's actions are not finite.
        """
        policy: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        environments = self._in_current_task()
        self._episodes_before = len(self.episodes)
        gathered = _Gathered()
        for _ in range(self.rollout_steps // self.num_envs):
            raw = torch.as_tensor(environments.observations, device=policy.device)
            observations = policy.normalized(raw)
            noise = torch.randn(self.num_envs, environments.num_actions, generator=self.generator)
            actions, log_probs = policy.act(observations, noise.to(policy.device))
            if not bool(torch.isfinite(actions).all()):
                raise RuntimeError(
                    f"The policy's actions are not finite after {self.steps} environment steps: its weights have "
                    "diverged. Lower lr, or clip gradients with the Trainer's gradient_clip_val."
                )
            step = environments.step(actions.double().cpu().numpy())
            following = policy.normalized(torch.as_tensor(step.observations, device=policy.device))
            gathered.raw.append(raw)
            gathered.add(observations=observations, following=following, actions=actions, log_probs=log_probs)
            gathered.add(**{name: torch.as_tensor(getattr(step, name)) for name in ("terminated", "truncated")})
            gathered.add(reward=_float(step.rewards), forward_reward=_float(step.forward_rewards))
            self._count(step, len(gathered.raw) * self.num_envs)
        self.dataset.samples = self._samples(policy, gathered.stacked())
        policy.after_rollout(torch.cat(gathered.raw))
        self._rollouts += 1

    def _in_current_task(self) -> Environments:
        if self._environments is None:
            self._environments = self.make_environments()
        task = min(self._rollouts // self.epochs_per_task, self.num_tasks - 1)
        task = task if self._fixed_task is None else self._fixed_task
        if task != self._task:
            self._environments.begin_task(task)
            self._task = task
            self._running = _Running(*(np.zeros(self.num_envs) for _ in range(3)))
        return self._environments

    def _count(self, step: Step, steps: int) -> None:
        """Sum up the episodes under way; note those that end."""
        running = self._running
        running.returns += step.rewards
        running.lengths += 1
        running.forward += step.forward_rewards
        for k in np.flatnonzero(step.terminated | step.truncated):
            sums = (running.returns[k], running.lengths[k], running.forward[k])
            self.episodes.append([float(self.task_id), float(self.steps + steps), *map(float, sums)])
            running.returns[k] = running.lengths[k] = running.forward[k] = 0

    def _samples(self, policy: Any, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        """One row for each environment step, with standardised advantages and the critic's targets."""
        values = policy.value(rollout["observations"]).cpu()
        next_values = policy.value(rollout.pop("following")).cpu()
        terminated, truncated = rollout.pop("terminated"), rollout.pop("truncated")
        rewards, ended = rollout["reward"], terminated | truncated
        advantages = generalized_advantages(
            rewards, values, next_values, terminated, ended, policy.gamma, policy.gae_lambda
        )
        rollout["returns"] = advantages + values
        spread = advantages.std(correction=0).clamp_min(1e-8)
        rollout["advantages"] = (advantages - advantages.mean()) / spread
        return {name: value.flatten(0, 1).cpu() for name, value in rollout.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters, finished episodes, random state and environments, in tensors and plain Python."""
        running = self._running
        return {
            "rollouts": self._rollouts,
            "task": self._task,
            "episodes": [list(row) for row in self.episodes],
            "episodes_before": self._episodes_before,
            "running": [values.tolist() for values in (running.returns, running.lengths, running.forward)],
            "generator": self.generator.get_state(),
            "samples": dict(self.dataset.samples),
            "environments": None if self._environments is None else self._environments.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the next rollout."""
        self._rollouts, self._task = state_dict["rollouts"], state_dict["task"]
        self.episodes = [list(row) for row in state_dict["episodes"]]
        self._episodes_before = state_dict["episodes_before"]
        self._running = _Running(*(np.array(values) for values in state_dict["running"]))
        self.generator.set_state(state_dict["generator"].cpu())
        self.dataset.samples = dict(state_dict["samples"])
        if state_dict["environments"] is not None:
            self._environments = self._environments or self.make_environments()
            self._environments.load_state_dict(state_dict["environments"])


def as_it_is(batch: Any) -> Any:
    """The dataset makes whole batches itself."""
    return batch


def _float(values: NDArray[np.float64]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
