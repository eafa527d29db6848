"""Slippery Ant: the friction acts, episodes are counted, a checkpoint goes on exactly, monitors change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium.envs.mujoco.ant_v5")

from ant_runs import outcome, plain, ppo, rollouts, stream, trainer

from lightning_plasticity import (
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    Regularization,
    TaskTracker,
    TrainabilityProbe,
)
from lightning_plasticity.rl import PPO, generalized_advantages, policy_nll

pytestmark = pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")


def by_part() -> list[L.Callback]:
    """Actor and critic apart."""
    common: Any = {"when": ("start", "end"), "probe_samples": 32, "max_seconds": None}
    actor = HessianSpectrumMonitor(name="actor", objective="actor", params="actor.*", loss_fn=policy_nll, **common)
    critic = HessianSpectrumMonitor(name="critic", objective="critic", params="critic.*", **common)
    return [actor, critic, FeatureRankMonitor(), TrainabilityProbe(max_seconds=None)]


# Friction


def test_friction_is_that_of_all_bodies() -> None:
    data = stream()
    ants: Any = data.make_environments()
    for task in (0, 1):
        ants.begin_task(task)
        for env in ants.envs:
            np.testing.assert_array_equal(env.model.geom_friction[:, 0], data.friction_of(task))
    assert data.friction_of(0) != data.friction_of(1)
    assert all(0.02 <= data.friction_of(task) <= 2.0 for task in range(50))


def slide(friction: float, steps: int = 10) -> float:
    """Speed that is left to an ant which lies on the floor and was pushed at 2 m/s."""
    data = stream(friction=(friction, friction), num_envs=1, max_episode_steps=1000)
    ants: Any = data.make_environments()
    ants.begin_task(0)
    for _ in range(40):
        ants.step(np.zeros((1, 8)))
    env = ants.envs[0]
    velocities = np.zeros(env.model.nv)
    velocities[0] = 2.0
    env.set_state(env.data.qpos.copy(), velocities)
    for _ in range(steps):
        ants.step(np.zeros((1, 8)))
    return float(env.data.qvel[0])


def test_friction_slows_a_sliding_ant_as_coulomb_says() -> None:
    """v = 2 - mu g t while it slides, t = 0.5 s; with much friction it has come to rest."""
    assert slide(0.05) == pytest.approx(2.0 - 0.05 * 9.81 * 0.5, abs=0.1)
    assert slide(0.2) == pytest.approx(2.0 - 0.2 * 9.81 * 0.5, abs=0.2)
    assert abs(slide(1.5)) < 0.3


# Rollouts


def test_a_rollout_is_what_its_own_samples_say() -> None:
    data, policy = stream(), ppo()
    first, _ = rollouts(data, policy, 2)
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "observations": (64, 105),
        "actions": (64, 8),
        **dict.fromkeys(("log_probs", "reward", "forward_reward", "returns", "advantages"), (64,)),
    }
    advantages = first["advantages"].double()
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert len(data.dataset) == 64


def test_returns_add_up_to_the_rewards() -> None:
    data, policy = stream(num_tasks=1, rollout_steps=120, num_envs=2), ppo()
    samples = list(rollouts(data, policy, 3))
    rewards = torch.cat([rollout["reward"].reshape(-1, 2) for rollout in samples]).double()
    forward = torch.cat([rollout["forward_reward"].reshape(-1, 2) for rollout in samples]).double()
    assert len(data.episodes) >= 14  # 180 steps each of two ants, in episodes of 20 at most
    begins = [0, 0]
    for _, step, total, length, progress in data.episodes:
        # The step counts both ants; whose episode it was is told by where one must have begun.
        fits = [k for k in range(2) if begins[k] + int(length) == int(step) // 2]
        matching = [
            k
            for k in fits
            if abs(float(rewards[begins[k] : begins[k] + int(length), k].sum()) - total) < 1e-4
            and abs(float(forward[begins[k] : begins[k] + int(length), k].sum()) - progress) < 1e-4
        ]
        assert len(matching) == 1
        begins[matching[0]] += int(length)
    assert {int(row[3]) for row in data.episodes} <= set(range(1, 21))
    assert min(begins) > 160


def test_time_limits_are_bootstrapped_and_falls_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(*args: Any) -> torch.Tensor:
        seen.append(args)
        return generalized_advantages(*args)

    monkeypatch.setattr("lightning_plasticity.rl.rollouts.generalized_advantages", spy)
    data = stream(num_envs=1, num_tasks=1)
    list(rollouts(data, ppo(), 1))
    _, values, following, terminated, ended, *_ = seen[0]
    assert ended.any()
    cut = ended & ~terminated
    assert cut.any()
    # What follows a step that ends nothing is the observation acted on next; after an end it is not.
    same = (values[1:] - following[:-1]).abs() < 1e-6
    assert same[~ended[:-1]].all()
    assert not same[ended[:-1]].any()


def test_the_same_seed_gives_the_same_rollouts() -> None:
    torch.manual_seed(5)
    first = [plain(samples) for samples in rollouts(stream(), ppo(), 3)]
    torch.manual_seed(6)
    assert [plain(samples) for samples in rollouts(stream(), ppo(), 3)] == first
    assert [plain(samples) for samples in rollouts(stream(seed=1), ppo(), 3)] != first


def test_diverged_weights_are_told() -> None:
    policy = ppo()
    with torch.no_grad():
        policy.actor.net[0].weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        list(rollouts(stream(), policy, 1))


@pytest.mark.parametrize(
    "settings", [{"rollout_steps": 65}, {"num_envs": 0}, {"friction": (0.0, 1.0)}, {"max_episode_steps": 0}]
)
def test_bad_settings_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        stream(**settings)


# Fits


def test_monitors_see_each_friction_and_change_nothing(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [TaskTracker(), *by_part()]):
        torch.manual_seed(7)
        data, module = stream(), ppo()
        fit = trainer(tmp_path, callbacks)
        fit.fit(module, datamodule=data)
        found.append(outcome(fit, module, data))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == set()
    assert found[0]["step"] == 16
    assert found[0]["metrics"].keys() >= {"reward", "episode_return", "episode_forward", "actor_loss"}
    tracker, *monitors = callbacks
    assert tracker.task == 1
    for monitor in monitors:
        records = monitor.records
        assert [record.failure for record in records] == [None] * len(records)
        assert {(record.task, record.step) for record in records if record.phase == "start"} == {(0, 0), (1, 8)}
    actor, critic, features, _ = monitors
    assert actor.records[0].settings["ggn"]["num_params"] == sum(p.numel() for p in module.actor.parameters())
    assert critic.records[0].settings["hessian"]["num_params"] == sum(p.numel() for p in module.critic.parameters())
    assert actor.records[0].settings["data"] == "training dataset"
    assert "plasticity/actor/ggn/eps_rank_0.01" in actor.records[0].values
    assert "plasticity/critic/hessian/lambda_max" in critic.records[0].values
    assert "plasticity/features/effective_rank/actor.net.1" in features.records[0].values
    assert "plasticity/features/effective_rank/critic.1" in features.records[0].values


def test_the_critics_spectrum_is_that_of_its_own_loss(tmp_path: Path) -> None:
    """Dense Hessian of the squared error, on the rollout that is kept in the stream."""
    data, module = stream(num_tasks=1, num_minibatches=1, passes=1), ppo(hidden=(3,), lr=1e-12)
    _, critic, *_ = by_part()
    critic.probe_samples = 64
    trainer(tmp_path, [critic], max_epochs=1).fit(module, datamodule=data)
    samples, weights = data.dataset.samples, list(module.critic.parameters())
    module.double()
    x, y = samples["observations"].double(), samples["returns"].double()
    flat = torch.cat([p.detach().reshape(-1) for p in weights])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2 = vector.split([p.numel() for p in weights])
        return (((x @ w1.view(3, -1).T + b1).relu() @ w2 + b2 - y) ** 2).mean()

    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    values = critic.records[0].values
    assert float(values["plasticity/critic/hessian/lambda_max"].value) == pytest.approx(float(exact.max()), rel=1e-3)
    trace = values["plasticity/critic/hessian/trace"]
    assert float(trace.value) == pytest.approx(float(exact.sum()), rel=1e-3)


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Between two epochs, in the middle of a task and of episodes: bit for bit, environments included."""
    data, module = stream(change_every=192), ppo()
    whole = trainer(tmp_path, [TaskTracker(), *by_part()], max_epochs=5)
    whole.fit(module, datamodule=data)
    expected = outcome(whole, module, data)

    half = trainer(tmp_path, [TaskTracker(), *by_part()], max_epochs=2)
    half.fit(ppo(), datamodule=stream(change_every=192))
    half.save_checkpoint(tmp_path / "half.ckpt")

    data, module = stream(change_every=192), ppo()
    callbacks = [TaskTracker(), *by_part()]
    resumed = trainer(tmp_path, callbacks, max_epochs=5)
    resumed.fit(module, datamodule=data, ckpt_path=tmp_path / "half.ckpt")
    found = outcome(resumed, module, data)
    assert {key for key in expected if key != "torch" and expected[key] != found[key]} == set()
    assert callbacks[0].task == 1


class L2ERPPO(L2ERMixin, PPO):
    rank_strength = 0.1
    rank_every_n_steps = 2
    l2_strength = 1e-3


def test_l2er_takes_the_same_steps_as_mixin_and_as_callback(tmp_path: Path) -> None:
    found = []
    ways: list[tuple[type[PPO], list[L.Callback]]] = [
        (PPO, []),
        (L2ERPPO, []),
        (PPO, [Regularization.l2er(0.1, None, 2, "separate", 1e-3)]),
    ]
    for cls, callbacks in ways:
        module = ppo(cls, hidden=(16,))
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, datamodule=stream())
        found.append(plain(module.state_dict()))
    assert found[1] == found[2]
    assert found[0] != found[1]


# An objective that is not there


def test_unknown_objectives_and_parameters_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"objective": "policy"}, "policy_loss"),
        ({"params": ["policy.*"]}, "critic.0.weight"),
    ):
        monitor = HessianSpectrumMonitor(**settings)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, [monitor]).fit(ppo(), datamodule=stream())
    with pytest.raises(ValueError, match="objective"):
        HessianSpectrumMonitor(objective="two words")
    with pytest.raises(ValueError, match="params"):
        HessianSpectrumMonitor(params=[])
