"""Strategies that cut weights to pieces are told apart by their class's name, when a fit starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lightning_plasticity import L2, EffectiveRank, FeatureRankMonitor, HessianSpectrumMonitor, Regularization
from lightning_plasticity.callbacks.sharding import refuse_sharded_regularizers, refuse_unknown_sharding, whole


def named(name: str, **attributes: Any) -> Any:
    """A Trainer whose strategy has this class name."""
    return SimpleNamespace(strategy=type(name, (), attributes)(), callbacks=[], world_size=2)


class Own(FSDPStrategy):
    """A user's."""


@pytest.mark.parametrize("monitor", [HessianSpectrumMonitor, FeatureRankMonitor])
@pytest.mark.parametrize("strategy", [FSDPStrategy, Own])
def test_monitors_refuse_fsdp1_when_a_fit_starts(monitor: Any, strategy: Any) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    with pytest.raises(ValueError, match=r"Monitor got FSDP1 .*; expected .* What to do: use strategy='ddp'"):
        monitor().setup(trainer, nn.Linear(1, 1), "fit")
    monitor().setup(trainer, nn.Linear(1, 1), "validate")  # nothing is measured there


def test_of_deepspeed_only_the_stage_that_cuts_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO stage 3.*use stage 1 or 2, strategy='ddp'"):
        refuse_unknown_sharding(named("DeepSpeedStrategy", zero_stage_3=True), "HessianSpectrumMonitor")
    refuse_unknown_sharding(named("DeepSpeedStrategy", zero_stage_3=False), "HessianSpectrumMonitor")
    refuse_unknown_sharding(named("ModelParallelStrategy"), "HessianSpectrumMonitor")
    refuse_unknown_sharding(SimpleNamespace(strategy=DDPStrategy()), "HessianSpectrumMonitor")


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_separate_steps_are_refused_where_weights_are_cut(name: str) -> None:
    with pytest.raises(ValueError, match=rf"EffectiveRank.* got {name}"):
        Regularization.l2er().setup(named(name), nn.Linear(1, 1), "fit")
    refuse_sharded_regularizers(named(name), [EffectiveRank(mode="loss")])
    refuse_sharded_regularizers(named("DDPStrategy"), [EffectiveRank(), L2(1e-4)])


def test_what_is_added_to_gradients_is_refused_where_deepspeed_keeps_them() -> None:
    with pytest.raises(ValueError, match=r"L2 got DeepSpeedStrategy.*weight_decay"):
        refuse_sharded_regularizers(named("DeepSpeedStrategy"), [L2(1e-4)])
    refuse_sharded_regularizers(named("ModelParallelStrategy"), [L2(1e-4)])


def test_a_module_that_is_whole_is_measured_itself() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert whole(net) is net


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_ranks_measure_and_regularise_under_nccl() -> None:
    """One process over NCCL: exchanges go through the device's own backend."""
    import os

    from lightning_plasticity.callbacks.processes import exchange, joined_batches

    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"})
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        assert exchange(lambda: {"a": 1}) == [{"a": 1}]
        batch = (torch.ones(2, 3, device="cuda"), torch.zeros(2, device="cuda"))
        (joined,) = joined_batches([batch], torch.device("cuda", 0))
        assert joined[0].device.type == "cuda"
        torch.testing.assert_close(joined[0], batch[0])
    finally:
        torch.distributed.destroy_process_group()
