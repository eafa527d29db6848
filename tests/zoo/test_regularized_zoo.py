"""Regularisers on every kind of module: training goes through, and each penalty is added exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_plasticity import L2, EffectiveRank, L2ERMixin, Regularization
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.regularization import Regularizer
from zoo import KINDS, Kind
from zoo.parameters import bare_module
from zoo.runner import run

PENALTY = 0.25


class Constant(Regularizer):
    """Adds the same number to every loss."""

    def penalty(self, module: Any, features: Any) -> Tensor:
        return torch.tensor(PENALTY)


class Witness(L.Callback):
    """Notes the loss that the step returned and the one that is differentiated; comes before the regularisers."""

    def __init__(self) -> None:
        self.returned: list[float] = []
        self.differentiated: list[float] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        step = type(pl_module).training_step

        def noting(batch: Any, batch_idx: int) -> Any:
            returned = step(pl_module, batch, batch_idx)
            loss = returned["loss"] if isinstance(returned, Mapping) else returned
            if loss is not None and not is_measuring():
                self.returned.append(float(loss.detach()))
            return returned

        pl_module.training_step = noting

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.differentiated.append(float(loss.detach()))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_by_callback(kind: Kind) -> None:
    witness = Witness()
    automatic = bare_module(kind.make_module()).automatic_optimization
    regularizers = [EffectiveRank(0.05, every_n_steps=2), L2(0.1), *([Constant()] if automatic else [])]
    run(kind, [witness, Regularization(regularizers)])
    if automatic:
        returned, differentiated = torch.tensor(witness.returned), torch.tensor(witness.differentiated)
        assert len(returned) == len(differentiated)
        torch.testing.assert_close(differentiated, returned + PENALTY, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_by_mixin(kind: Kind) -> None:
    if kind.name == "compiled whole" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot compile a wrapped training step: an internal error of its dynamo")
    run(kind, make_module=lambda: mixed(kind.make_module()))


def mixed(module: Any) -> Any:
    """The module with the mixin put before its class."""
    inner = bare_module(module)
    settings = {"rank_every_n_steps": 2, "rank_mode": "loss" if inner.automatic_optimization else "separate"}
    inner.__class__ = type("Mixed", (L2ERMixin, type(inner)), settings)
    return module
