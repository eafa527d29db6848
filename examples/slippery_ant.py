"""PPO on Slippery Ant, with the spectra of actor and critic at each change of friction.

    pip install '.[rl]'
    python examples/slippery_ant.py

Ten minutes, and an ant that walks. A policy that does nothing gets a return of about 990 by standing still for 1000
steps, so look at the forward reward too: 0 for that one, and growing here.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from lightning_plasticity.rl import PPO, policy_nll
from lightning_plasticity.streams import SlipperyAnt


def main(num_tasks: int = 5, max_steps: int = -1) -> None:
    """Train; ``max_steps`` cuts the run short."""
    short = max_steps > 0
    stream = SlipperyAnt(
        num_tasks=num_tasks,
        change_every=256 if short else 100_000,
        rollout_steps=256 if short else 2048,
        num_envs=16,
        num_minibatches=1 if short else 16,
        passes=1 if short else 10,
    )
    module = PPO(lr=3e-4, gae_lambda=0.9, initial_std=0.4, normalize_observations=True)
    callbacks: list[L.Callback] = [
        HessianSpectrumMonitor(name="actor", objective="actor", params="actor.*", loss_fn=policy_nll),
        HessianSpectrumMonitor(name="critic", objective="critic", params="critic.*"),
        FeatureRankMonitor(),
    ]
    trainer = L.Trainer(
        max_epochs=num_tasks * stream.epochs_per_task,
        max_steps=max_steps,
        accelerator="cpu",
        gradient_clip_val=0.5,
        callbacks=callbacks,
        logger=False if short else TensorBoardLogger("lightning_logs", name="slippery_ant"),
        enable_checkpointing=False,
        enable_progress_bar=not short,
    )
    trainer.fit(module, datamodule=stream)
    for task in range(stream.task_id + 1):
        own = [row for row in stream.episodes if row[0] == task]
        if own:
            mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
            print(f"friction {stream.friction_of(task):.3f}: return {mean[2]:.0f}, of that forward {mean[4]:.0f}")


if __name__ == "__main__":
    main()
