"""Whole fits with regularisers: manual optimization, precision, logging, resuming, copies, command line."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from small_fits import BATCHES, Net, batches, data, fit, trainer, weights
from torch.nn.functional import cross_entropy

from lightning_plasticity import L2, EffectiveRank, L2ERMixin, Regularization, RegularizerMixin
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.regularization import RegularizationEngine, Regularizer


class Strong:
    """Settings that a few steps show."""

    rank_strength, rank_every_n_steps, l2_strength = 0.1, 3, 0.01


class Reg(Strong, L2ERMixin, Net):
    pass


def strong(**options: Any) -> Regularization:
    return Regularization.l2er(**({"rank_strength": 0.1, "rank_every_n_steps": 3, "l2_strength": 0.01} | options))


def by(how: str, **options: Any) -> tuple[Net, list[Any]]:
    """A module and the callbacks that regularise it, through the mixin or the callback."""
    return (Reg(**options), []) if how == "mixin" else (Net(**options), [strong()])


HOW = pytest.mark.parametrize("how", ["mixin", "callback"])

# ---- manual optimization -------------------------------------------------------------------------------------------


class Manual(Net):
    def __init__(self) -> None:
        super().__init__("adam")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=False)  # a step of Adam on zeros would move its state
        self.manual_backward(self.loss(batch) + self.extra())
        optimizer.step()

    def extra(self) -> Any:
        return 0.0


class ManualReg(Strong, L2ERMixin, Manual):
    def extra(self) -> Any:
        return self.regularization_loss()


class ManualLoss(ManualReg):
    rank_mode, rank_every_n_steps = "loss", 1


class AutomaticLoss(Reg):
    rank_mode, rank_every_n_steps = "loss", 1


@pytest.mark.parametrize(("manual", "automatic"), [(ManualReg, Reg), (ManualLoss, AutomaticLoss)])
def test_manual_optimization_gives_what_automatic_optimization_gives(manual: Any, automatic: Any) -> None:
    one, other = manual(), automatic("adam")
    run = fit(one)
    fit(other)
    assert run.global_step == BATCHES  # finding the layers has run the step once more, without stepping
    assert torch.equal(weights(one), weights(other))


def test_the_callback_takes_its_steps_in_manual_optimization_and_refuses_what_it_cannot_do() -> None:
    one, other = Manual(), Reg("adam")
    fit(one, callbacks=[strong()])
    fit(other)
    assert torch.equal(weights(one), weights(other))
    with pytest.raises(ValueError, match=r"manual optimization.*self\.regularization_loss\(\)"):
        fit(Manual(), callbacks=[strong(rank_mode="loss")])


def test_regularization_loss_is_zero_when_measured_and_before_anything_was_computed() -> None:
    class Weights(Regularizer):
        def penalty(self, module: Any, features: Any) -> torch.Tensor:
            return torch.ones(())

    class Own(RegularizerMixin, Net):
        def configure_regularizers(self) -> list[Regularizer]:
            return [Weights(), EffectiveRank(0.1, mode="loss")]

    net = Own()
    assert net.regularization_loss() == 1.0
    with undisturbed(net):
        assert net.regularization_loss() == 0.0


# ---- precision -----------------------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("mode", ["separate", "loss"])
def test_mixed_precision_leaves_the_rank_in_float32(how: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    objective = EffectiveRank.step_objective

    def note(self: EffectiveRank, module: Any, features: Any) -> torch.Tensor:
        value = objective(self, module, features)
        seen.extend([feature.dtype for feature in features.values()] + [value.dtype])
        return value

    monkeypatch.setattr(EffectiveRank, "step_objective", note)
    net, callbacks = by(how)
    if how == "mixin":
        net.rank_mode = mode  # type: ignore[attr-defined]
    else:
        callbacks = [strong(rank_mode=mode)]
    fit(net, precision="bf16-mixed", callbacks=callbacks)
    # The separate step runs without autocast; the penalty sees the features of training, and is itself in float32.
    features = torch.float32 if mode == "separate" else torch.bfloat16
    assert set(seen[:-1:3] + seen[1::3]) == {features}
    assert set(seen[2::3]) == {torch.float32}
    assert torch.isfinite(weights(net)).all()


@HOW
def test_the_scale_of_the_gradient_scaler_does_not_matter(how: str) -> None:
    found = []
    for scale in (2.0**4, 2.0**8):
        net, callbacks = by(how)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fit(net, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=callbacks)
        assert scaler.get_scale() == scale
        found.append(weights(net))
    bare = Net()
    fit(bare, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))])
    # Powers of two scale float16 exactly but for underflow: 2^-24 / 2^4 per entry at the most, times eight steps.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0] - weights(bare)).abs().max() > 1e-3


@HOW
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*precision=.*")
def test_true_precisions_run(how: str, precision: Any) -> None:
    net, callbacks = by(how)
    start = weights(net)
    fit(net, precision=precision, callbacks=callbacks)
    assert torch.isfinite(weights(net)).all()
    assert not torch.equal(weights(net).float(), start)


# ---- logging -------------------------------------------------------------------------------------------------------


@HOW
def test_what_the_user_logs_is_the_task_loss(how: str) -> None:
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

    class Mixed(Strong, L2ERMixin, Logging):
        rank_mode, rank_every_n_steps = "loss", 1

    net = Mixed() if how == "mixin" else Logging()
    callbacks = [] if how == "mixin" else [strong(rank_mode="loss", rank_every_n_steps=1)]
    run = fit(net, limit_train_batches=1, callbacks=callbacks)
    assert torch.equal(run.callback_metrics["train_loss"], Net().loss(batches()[0]).detach())


# ---- resuming, several fits ----------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_inside_a_window_is_bit_exact(how: str, weights_only: bool, accumulate: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
    whole, callbacks = by(how, optimizer="adam")

    # Eight batches an epoch: with a window of three steps an epoch ends inside one.
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)

    fit(whole, callbacks=[*callbacks, saver()], enable_checkpointing=True, **options)
    for epoch in (0, 1):
        resumed, callbacks = by(how, optimizer="adam")
        run = trainer(callbacks=[*callbacks, saver()], enable_checkpointing=True, **options)
        run.fit(resumed, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=weights_only)
        assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    run = fit(Reg())
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["MixinRegularization"]
    assert state["num_steps"] == BATCHES
    assert [step for step, _ in state["window"]] == [6, 7]


def test_a_state_is_restored_once(tmp_path: Path) -> None:
    net, callback = Net(), strong()
    fit(net, callbacks=[callback]).save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_epochs=2, callbacks=[callback]).fit(net, data(), ckpt_path=tmp_path / "a.ckpt")
    fit(net, callbacks=[callback])
    assert callback.state_dict()["num_steps"] == 3 * BATCHES


@HOW
def test_fits_in_a_row_go_on_like_one(how: str) -> None:
    """Twice eight steps are not a multiple of three: the window goes over the boundary."""

    class Sgd(Reg):
        pass

    def plain_sgd(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # no state that a new fit would lose

    Sgd.configure_optimizers = plain_sgd  # type: ignore[method-assign]
    Bare = type("Bare", (Net,), {"configure_optimizers": plain_sgd})  # noqa: N806
    runs = []
    for max_epochs in ([2], [1, 1]):
        net = Sgd() if how == "mixin" else Bare()
        callbacks = [] if how == "mixin" else [strong()]
        for epochs in max_epochs:  # a new Trainer each time
            fit(net, max_epochs=epochs, callbacks=callbacks)
        runs.append(weights(net))
    net = Sgd() if how == "mixin" else Bare()
    run = trainer(callbacks=[] if how == "mixin" else [strong()])
    run.fit(net, data())
    run.fit_loop.max_epochs = 2  # the same Trainer
    run.fit(net, data())
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], weights(net))


# ---- copies and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_module_can_be_copied_and_its_copy_trains_alike(way: str, fitted: bool, tmp_path: Path) -> None:
    net = Reg()
    if fitted:
        fit(net)
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
    before = weights(net)
    fit(other)
    assert torch.equal(weights(net), before)
    fit(net)
    assert torch.equal(weights(other), weights(net))
    assert not torch.equal(weights(net), before)


def test_load_from_checkpoint(tmp_path: Path) -> None:
    net = Reg("adam")
    run = fit(net)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Reg.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.optimizer == "adam"
    assert torch.equal(weights(loaded), weights(net))
    assert set(net.state_dict()) == set(Net().state_dict())


# ---- command line --------------------------------------------------------------------------------------------------


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return data()


def test_lightning_cli_builds_the_callback_from_class_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        trainer:
          max_epochs: 1
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: lightning_plasticity.Regularization
              init_args:
                regularizers:
                  - class_path: lightning_plasticity.EffectiveRank
                    init_args: {strength: 0.1, layers: [net.1, net.3], every_n_steps: 3}
                  - class_path: lightning_plasticity.L2
                    init_args: {strength: 0.01}
        """
    )
    monkeypatch.setattr(sys, "argv", ["run", "fit", "--config", str(config)])
    cli = LightningCLI(Net, Data, save_config_callback=None, seed_everything_default=False)
    found = next(c for c in cli.trainer.callbacks if isinstance(c, Regularization))
    rank, l2 = found.regularizers
    assert isinstance(rank, EffectiveRank)
    assert (rank.strength, rank.layers, rank.every_n_steps) == (0.1, ["net.1", "net.3"], 3)
    assert isinstance(l2, L2)
    expected = Reg()
    fit(expected)
    assert torch.equal(weights(cli.model), weights(expected))


# ---- the engine in a loop of one's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_without_a_trainer_gives_the_same_weights(accumulate: int) -> None:
    net, expected = Net(), Reg()
    engine, optimizer = RegularizationEngine(strong().regularizers), net.configure_optimizers()
    for index, batch in enumerate(batches(), start=1):
        engine.remember(batch)
        (cross_entropy(net.net(batch[0]), batch[1]) / accumulate).backward()
        if index % accumulate == 0:
            engine.add_gradients(net.parameters())
            optimizer.step()
            engine.after_step(net, lambda batch: net.net(batch[0]))
            optimizer.zero_grad()
    fit(expected, accumulate_grad_batches=accumulate)
    assert torch.equal(weights(net), weights(expected))
