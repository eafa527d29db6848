"""Tiny fits on Slippery Ant, and everything that such a run leaves behind as values to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from states import bits

from lightning_plasticity.rl import PPO
from lightning_plasticity.streams import SlipperyAnt


def stream(**settings: Any) -> SlipperyAnt:
    """Two tasks of two rollouts of 64 steps, in episodes so short that time limits cut some."""
    sizes = {"num_tasks": 2, "change_every": 128, "rollout_steps": 64, "num_envs": 2}
    return SlipperyAnt(**(sizes | {"num_minibatches": 2, "passes": 2, "max_episode_steps": 20} | settings))


def ppo(cls: type[PPO] = PPO, **settings: Any) -> PPO:
    torch.manual_seed(1)
    return cls(**({"hidden": (8,), "lr": 3e-3, "normalize_observations": True} | settings))


def trainer(path: Path, callbacks: Sequence[L.Callback] = (), **settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 4, "accelerator": "cpu", "logger": False} | quiet | settings
    return L.Trainer(default_root_dir=path, callbacks=list(callbacks), **settings)


def plain(value: Any) -> Any:
    """Nested values with tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def outcome(fit: L.Trainer, module: PPO, data: SlipperyAnt) -> dict[str, Any]:
    """Weights, buffers, optimizer, random states, environments and episodes."""
    return {
        "weights": plain(module.state_dict()),
        "optimizer": plain(fit.optimizers[0].state_dict()),
        "stream": plain(data.state_dict()),
        "torch": bits(torch.get_rng_state()),
        "step": fit.global_step,
        "metrics": {k: float(v) for k, v in fit.callback_metrics.items() if not k.startswith("plasticity/")},
    }


def rollouts(data: SlipperyAnt, policy: Any, number: int) -> Iterator[dict[str, Any]]:
    """Rollouts without training in between."""

    class Fake:
        lightning_module = policy

    data.trainer = Fake()  # type: ignore[assignment]
    for _ in range(number):
        data.collect()
        yield dict(data.dataset.samples)
