"""Whole fits with regularisers: manual optimization, precision, logging, resuming, copies, command line."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from runs import loading
from small_fits import BATCH, BATCHES, Net, batches, data, fit, trainer, weights
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_plasticity import L2, EffectiveRank, L2ERMixin, Regularization, RegularizerMixin
from lightning_plasticity.callbacks.regularization import EngineHooks, MixinRegularization
from lightning_plasticity.callbacks.schedules import EveryNEpochs, EveryNSteps
from lightning_plasticity.callbacks.task_tracker import TaskTracker
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.regularization import RegularizationEngine, Regularizer


class Strong:
    """Settings that a few steps show."""

    rank_strength, rank_every_n_steps, l2_strength = 0.1, 3, 0.01


class Reg(Strong, L2ERMixin, Net):
    pass


def strong(**options: Any) -> Regularization:
    return Regularization.l2er(**({"rank_strength": 0.1, "rank_every_n_steps": 3, "l2_strength": 0.01} | options))


def loaded(items: list[Any]) -> DataLoader[Any]:
    """Batches as they are."""
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def by(how: str, **options: Any) -> tuple[Net, list[Any]]:
    """A module and the callbacks that regularise it, through the mixin or the callback."""
    return (Reg(**options), []) if how == "mixin" else (Net(**options), [strong()])


HOW = pytest.mark.parametrize("how", ["mixin", "callback"])


def train(net: Net, engine: Any, optimizer: Any, batch: Any, parts: int = 1, steps: bool = True) -> None:
    """One minibatch in a loop without a Trainer."""
    engine.remember(batch)
    (cross_entropy(net.net(batch[0]), batch[1]) / parts).backward()
    if steps:
        engine.add_gradients(net.parameters())
        optimizer.step()
        engine.after_step(net, lambda batch: net.net(batch[0]))
        optimizer.zero_grad()


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


@HOW
@pytest.mark.parametrize("mode", ["separate", "loss"])
def test_what_a_step_does_by_hand_is_not_done_again_for_the_features(how: str, mode: Any, tmp_path: Path) -> None:
    written: list[float] = []

    class Written(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            written.append(metrics["loss"])

    class ByHand(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": self.scheduler, "interval": "epoch", "frequency": 100}]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.logger.log_metrics({"loss": loss.item()})
            self.lr_schedulers().step()
            return loss

    class Mixed(Strong, L2ERMixin, ByHand):
        rank_mode = mode

    net = Mixed() if how == "mixin" else ByHand()
    logger = Written(tmp_path)
    run = fit(net, callbacks=[] if how == "mixin" else [strong(rank_mode=mode)], logger=logger)
    assert len(written) == BATCHES
    assert net.scheduler.last_epoch == BATCHES
    assert run.loggers == [logger]


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
        run.fit(resumed, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **loading(weights_only))
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
def test_fits_in_a_row_go_on_counting_without_the_batches_of_the_last(how: str) -> None:
    """Twice eight steps are not a multiple of three: the separate step after the ninth has one minibatch, not three."""

    class Sgd(Reg):
        pass

    def plain_sgd(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # no state that a new fit would lose

    Sgd.configure_optimizers = plain_sgd  # type: ignore[method-assign]
    Bare = type("Bare", (Net,), {"configure_optimizers": plain_sgd})  # noqa: N806
    expected = Bare()
    engine, optimizer = RegularizationEngine(strong().regularizers), expected.configure_optimizers()
    for _ in range(2):
        engine.begin_fit(expected, engine.regularizers)
        for batch in batches():
            train(expected, engine, optimizer, batch)
    kind, callbacks = (Sgd, []) if how == "mixin" else (Bare, [strong()])
    net = kind()
    for _ in range(2):  # a new Trainer each time
        fit(net, callbacks=callbacks)
    assert torch.equal(weights(net), weights(expected))
    net = kind()
    run = trainer(callbacks=[] if how == "mixin" else [strong()])
    run.fit(net, data())
    run.fit_loop.max_epochs = 2  # the same Trainer
    run.fit(net, data())
    assert torch.equal(weights(net), weights(expected))


class Wide(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def test_a_callback_used_again_for_another_network_starts_over() -> None:
    wide = loaded([(torch.randn(BATCH, 9), labels) for _, labels in batches()])
    used = strong()
    fit(Net(), callbacks=[used])
    net, expected = Wide(), Wide()
    expected.load_state_dict(net.state_dict())
    fit(net, wide, callbacks=[used])
    fit(expected, wide, callbacks=[strong()])
    assert used.state_dict()["num_steps"] == BATCHES
    assert torch.equal(weights(net), weights(expected))
    again = pickle.loads(pickle.dumps(used))
    assert again.state_dict()["num_steps"] == BATCHES


@HOW
def test_a_fit_with_batches_of_another_shape_does_not_see_the_old_ones(how: str) -> None:
    class Cropping(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            assert batch[0].shape[1] == self.width
            return super().loss((batch[0][:, :4], batch[1]))

    class Mixed(Strong, L2ERMixin, Cropping):
        pass

    net = Mixed() if how == "mixin" else Cropping()
    callbacks = [] if how == "mixin" else [strong()]
    for width in (4, 6):
        net.width = width
        fit(net, loaded([(torch.randn(BATCH, width), labels) for _, labels in batches()]), callbacks=callbacks)


def test_an_evaluation_from_a_checkpoint_does_not_turn_the_count_back(tmp_path: Path) -> None:
    class Evaluated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

        def val_dataloader(self) -> Any:
            return data()

    net, callback = Evaluated(), strong()
    fit(net, callbacks=[callback]).save_checkpoint(tmp_path / "a.ckpt")
    fit(net, callbacks=[callback])
    trainer(callbacks=[callback]).validate(net, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    fit(net, callbacks=[callback])
    assert callback.state_dict()["num_steps"] == 3 * BATCHES


@HOW
@pytest.mark.parametrize("finder", ["callback", "tuner"])
@pytest.mark.filterwarnings("ignore")
def test_the_steps_of_a_learning_rate_finder_do_not_count(how: str, finder: str, tmp_path: Path) -> None:
    net, callbacks = by(how)
    net.lr = 0.1
    options: dict[str, Any] = {"num_training": 5, "update_attr": False}
    run = trainer(callbacks=callbacks, default_root_dir=tmp_path)
    if finder == "tuner":
        Tuner(run).lr_find(net, data(), **options)
    else:
        run.callbacks.insert(0, LearningRateFinder(num_training_steps=5, update_attr=False))  # type: ignore[attr-defined]
    run.fit(net, data())
    (regularization,) = (c for c in run.callbacks if isinstance(c, EngineHooks))  # type: ignore[attr-defined]
    assert regularization.state_dict()["num_steps"] == BATCHES


@HOW
def test_a_checkpoint_made_when_a_batch_arrives_does_not_hold_that_batch(how: str, tmp_path: Path) -> None:
    class Save(Checkpoint):
        def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
            trainer.save_checkpoint(tmp_path / f"{task}.ckpt")

    net, callbacks = by(how)
    fit(net, callbacks=[*callbacks, Save(), TaskTracker(EveryNSteps(4))], enable_checkpointing=True)
    states = torch.load(tmp_path / "1.ckpt", weights_only=True)["callbacks"]
    (state,) = (value for key, value in states.items() if "Regularization" in key)
    assert state["num_steps"] == 4
    assert [step for step, _ in state["window"]] == [3]  # not yet the batch of the fifth step, which comes again


class Batch(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


@HOW
def test_a_checkpoint_that_cannot_hold_the_batches_says_so_once(how: str, tmp_path: Path) -> None:
    net, callbacks = by(how)
    run = fit(net, loaded([Batch(*batch) for batch in batches()]), callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"cannot hold minibatches .* \(here: Batch\).*no minibatches"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    run.save_checkpoint(tmp_path / "b.ckpt")  # another warning would be an error
    resumed, callbacks = by(how)
    trainer(callbacks=callbacks, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "a.ckpt")


# ---- settings changed between fits ---------------------------------------------------------------------------------


def test_settings_changed_between_fits_count_in_the_next_one() -> None:
    kind = type("Changing", (Reg,), {})
    net, expected = kind(), Net()
    fit(net)
    kind.l2_strength = 0.0  # of the class
    net.rank_strength = 0.5  # of the instance
    fit(net)
    changed = strong()
    fit(expected, callbacks=[changed])
    changed.regularizers[:] = [EffectiveRank(0.5, every_n_steps=3)]
    fit(expected, callbacks=[changed])
    assert torch.equal(weights(net), weights(expected))
    assert net.regularization_engine.num_steps == 2 * BATCHES
    net.rank_strength = -1.0
    before = weights(net)
    with pytest.raises(ValueError, match=r"strength=-1\.0"):
        fit(net)
    assert torch.equal(weights(net), before)


# ---- task boundaries -----------------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("every", [4, 8])
@pytest.mark.parametrize("schedule", [EveryNSteps(8), EveryNEpochs(1)], ids=["steps", "epochs"])
@pytest.mark.parametrize("tracker_is", ["given", "attached late"])
def test_a_task_ends_after_its_last_separate_step(how: str, every: int, schedule: Any, tracker_is: str) -> None:
    class Look(L.Callback):
        def __init__(self) -> None:
            self.starts: list[torch.Tensor] = []
            self.ends: list[torch.Tensor] = []

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if tracker_is == "attached late":
                TaskTracker.attach(trainer, TaskTracker(schedule))

        def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.starts.append(weights(pl_module))

        def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
            self.ends.append(weights(pl_module))

    look, saver = Look(), ModelCheckpoint(save_top_k=0)
    given = [TaskTracker(schedule)] if tracker_is == "given" else []
    net, callbacks = by(how)
    if how == "mixin":
        net.rank_every_n_steps = every  # type: ignore[attr-defined]
    else:
        callbacks = [strong(rank_every_n_steps=every)]
    run = fit(net, max_epochs=3, callbacks=[saver, look, *given, *callbacks], enable_checkpointing=True)
    assert len(look.ends) == len(look.starts) == 3
    for end, start in zip(look.ends, [*look.starts[1:], weights(net)], strict=True):
        assert torch.equal(end, start)
    assert isinstance(run.callbacks[0], Regularization | MixinRegularization)
    assert isinstance(run.callbacks[1], TaskTracker)
    assert run.callbacks[-1] is saver


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
        train(net, engine, optimizer, batch, accumulate, steps=index % accumulate == 0)
    fit(expected, accumulate_grad_batches=accumulate)
    assert torch.equal(weights(net), weights(expected))
