"""Whole fits with interventions: resuming, accumulation, precision, boundaries, logging, alerts."""

from __future__ import annotations

import copy
import csv
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import Validated, conv, mlp
from small_fits import BATCHES, Net, batches, data, fit, trainer, weights
from states import bits
from torch import nn
from torch.utils.data import DataLoader

from lightning_plasticity import (
    ContinualBackprop,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    L2ERMixin,
    LayerReset,
    PlasticityAlert,
    ReDo,
    ShrinkAndPerturb,
    SparseTopology,
    TaskTracker,
)
from lightning_plasticity.interventions import ContinualBackpropEngine, ReDoEngine
from lightning_plasticity.nn import find_wiring, undisturbed

Make = Callable[[], list[L.Callback]]


def tasks() -> TaskTracker:
    return TaskTracker(EveryNSteps(5))


INTERVENTIONS: dict[str, Make] = {
    "cbp": lambda: [ContinualBackprop(0.05, maturity=2, decay=0.9)],
    "cbp, adaptable": lambda: [ContinualBackprop(0.05, maturity=2, decay=0.9, utility="adaptable", init="kaiming")],
    "redo": lambda: [ReDo(tau=0.5, every_n_steps=3, samples=10)],
    "shrink, tasks": lambda: [tasks(), ShrinkAndPerturb(reset_optimizer=True)],
    "shrink, steps": lambda: [ShrinkAndPerturb(0.999, 1e-3, when="step")],
    "head": lambda: [tasks(), LayerReset()],
    "last two": lambda: [tasks(), LayerReset(2, reset_optimizer=False)],
    "all": lambda: [tasks(), LayerReset("all")],
    "named": lambda: [tasks(), LayerReset(["net.2"], init="zero")],
    "static": lambda: [SparseTopology(0.4)],
    "set": lambda: [SparseTopology(0.4, method="set", every_n_steps=3, init="default")],
    "set, epochs": lambda: [SparseTopology(0.4, method="set", every_n_steps=None)],
    "rigl": lambda: [SparseTopology(0.4, method="rigl", every_n_steps=2, end_step=20)],
    "cbp, head": lambda: [*INTERVENTIONS["cbp"](), tasks(), LayerReset()],
    "rigl, remedies": lambda: [
        SparseTopology(0.6, method="rigl", every_n_steps=2),
        ContinualBackprop(0.05, maturity=2, decay=0.9),
        tasks(),
        ShrinkAndPerturb(),
        LayerReset(),
    ],
}
EACH = pytest.mark.parametrize("name", INTERVENTIONS)


def full_state(module: L.LightningModule, run: L.Trainer) -> dict[str, Any]:
    optimizer = run.optimizers[0].state_dict()["state"]
    return {
        "weights": bits(weights(module)),
        "optimizer": {f"{k} {key}": bits(torch.as_tensor(v)) for k, own in optimizer.items() for key, v in own.items()},
        "rng": (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
    }


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
@pytest.mark.parametrize("cut", [7, 8, 11])
@EACH
def test_a_resumed_run_is_bit_identical(name: str, cut: int, tmp_path: Path) -> None:
    make = INTERVENTIONS[name]
    loader = DataLoader(batches()[:1] * BATCHES, batch_size=None)  # Lightning resumes an epoch at its first batch
    whole = Net("adam")
    run = fit(whole, loader, callbacks=make(), max_epochs=3)
    expected = full_state(whole, run)
    plain = Net("adam")
    fit(plain, loader, max_epochs=3)
    assert not torch.equal(weights(whole), weights(plain))

    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=cut, save_top_k=1, monitor=None)
    fit(Net("adam"), loader, callbacks=[*make(), saver], max_epochs=3, max_steps=cut, enable_checkpointing=True)
    resumed = Net("adam")
    with torch.random.fork_rng():
        torch.manual_seed(123)  # a new process has other random numbers
        again = trainer(callbacks=[*make(), saver], max_epochs=3, enable_checkpointing=True)
        again.fit(resumed, loader, ckpt_path=str(tmp_path / "cut.ckpt"))
    found = full_state(resumed, again)
    assert found["weights"] == expected["weights"]
    assert found["optimizer"] == expected["optimizer"]


