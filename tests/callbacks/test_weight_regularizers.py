"""Whole fits with penalties on weights: against loops written by hand, over fits, resumed, in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from runs import loading
from small_fits import Net, batches, data, fit, trainer, weights
from torch import Tensor

from lightning_plasticity import L2, L2Init, Regularization, RegularizerMixin, SpectralNorm, Wasserstein
from lightning_plasticity.regularization import Regularizer

HOW = pytest.mark.parametrize("how", ["mixin", "callback"])


STRENGTH = 0.02


def regularizers() -> list[Regularizer]:
    return [L2Init(STRENGTH), Wasserstein(STRENGTH), SpectralNorm(STRENGTH, num_iterations=None), L2(0.01)]


class Reg(RegularizerMixin, Net):
    def configure_regularizers(self) -> list[Regularizer]:
        return regularizers()


def by(how: str, **options: Any) -> tuple[Net, list[Any]]:
    return (Reg(**options), []) if how == "mixin" else (Net(**options), [Regularization(regularizers())])


def by_hand(net: Net, initial: list[Tensor]) -> Tensor:
    """The penalties without any of our code."""
    total = torch.zeros(())
    for now, then in zip(net.parameters(), initial, strict=True):
        total = total + (now - then).square().sum()
        total = total + (now.flatten().sort().values - then.flatten().sort().values).square().sum()
        if now.ndim == 1:
            total = total + now.square().sum() ** 2
        else:
            total = total + (torch.linalg.matrix_norm(now, 2) ** 2 - 1) ** 2
    return STRENGTH * total


def loop(net: Net, initial: list[Tensor], epochs: int = 1, accumulate: int = 1) -> None:
    optimizer = net.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(batches()):
            (net.loss(batch) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                by_hand(net, initial).backward()
                with torch.no_grad():
                    for p in net.parameters():
                        assert p.grad is not None
                        p.grad.add_(p, alpha=0.01)
                optimizer.step()
                optimizer.zero_grad()


def copies(net: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@HOW
@pytest.mark.parametrize("accumulate", [1, 4])
def test_fits_equal_a_loop_by_hand_also_over_trainers(how: str, accumulate: int) -> None:
    """New optimizers in each fit, the initial weights those of the first."""
    net, callbacks = by(how)
    expected = Net()
    initial = copies(expected)
    for _ in range(3):
        fit(net, callbacks=callbacks, accumulate_grad_batches=accumulate)
        loop(expected, initial, accumulate=accumulate)
    torch.testing.assert_close(weights(net), weights(expected), rtol=1e-4, atol=1e-4)  # 24 steps in float32
    bare = Net()
    for _ in range(3):
        fit(bare, accumulate_grad_batches=accumulate)
    assert (weights(bare) - weights(net)).abs().max() > 0.02


@HOW
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resumed_run_holds_the_first_runs_weights(how: str, weights_only: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    whole, callbacks = by(how, optimizer="adam")

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    fit(whole, callbacks=[*callbacks, saver()], **options)
    resumed, callbacks = by(how, optimizer="adam")
    torch.nn.init.zeros_(resumed.net[0].weight)  # type: ignore[arg-type]
    run = trainer(callbacks=[*callbacks, saver()], **options)
    run.fit(resumed, data(), ckpt_path=tmp_path / "epoch=0.ckpt", **loading(weights_only))
    assert torch.equal(weights(resumed), weights(whole))


@HOW
def test_weights_restored_without_our_state_are_the_initial_ones(how: str, tmp_path: Path) -> None:
    """The regulariser is new in the resumed run: it holds what it starts from, not what was there before loading."""
    fit(Net()).save_checkpoint(tmp_path / "plain.ckpt")
    net, callbacks = by(how)
    run = trainer(max_epochs=2, limit_train_batches=1, callbacks=callbacks)
    run.fit(net, data(), ckpt_path=tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    engine = net.regularization_engine if isinstance(net, Reg) else callbacks[0]._running
    held = engine.state_dict()["initial_weights"]["L2Init.0"]
    assert {name: held[name].tolist() for name in state} == {name: value.tolist() for name, value in state.items()}


@HOW
def test_a_head_that_grew_is_refused_before_training(how: str) -> None:
    net, callbacks = by(how)
    fit(net, callbacks=callbacks)
    net.net[4] = torch.nn.Linear(7, 5)
    with pytest.raises(ValueError, match=r"net\.4\.weight has shape \(5, 7\).*L2Init holds, has \(3, 7\)"):
        fit(net, callbacks=callbacks)


def test_a_callback_used_for_another_network_starts_over() -> None:
    callback = Regularization(regularizers())
    fit(Net(), callbacks=[callback])
    net, expected = Net(), Net()
    fit(net, callbacks=[callback])
    fit(expected, callbacks=[Regularization(regularizers())])
    assert torch.equal(weights(net), weights(expected))


def test_unknown_parameters_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"params=\['head'\] match no parameter; those that exist: net\.0\.weight"):
        fit(Net(), callbacks=[Regularization([SpectralNorm(params=["head"])])])


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net[0] = torch.nn.LazyLinear(8)


@HOW
def test_lazy_layers(how: str) -> None:
    if how == "mixin":
        net, callbacks = type("LazyReg", (Reg, Lazy), {})(), []
    else:
        net, callbacks = Lazy(), [Regularization(regularizers())]
    first: list[Any] = []

    class Note(L.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            first.append(copies(pl_module))

    fit(net, callbacks=[*callbacks, Note()])
    engine = net.regularization_engine if isinstance(net, Reg) else callbacks[0]._running
    held = engine.state_dict()["initial_weights"]["L2Init.0"]
    for (name, _), value in zip(net.named_parameters(), first[0], strict=True):
        assert torch.equal(held[name], value)


# ---- precision, manual optimization ---------------------------------------------------------------------------------


@HOW
def test_mixed_precision_and_the_scale_of_the_gradient_scaler(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    penalty = SpectralNorm.penalty

    def note(self: SpectralNorm, module: Any, features: Any) -> Any:
        value = penalty(self, module, features)
        assert value is not None
        assert not torch.is_autocast_enabled("cpu")
        dtypes.add(value.dtype)
        return value

    monkeypatch.setattr(SpectralNorm, "penalty", note)
    found = []
    for scale in (2.0**4, 2.0**8):
        net, callbacks = by(how)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fit(net, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=callbacks)
        assert scaler.get_scale() == scale
        found.append(weights(net))
    # Powers of two scale float16 exactly but for underflow: 2^-24 / 2^4 per entry at the most, times eight steps.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    net, callbacks = by(how)
    fit(net, callbacks=callbacks)
    torch.testing.assert_close(found[0], weights(net), rtol=0, atol=2e-2)  # the task's gradients are in float16
    assert dtypes == {torch.float32}


@HOW
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*precision=.*")
def test_true_precisions_run(how: str, precision: Any) -> None:
    net, callbacks = by(how)
    fit(net, precision=precision, callbacks=callbacks)
    assert torch.isfinite(weights(net)).all()


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.loss(batch) + self.extra())
        optimizer.step()  # type: ignore[union-attr]

    def extra(self) -> Any:
        return 0.0


class ManualReg(RegularizerMixin, Manual):
    def configure_regularizers(self) -> list[Regularizer]:
        return regularizers()

    def extra(self) -> Any:
        return self.regularization_loss()


def test_manual_optimization() -> None:
    manual, automatic = ManualReg(), Reg()
    fit(manual)
    fit(automatic)
    assert torch.equal(weights(manual), weights(automatic))
    for regularizer in regularizers()[:3]:
        with pytest.raises(ValueError, match=r"manual optimization.*self\.regularization_loss\(\)"):
            fit(Manual(), callbacks=[Regularization([regularizer])])


def test_measured_losses_leave_the_penalties_out_and_switched_off_ones_change_nothing() -> None:
    plain, off = Net(), Net()
    fit(plain)
    fit(off, callbacks=[Regularization([L2Init(0.0), Wasserstein(0.0), SpectralNorm(0.0)])])
    assert torch.equal(weights(plain), weights(off))


@HOW
def test_the_random_state_is_that_of_a_run_without(how: str) -> None:
    states = []
    for callbacks, net in (by(how)[::-1], ([], Net())):
        torch.manual_seed(7)
        fit(net, callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
