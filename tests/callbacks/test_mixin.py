"""The regularising mixin: how it wraps classes and steps, and that the callback does the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from small_fits import Net, batches, data, fit, trainer, weights

from lightning_plasticity import (
    L2,
    EffectiveRank,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    Regularization,
    RegularizerMixin,
)
from lightning_plasticity.callbacks.regularization import MixinRegularization
from lightning_plasticity.curvature import LossClosure
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.regularization import Regularizer


class Tilt(Regularizer):
    """A penalty with gradient one on every parameter: twice the penalty is twice the way."""

    def penalty(self, module: torch.nn.Module, features: Any) -> torch.Tensor:
        return torch.stack([p.sum() for p in module.parameters()]).sum()


class Tilted(RegularizerMixin):
    def configure_regularizers(self) -> list[Regularizer]:
        return [Tilt()]


class Strong:
    """Settings that a few steps show."""

    rank_strength, rank_every_n_steps, l2_strength = 0.1, 3, 0.01


class Reg(Strong, L2ERMixin, Net):
    pass


class Loss(Reg):
    rank_mode, rank_every_n_steps = "loss", 1


def strong(**options: Any) -> Regularization:
    return Regularization.l2er(**({"rank_strength": 0.1, "rank_every_n_steps": 3, "l2_strength": 0.01} | options))


# ---- ways to mix in ------------------------------------------------------------------------------------------------


class DefinedWith(Tilted, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class MixedIn(Tilted, Net):
    pass


class MixedInLast(Net, Tilted):
    pass


class Subclass(MixedIn):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class SubSubclass(Subclass):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class WithoutSuper(MixedIn):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Untouched(SubSubclass):
    pass


class TwiceMixed(MixedIn, Tilted):
    pass


class Dict(MixedIn):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "extra": batch_idx}


class BatchOnly(Tilted, Net):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


class Variadic(Tilted, Net):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(args[1], int)
        return self.loss(args[0])


class Decorated(Tilted, Net):
    @torch.autocast("cpu", enabled=False)
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


WAYS = [DefinedWith, MixedIn, MixedInLast, Subclass, SubSubclass, WithoutSuper, Untouched, TwiceMixed, Dict, BatchOnly]
WAYS += [Variadic, Decorated]


@pytest.mark.parametrize("kind", WAYS)
def test_the_penalty_is_added_exactly_once(kind: type[L.LightningModule]) -> None:
    expected = Net()
    optimizer = expected.configure_optimizers()
    for batch in batches(count=2):
        optimizer.zero_grad()
        (expected.loss(batch) + Tilt().penalty(expected, {})).backward()
        optimizer.step()
    net = kind()
    fit(net, limit_train_batches=2)
    assert torch.equal(weights(net), weights(expected))


@pytest.mark.parametrize("kind", [Net, BatchOnly, Variadic, Decorated])
def test_the_callback_keeps_the_arguments_of_the_step_and_adds_once_more_beside_a_mixin(kind: Any) -> None:
    net, expected = kind(), Net()
    fit(net, limit_train_batches=1, callbacks=[Regularization([Tilt(), EffectiveRank(0.0)])])
    times = 1 if kind is Net else 2
    (expected.loss(batches()[0]) + times * Tilt().penalty(expected, {})).backward()
    expected.configure_optimizers().step()
    assert torch.equal(weights(net), weights(expected))


def test_other_entries_of_a_dict_are_kept_and_the_users_dict_is_not_changed() -> None:
    returned: list[Any] = []

    class Keeping(Tilted, Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            returned.append({"loss": self.loss(batch), "extra": batch_idx})
            return returned[-1]

    net = Keeping()
    result = net.training_step(batches()[0], 7)
    assert result["extra"] == 7
    assert result["loss"] > returned[0]["loss"] or result["loss"] < returned[0]["loss"]
    assert torch.equal(returned[0]["loss"], net.loss(batches()[0]))


@pytest.mark.parametrize("mode", ["separate", "loss"])
@pytest.mark.parametrize("how", ["mixin", "callback"])
@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None")
def test_a_step_may_return_none(mode: Any, how: str) -> None:
    class Skipping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return None if batch_idx % 2 else loss

    class Mixed(Strong, L2ERMixin, Skipping):
        rank_mode = mode

    net = Mixed() if how == "mixin" else Skipping()
    start = weights(net)
    fit(net, callbacks=[] if how == "mixin" else [strong(rank_mode=mode)])
    assert torch.isfinite(weights(net)).all()
    assert not torch.equal(weights(net), start)


@pytest.mark.parametrize("how", ["positional", "kwargs", "kwargs in another order"])
def test_a_step_called_by_hand_outside_a_trainer(how: str) -> None:
    net, batch = Loss(), batches()[0]
    if how == "positional":
        loss = net.training_step(batch, 0)
    elif how == "kwargs":
        loss = net.training_step(batch=batch, batch_idx=0)
    else:
        loss = net.training_step(batch_idx=0, batch=batch)
    first, second = (net.net[:2](batch[0]), net.net[:4](batch[0]))
    penalty = EffectiveRank(0.1, mode="loss").penalty(net, {"net.1": first, "net.3": second})
    assert penalty is not None
    torch.testing.assert_close(loss, net.loss(batch) + penalty, rtol=1e-6, atol=0)  # float32


# ---- callbacks -----------------------------------------------------------------------------------------------------


class Mine(L.Callback):
    pass


@pytest.mark.parametrize("returns", ["list", "tuple", "single", "none", "super"])
def test_the_users_own_callbacks_are_kept(returns: str) -> None:
    def configure(self: Any) -> Any:
        base = super(Own, self).configure_callbacks()
        return {"list": [Mine()], "tuple": (Mine(),), "single": Mine(), "none": None, "super": [*base, Mine()]}[returns]

    Own = type("Own", (Reg,), {"configure_callbacks": configure})  # noqa: N806
    kinds = [type(callback) for callback in Own().configure_callbacks()]
    assert sorted(kind.__name__ for kind in kinds) == sorted(
        ["MixinRegularization"] + ([] if returns == "none" else ["Mine"])
    )
    net, plain = Own(), Reg()
    fit(net)
    fit(plain)
    assert torch.equal(weights(net), weights(plain))


def test_a_callback_of_the_users_is_not_replaced_by_the_mixins() -> None:
    class Part(RegularizerMixin, Net):
        def configure_regularizers(self) -> list[Regularizer]:
            return [EffectiveRank(0.1, every_n_steps=3)]

    split, both = Part(), Reg()
    run = fit(split, callbacks=[Regularization([L2(0.01)])])
    fit(both)
    assert {Regularization, MixinRegularization} <= {type(callback) for callback in run.callbacks}
    assert torch.equal(weights(split), weights(both))


@pytest.mark.parametrize("mode", ["separate", "loss"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str)
def test_callback_and_mixin_train_the_same_weights_bit_for_bit(mode: Any, options: Any) -> None:
    mixed, plain, bare = (Reg if mode == "separate" else Loss)(), Net(), Net()
    fit(mixed, **options)
    fit(plain, callbacks=[strong(rank_mode=mode, rank_every_n_steps=3 if mode == "separate" else 1)], **options)
    fit(bare, **options)
    assert torch.equal(weights(mixed), weights(plain))
    assert not torch.allclose(weights(mixed), weights(bare), atol=1e-4)


def test_the_callback_gives_the_training_step_back(tmp_path: Any) -> None:
    class Failing(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == self.fail_at:
                raise RuntimeError("mine")

    net, callback = Failing(), strong(rank_mode="loss")
    net.fail_at = 1
    with pytest.raises(RuntimeError, match="mine"):
        fit(net, callbacks=[callback])
    assert "training_step" not in net.__dict__
    net.fail_at = -1
    fit(net, callbacks=[callback])
    assert "training_step" not in net.__dict__
    own = net.training_step
    net.training_step = own  # an instance's own step is given back too
    fit(net, callbacks=[callback])
    assert net.__dict__["training_step"] is own


def test_a_copy_made_during_a_fit_is_a_plain_module() -> None:
    copies: list[Any] = []

    class Copying(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            copies.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])

    net = Net()
    fit(net, callbacks=[strong(rank_mode="loss"), Copying()], limit_train_batches=1)
    for other in copies:
        step = other.training_step
        assert step.__func__ is Net.training_step
        assert step.__self__ is other


# ---- what a measurement sees ---------------------------------------------------------------------------------------


def test_a_measured_loss_leaves_the_penalty_out() -> None:
    for net in (Loss(), MixedIn()):
        batch = batches()[0]
        with undisturbed(net):
            measured = LossClosure(net)(batch).loss
        assert torch.equal(measured, net.loss(batch))
        assert not torch.equal(net.training_step(batch, 0), measured)


@pytest.mark.parametrize("kind", [Reg, Loss])
def test_monitors_work_on_it_and_do_not_disturb_it(kind: Any) -> None:
    watched, alone = kind(), kind()
    monitors = [HessianSpectrumMonitor(on_error="raise"), FeatureRankMonitor(on_error="raise")]
    fit(watched, callbacks=monitors)
    fit(alone)
    assert torch.equal(weights(watched), weights(alone))
    assert [len(monitor.records) for monitor in monitors] == [2, 2]


@pytest.mark.parametrize("kind", [Reg, Loss])
def test_validate_test_and_predict_are_not_affected(kind: Any) -> None:
    class Stages:
        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

        test_step = validation_step

        def predict_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    full = type("Full", (Stages, kind), {})()
    plain = type("Plain", (Stages, Net), {})()
    for stage in ("validate", "test"):
        results = [getattr(trainer(), stage)(net, data(), verbose=False) for net in (full, plain)]
        assert results[0] == results[1]
    predicted = [torch.cat(trainer().predict(net, data())) for net in (full, plain)]  # type: ignore[arg-type]
    assert torch.equal(*predicted)
    assert torch.equal(weights(full), weights(plain))


def test_a_misspelt_setting_is_told() -> None:
    with pytest.warns(UserWarning, match=r"Slip.rank_strenght is no setting.*Did you mean rank_strength\?"):

        class Slip(L2ERMixin, Net):
            rank_strenght = 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Fine(L2ERMixin, Net):
            rank_strength = 1.0
            strength = 2.0  # its own