@pytest.mark.parametrize("name", ["cbp", "redo", "set, epochs", "rigl"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_at_an_epochs_end_is_bit_identical(name: str, accumulate: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 4, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = Net("adam")
    fit(whole, callbacks=[*INTERVENTIONS[name](), saver], **options)
    for epoch in (0, 2):
        resumed = Net("adam")
        run = trainer(callbacks=[*INTERVENTIONS[name](), saver], **options)
        run.fit(resumed, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cbp", "redo", "rigl"])
def test_the_steps_of_a_learning_rate_finder_do_not_count(name: str, tmp_path: Path) -> None:
    outcomes = []
    for found in (False, True):
        net, callbacks = Net("adam"), INTERVENTIONS[name]()
        net.lr = 0.1
        finder = LearningRateFinder(num_training_steps=5, update_attr=False)
        fit(net, callbacks=[*callbacks, *([finder] if found else [])], default_root_dir=tmp_path)
        outcomes.append(bits(weights(net)))
    assert outcomes[0] == outcomes[1]


@EACH
def test_training_keeps_its_random_numbers(name: str) -> None:
    states = []
    for callbacks in ([], INTERVENTIONS[name]()):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        net = Net("adam")
        states.append(full_state(net, fit(net, callbacks=callbacks, max_epochs=2))["rng"])
    assert states[0] == states[1]


@EACH
def test_callbacks_can_be_copied_and_pickled_between_fits(name: str) -> None:
    outcomes = []
    for change in (lambda c: c, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))):
        net, callbacks = Net("adam"), INTERVENTIONS[name]()
        fit(net, callbacks=callbacks)
        fit(net, callbacks=change(callbacks))
        outcomes.append(bits(weights(net)))
    assert len(set(outcomes)) == 1


# ---- the same as the engines in a loop of one's own ----------------------------------------------------------------


def by_hand(make: Callable[..., Any], parts: int = 1, epochs: int = 3) -> torch.Tensor:
    """A plain loop; one optimizer step for every so many batches."""
    net = Net("adam")
    optimizer = net.configure_optimizers()
    engine = make(net.net, find_wiring(net.net, lambda: net.net(batches()[0][0])), [optimizer])
    for index, batch in enumerate(batches() * epochs):
        (net.loss(batch) / parts).backward()
        if index % parts == parts - 1:
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
    return weights(net)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable"])
def test_continual_backprop_acts_once_for_each_optimizer_step(utility: Any, parts: int) -> None:
    options: dict[str, Any] = {"maturity": 1, "decay": 0.9, "utility": utility}
    net = Net("adam")
    fit(net, callbacks=[ContinualBackprop(0.2, **options)], max_epochs=3, accumulate_grad_batches=parts)
    expected = by_hand(lambda *args: ContinualBackpropEngine(*args, replacement_rate=0.2, **options), parts)
    assert torch.equal(weights(net), expected)


@pytest.mark.parametrize("parts", [1, 4])
def test_redo_acts_once_for_each_period_of_optimizer_steps(parts: int) -> None:
    options: dict[str, Any] = {"tau": 0.5, "every_n_steps": 2, "samples": 10}
    net = Net("adam")
    fit(net, callbacks=[ReDo(**options)], max_epochs=3, accumulate_grad_batches=parts)
    assert torch.equal(weights(net), by_hand(lambda *args: ReDoEngine(*args, **options), parts))


class Watched(Net):
    """Runs its network in validation, under no_grad and as a measurement beside training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.net(batch[0] * 5)
        with undisturbed(self):
            self.net(batch[0] * 5)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            self.net(batch[0] * 5)

    def val_dataloader(self) -> Any:
        return data(3)


@pytest.mark.parametrize("name", ["cbp", "redo"])
def test_only_training_counts_as_activity(name: str) -> None:
    states = []
    for make in (Net, Watched):
        net, callbacks = make("adam"), INTERVENTIONS[name]()
        fit(net, callbacks=callbacks, max_epochs=2, val_check_interval=3 if make is Watched else None)
        states.append((bits(weights(net)), str(callbacks[-1].state_dict()["engine"]["activations"])))
    assert states[0] == states[1]


def test_monitors_beside_an_intervention_change_nothing() -> None:
    outcomes = []
    for monitors in ([], [HessianSpectrumMonitor(probe_samples=12), FeatureRankMonitor(probe_samples=12)]):
        net, callbacks = Net("adam"), [*monitors, *INTERVENTIONS["cbp"](), *INTERVENTIONS["redo"](), tasks()]
        fit(net, callbacks=[*callbacks, ShrinkAndPerturb()], max_epochs=2)
        outcomes.append(bits(weights(net)))
    assert outcomes[0] == outcomes[1]


def test_beside_l2er_its_own_passes_do_not_count() -> None:
    class Reg(L2ERMixin, Net):
        rank_strength, rank_every_n_steps, l2_strength = 0.1, 2, 1e-3

    callback = ContinualBackprop(0.1, maturity=1)
    fit(Reg("adam"), callbacks=[callback], max_epochs=2)
    assert int(callback.state_dict()["engine"]["layers"]["net.0"]["num_reset"]) > 5


# ---- precision, networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("name", ["cbp, adaptable", "redo", "shrink, tasks", "all", "rigl"])
def test_precision(name: str, precision: str) -> None:
    net, before = Net("adam"), weights(Net("adam"))
    fit(net, callbacks=INTERVENTIONS[name](), max_epochs=2, precision=precision)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert weights(net).dtype == dtype
    assert bool(torch.isfinite(weights(net)).all())
    assert not torch.equal(weights(net).float(), before)


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("name", ["cbp", "redo"])
def test_networks_with_norms_pooling_and_validation(make: Any, name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 16), torch.randint(3, (24,))
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=6)
    module, callbacks = Validated(make()), INTERVENTIONS[name]()
    run = trainer(callbacks=callbacks, max_epochs=4)
    run.fit(module, loader, loader)
    totals = callbacks[0].state_dict()["engine"]
    resets = totals["num_reset"] if name == "redo" else {k: v["num_reset"] for k, v in totals["layers"].items()}
    assert set(resets) == ({"net.0", "net.2"} if make is mlp else {"net.1", "net.6"})
    assert sum(resets.values()) > 0
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


class Gan(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, *rest = (p for child in self.net for p in [list(child.parameters())] if p)
        return [torch.optim.Adam(first), torch.optim.SGD([p for own in rest for p in own], lr=0.1, momentum=0.9)]


def test_manual_optimization_with_two_optimizers_counts_batches() -> None:
    callback = ContinualBackprop(0.0, maturity=0)
    net = Gan()
    fit(net, callbacks=[callback])
    assert callback.state_dict()["engine"]["layers"]["net.0"]["age"].tolist() == [BATCHES] * 8


def test_layers_that_cannot_be_followed_are_named_once() -> None:
    class Recurrent(Net):
        def __init__(self, optimizer: str) -> None:
            super().__init__(optimizer)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
            self.rnn = nn.LSTM(4, 4)

        def loss(self, batch: Any) -> Any:
            return self.rnn(self.net(batch[0])[None])[0].square().mean()

    callback = ContinualBackprop(0.1, maturity=1)
    net = Recurrent("adam")
    with pytest.warns(UserWarning, match=r"net\.0: 6 units, read by net\.2\n(.|\n)*net\.2: left alone.*lstm"):
        fit(net, callbacks=[callback])
    fit(net, callbacks=[callback])  # not again
    fit(Recurrent("adam"), callbacks=[ContinualBackprop(layers=["net.0"])])
    fit(Recurrent("adam"), callbacks=[ReDo(wiring={"net.0": ["net.2"]})])
    with pytest.raises(ValueError, match=r"'net\.2' is no layer whose units can be reset(.|\n)*lstm"):
        fit(Recurrent("adam"), callbacks=[ContinualBackprop(layers=["net.2"])])
    with pytest.raises(ValueError, match=r"wiring: 'net\.5' is no module"):
        fit(Recurrent("adam"), callbacks=[ReDo(wiring={"net.5": ["net.2"]})])
    linear = Recurrent("adam")
    linear.net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"found no hidden layer to act on:\nnet\.0: left alone"):
        fit(linear, callbacks=[ContinualBackprop()])


# ---- boundaries ----------------------------------------------------------------------------------------------------


class Before(L.Callback):
    """The weights when a task starts and before its first update, and at its end."""

    def __init__(self) -> None:
        self.at_start: list[torch.Tensor] = []
        self.at_end: list[torch.Tensor] = []
        self.in_step: dict[int, torch.Tensor] = {}

    def on_task_start(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.at_start.append(weights(pl_module))

    def on_task_end(self, trainer: Any, pl_module: Any, task: int) -> None:
        self.at_end.append(weights(pl_module))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.in_step[trainer.global_step] = weights(pl_module)


@pytest.mark.parametrize("name", ["shrink, tasks", "head", "all"])
def test_boundaries_are_crossed_before_the_monitors_look_and_the_first_update(name: str) -> None:
    watch, net = Before(), Net("adam")
    fit(net, callbacks=[watch, *INTERVENTIONS[name]()], max_epochs=2)
    assert torch.equal(watch.in_step[0], weights(Net("adam")))  # nothing at the first task
    for task, step in ((1, 5), (2, 10), (3, 15)):
        old, new = watch.at_end[task - 1], watch.in_step[step]
        assert torch.equal(new, watch.at_start[task])
        assert not torch.equal(old, new)
        if name == "shrink, tasks":
            assert float((new - 0.8 * old).std()) == pytest.approx(0.01, rel=0.2)
        if name == "head":
            size = sum(p.numel() for p in net.net[-1].parameters())
            assert torch.equal(old[:-size], new[:-size])


def test_a_fit_for_each_task_is_a_boundary_too() -> None:
    callback, net = ShrinkAndPerturb(0.0, 0.0), Net()
    fit(net, callbacks=[callback])
    assert weights(net).any()
    watch = Before()
    fit(net, callbacks=[callback, watch], max_steps=1)
    assert not watch.at_start[0].any()
    assert watch.in_step[0].abs().max() == 0


# ---- logging, command line, settings, alerts -----------------------------------------------------------------------


def rows(directory: Path, key: str) -> dict[int, float]:
    with open(directory / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def test_how_many_units_were_reset_is_logged_over_fits(tmp_path: Path) -> None:
    callback, net = ContinualBackprop(0.1, maturity=1), Net("adam")
    logger = CSVLogger(tmp_path, name="", version="")
    for _ in range(2):
        fit(net, callbacks=[callback], logger=logger, log_every_n_steps=3)
    key = "plasticity/interventions/continual_backprop/units_reset"
    total, first = rows(tmp_path, key), rows(tmp_path, f"{key}/net.0")
    assert sorted(total) == [3, 6, 8, 11, 14, 16]
    layers = callback.state_dict()["engine"]["layers"]
    assert sum(first.values()) == layers["net.0"]["num_reset"]
    assert sum(total.values()) == sum(layer["num_reset"] for layer in layers.values()) > 10


def test_resets_of_layers_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Net(), callbacks=[tasks(), LayerReset(2), ShrinkAndPerturb()], logger=logger)
    assert rows(tmp_path, "plasticity/interventions/layer_reset/units_reset/net.2") == {5: 7.0}
    assert rows(tmp_path, "plasticity/interventions/layer_reset/units_reset") == {5: 10.0}
    assert rows(tmp_path, "plasticity/interventions/shrink_and_perturb/weights_changed") == {
        5: float(len(weights(Net())))
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has a new name in new versions
def test_the_command_line_builds_them() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[L.Callback])
    settings = {
        "ContinualBackprop": {"replacement_rate": 1e-3, "utility": "adaptable", "wiring": {"net.0": ["net.2"]}},
        "ReDo": {"tau": 0.025, "every_n_steps": 100, "layers": ["net.*"]},
        "ShrinkAndPerturb": {"shrink": 0.9999, "when": "step", "parameters": ["*.weight"]},
        "LayerReset": {"layers": 2, "init": "zero"},
    }
    config = [{"class_path": f"lightning_plasticity.{name}", "init_args": args} for name, args in settings.items()]
    built = parser.instantiate_classes(parser.parse_object({"callbacks": config})).callbacks
    for callback, (name, args) in zip(built, settings.items(), strict=True):
        assert type(callback).__name__ == name
        assert {key: getattr(callback, key) for key in args} == args
    for name in settings:
        defaults = [{"class_path": f"lightning_plasticity.{name}"}]
        assert len(parser.instantiate_classes(parser.parse_object({"callbacks": defaults})).callbacks) == 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda: ContinualBackprop(replacement_rate=2.0),
            "replacement_rate=2.0, expected a finite number >= 0 and <= 1",
        ),
        (lambda: ContinualBackprop(decay=1.0), "decay=1.0, expected a finite number >= 0 and < 1"),
        (lambda: ContinualBackprop(maturity=-1), "maturity=-1, expected a whole number >= 0"),
        (lambda: ContinualBackprop(utility="best"), "utility='best', expected one of"),  # type: ignore[arg-type]
        (lambda: ContinualBackprop(layers=["a"], wiring={"a": ["b"]}), "exclude each other"),
        (lambda: ContinualBackprop(layers="net.0"), "expected a list of names"),  # type: ignore[arg-type]
        (lambda: ReDo(tau=-0.1), "tau=-0.1"),
        (lambda: ReDo(every_n_steps=0), "every_n_steps=0, expected a whole number >= 1"),
        (lambda: ReDo(init="xavier"), "init='xavier'"),  # type: ignore[arg-type]
        (lambda: ShrinkAndPerturb(when="step"), "shrink=0.8 at every step leaves 2e-10"),
        (lambda: ShrinkAndPerturb(noise=float("nan")), "noise=nan"),
        (lambda: LayerReset("tail"), "layers='tail', expected 'head', 'all'"),
        (lambda: LayerReset(0), "layers=0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


class OnDemand(L.Callback):
    """Calls an intervention after the given steps."""

    def __init__(self, intervention: Any, *steps: int) -> None:
        self.intervention, self.steps = intervention, steps
        self.changed: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            before = weights(pl_module)
            self.intervention.intervene(trainer, pl_module)
            self.changed.append(not torch.equal(before, weights(pl_module)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContinualBackprop(0.0, maturity=1, intervene_fraction=0.3),
        lambda: ReDo(0.7, every_n_steps=None),
        lambda: ShrinkAndPerturb(when="call"),
        lambda: LayerReset("head", when="call"),
        lambda: LayerReset("all", when="call"),
    ],
)
def test_interventions_act_on_demand_and_only_then(make: Any) -> None:
    quiet, plain = Net("adam"), Net("adam")
    fit(quiet, callbacks=[tasks(), make()])
    fit(plain)
    assert torch.equal(weights(quiet), weights(plain))
    callback = make()
    demand = OnDemand(callback, 3, BATCHES)
    fit(Net("adam"), callbacks=[callback, demand])
    assert demand.changed == [True, True]


@pytest.mark.parametrize("make", [ContinualBackprop, ReDo, LayerReset])
def test_on_demand_before_any_batch_says_what_to_do(make: Any) -> None:
    with pytest.raises(RuntimeError, match="among the Trainer's callbacks"):
        make().intervene(trainer(), Net())


@pytest.mark.parametrize("phase", ["start", "end"])
@pytest.mark.parametrize("one_fit", [True, False])
def test_an_alert_brings_its_interventions_along(phase: Any, one_fit: bool) -> None:
    """They watch from the first batch, act when it says so, and have no schedule of their own."""
    remedies = [ReDo(0.7, every_n_steps=1), ShrinkAndPerturb(), ContinualBackprop(1.0, maturity=0), LayerReset("head")]
    acted: list[str] = []
    for remedy in remedies:
        original = remedy.intervene

        def intervene(run: Any, module: Any, original: Any = original, name: str = type(remedy).__name__) -> None:
            before = weights(module)
            original(run, module)
            if not torch.equal(before, weights(module)):
                acted.append(name)

        remedy.intervene = intervene  # type: ignore[method-assign]
    alert = PlasticityAlert(
        "plasticity/weights/norm", fraction=2.0, bad="high", from_task=1, on_alert=remedies, phase=phase
    )
    alert.fraction = 0.1  # always
    monitor, net = FeatureRankMonitor(probe_samples=12), Net("adam")
    callbacks = [tasks(), monitor, alert] if one_fit else [monitor, alert]
    if not one_fit:
        fit(net, callbacks=callbacks)  # the first task has nothing to be compared with
    with pytest.warns(UserWarning, match="Acting now: ReDo"):
        fit(net, callbacks=callbacks, max_epochs=2)
    if not one_fit:
        fit(net, callbacks=callbacks)
    assert len(alert.alerted) >= 2
    assert sorted(set(acted)) == ["ContinualBackprop", "LayerReset", "ReDo", "ShrinkAndPerturb"]
    assert all(acted.count(name) <= len(alert.alerted) for name in acted)


def test_outcome_of_a_fit_leaves_no_hooks_behind() -> None:
    net = Net("adam")
    run = fit(net, callbacks=[*INTERVENTIONS["cbp"](), *INTERVENTIONS["redo"]()])
    assert not any(child._forward_pre_hooks for child in net.modules())
    assert not run.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:.* followed through .* by other callbacks:UserWarning")  # another run
def test_what_one_trainers_alert_brought_along_keeps_its_schedule_in_another() -> None:
    remedy = ShrinkAndPerturb(0.0, 0.0)
    alert = PlasticityAlert("plasticity/weights/norm", bad="high", fraction=100.0, on_alert=remedy)
    quiet, plain = Net("adam"), Net("adam")
    fit(quiet, callbacks=[tasks(), FeatureRankMonitor(probe_samples=12), alert])
    fit(plain)
    assert torch.equal(weights(quiet), weights(plain))
    watch = Before()
    fit(quiet, callbacks=[TaskTracker(EveryNSteps(4)), watch, remedy])
    assert weights(plain).any()
    assert not watch.at_start[1].any()


def test_two_of_one_kind_that_a_checkpoint_could_not_tell_apart_are_refused() -> None:
    alert = PlasticityAlert(on_alert=ShrinkAndPerturb(noise=0.1))
    with pytest.raises(ValueError, match="Two callbacks ShrinkAndPerturb with equal settings"):
        fit(Net(), callbacks=[FeatureRankMonitor(probe_samples=12), ShrinkAndPerturb(), alert])
    both = ShrinkAndPerturb()
    fit(Net(), callbacks=[FeatureRankMonitor(probe_samples=12), both, PlasticityAlert(on_alert=both)])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old_weight_norm", "prune"])
@pytest.mark.parametrize("layers", ["all", "head", ["net.4"]])
def test_layers_whose_weights_are_computed_cannot_be_reset(kind: str, layers: Any) -> None:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        {
            "weight_norm": torch.nn.utils.parametrizations.weight_norm,
            "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
            "old_weight_norm": torch.nn.utils.weight_norm,
            "prune": lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5),
        }[kind](net.net[4])
    with pytest.raises(
        ValueError,
        match=r"net\.4\.weight: computed from other parameters|net\.4: left alone, it was not called as a layer",
    ):
        fit(net, callbacks=[LayerReset(layers)])
    fit(net, callbacks=[LayerReset(["net.0"])])
