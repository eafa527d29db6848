"""``TrainabilityProbe`` in whole fits: nothing changes, the module's own optimizers, failures, budgets, resuming."""

from __future__ import annotations

import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import NETWORKS, Classifier, Manual, csv_rows, fit_tasks, loader, mlp
from small_fits import BATCH, BATCHES, Net, data, fit, trainer, weights
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_plasticity import (
    L2,
    EveryNEpochs,
    L2Init,
    RegularizerMixin,
    TaskTracker,
    TrainabilityProbe,
    read_records,
)

PREFIX = "plasticity/trainability/"
KEYS = {
    "steps_to_target", "reached", "target_loss", "initial_loss", "best_loss", "final_loss", "area", "fresh_best_loss",
    "gap_to_fresh", "num_steps", "num_samples",
}  # fmt: skip


def probe(**settings: Any) -> TrainabilityProbe:
    return TrainabilityProbe(**{"num_steps": 5, "on_error": "raise", "seeds": 1, **settings})


def values(record: Any) -> dict[str, float]:
    return {key.removeprefix(PREFIX): estimate.value for key, estimate in record.values.items()}


# ---- nothing changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"optimizer_state": "carried", "linearized_time": 1.0}),
        ("conv", {"mode": "frozen", "seeds": 2}),
        ("lstm", {}),
        ("attention", {"target": "relative", "batch_size": 3}),
        ("manual", {"optimizer_state": "carried"}),
    ],
)
def test_a_run_with_a_probe_is_bit_identical(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    def make() -> L.LightningModule:
        return Manual(mlp()) if name == "manual" else Classifier(NETWORKS[name]())

    def tasks() -> list[Any]:
        return [loader(task, shuffle=True) for task in range(2)]

    clip = {} if name == "manual" else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    plain = fit_tasks(make, tasks(), [], tmp_path / "plain", max_epochs=2, **clip)
    watching = probe(when=("start", "end"), **settings)
    watched = fit_tasks(make, tasks(), [watching], tmp_path / "watched", max_epochs=2, **clip)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert [(r.task, r.phase, r.failure) for r in watching.records] == [
        (0, "start", None), (0, "end", None), (1, "start", None), (1, "end", None),
    ]  # fmt: skip
    assert csv_rows(tmp_path / "plain") == csv_rows(tmp_path / "watched")
    found = values(watching.records[2])
    assert found.keys() >= KEYS
    assert found["best_loss"] <= found["initial_loss"]


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    watching = probe(save_dir=str(tmp_path), target="absolute", tau=100.0, linearized_time=1.0)
    run = fit(Net(), callbacks=[watching])
    record = watching.records[0]
    linear = {"linearized_loss_ratio", "useful_share", "useful_directions"}
    assert {key.removeprefix(PREFIX) for key in record.values} == KEYS | linear
    assert run.callback_metrics[f"{PREFIX}steps_to_target"] == 0
    assert {key for key in run.callback_metrics if key.startswith(PREFIX)} == {PREFIX + key for key in KEYS | linear}
    (read,) = read_records(tmp_path)
    assert read.values == record.values
    steps, losses = read.settings["curves"]["present"][0]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert losses[0] == record.values[f"{PREFIX}initial_loss"].value
    assert set(read.settings["curves"]) == {"present", "fresh"}
    found = values(record)
    assert found["num_samples"] == BATCH * BATCHES
    assert 0 < found["linearized_loss_ratio"] < 1
    assert 0 < found["useful_share"] < 1
    docs = TrainabilityProbe.__doc__ or ""
    assert [key for key in KEYS | linear if f"``{PREFIX}{key}``" not in docs and f"``{key}``" not in docs] == []


# ---- the module's own optimizers -----------------------------------------------------------------------------------


class Whole(Net):
    """Every batch is the whole task, and every loss is kept."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen.append(float(loss.detach()))
        return loss


@pytest.mark.parametrize("state", ["carried", "fresh"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_carried_state_gives_the_losses_of_the_training_that_follows(state: Any, clip: float | None) -> None:
    """One fit, a boundary after four epochs of one batch each; the probe runs four steps ahead."""
    net, watching = Whole(), probe(num_steps=4, optimizer_state=state, data=None, fresh=False, target="absolute")
    whole = next(iter(DataLoader(data().dataset, batch_size=BATCH * BATCHES)))
    batches = DataLoader([tuple(whole)], batch_size=None)  # type: ignore[arg-type]
    watching.data = tuple(whole)
    trainer(callbacks=[TaskTracker(EveryNEpochs(4)), watching], max_epochs=9, gradient_clip_val=clip).fit(net, batches)
    (_, losses) = watching.records[1].settings["curves"]["present"][0]
    assert watching.records[1].step == 4
    assert (losses == net.seen[4:9]) is (state == "carried")
    assert losses[0] == net.seen[4]
    (_, first) = watching.records[0].settings["curves"]["present"][0]
    assert first == net.seen[:5]  # at the first task's start there is no state to carry


def test_a_given_optimizer_a_given_initialisation_and_own_data() -> None:
    given = next(iter(data(seed=4)))

    def constant(module: Net) -> None:
        for parameter in module.parameters():
            parameter.data.fill_(0.0)

    sgd = partial(torch.optim.SGD, lr=0.0)
    watching = probe(optimizer=sgd, fresh=constant, data=tuple(given), batch_size=2)
    fit(Net(), callbacks=[watching])
    found = values(watching.records[0])
    assert found["num_samples"] == BATCH
    assert found["fresh_best_loss"] == pytest.approx(math.log(3))
    assert found["initial_loss"] == found["final_loss"] == pytest.approx(float(Net().loss(given).detach()))


def test_penalties_of_the_mixin_are_left_out() -> None:
    class Reg(RegularizerMixin, Net):
        def configure_regularizers(self) -> Any:
            return [L2(1.0), L2Init(100.0)]

    found = []
    for net in (Net(), Reg()):
        watching = probe(seed=3)
        fit(net, callbacks=[watching], limit_train_batches=1)
        found.append(watching.records[0].values)
    assert found[0] == found[1]


# ---- failures ------------------------------------------------------------------------------------------------------


def told(net: L.LightningModule, watching: TrainabilityProbe, **settings: Any) -> list[str]:
    """Warnings of the probe during a fit that goes on regardless."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, callbacks=[watching], **settings)
    return [str(w.message) for w in caught if "TrainabilityProbe" in str(w.message)]


class WithGain(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))

    def loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.gain * self.net(batch[0]), batch[1])


def test_parameters_that_cannot_be_initialised_leave_the_rest() -> None:
    watching = probe(on_error="warn", when=("start", "end"))
    (warning,) = told(WithGain(), watching)
    assert "could not measure fresh networks at the start of task 0: No reset_parameters" in warning
    assert "sets gain;" in warning
    assert {key.removeprefix(PREFIX) for key in watching.records[0].values} == {
        "initial_loss", "best_loss", "final_loss", "area", "num_steps", "num_samples",
    }  # fmt: skip
    quiet = probe(target="relative", tau=0.99, fresh=False)
    assert told(WithGain(), quiet) == []
    assert values(quiet.records[0]).keys() == KEYS - {"fresh_best_loss", "gap_to_fresh"}


class Without(Net):
    def configure_optimizers(self) -> Any:
        return None


class WarmingUp(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TwoLosses(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class NotANumber(Net):
    def on_train_start(self) -> None:
        with torch.no_grad():
            self.net[0].weight.fill_(torch.nan)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Without, "has no optimizer .configure_optimizers returns none.; pass optimizer="),
        (TwoLosses, "2 optimizers and 2 losses, and which belongs to which is not known"),
        (NotANumber, "loss on the probe data is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_what_cannot_be_probed_is_told_once_and_training_goes_on(make: Any, match: str) -> None:
    net, plain, watching = make(), make(), probe(on_error="warn", when=("start", "end"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`LightningModule.configure_optimizers` returned `None`")
        fit(plain)
    (warning,) = told(net, watching)
    assert "could not measure trainability at the start of task 0" in warning
    assert "Training goes on" in warning
    (start, end) = watching.records
    assert start.failure is not None
    assert end.failure is not None
    assert re.search(match, start.failure)
    torch.testing.assert_close(weights(net), weights(plain), rtol=0, atol=0, equal_nan=True)


def test_a_warm_up_that_begins_at_zero_is_no_trainability() -> None:
    watching = probe(on_error="warn", when=("start", "end"))
    (warning,) = told(WarmingUp(), watching)
    assert "All learning rates are 0 at this moment" in warning
    start, end = watching.records
    assert start.failure is not None
    assert end.failure is None
    assert values(end)["best_loss"] < values(end)["initial_loss"]


def test_a_module_without_optimizer_is_probed_with_a_given_one() -> None:
    watching = probe(optimizer=partial(torch.optim.SGD, lr=0.1))
    assert told(Without(), watching) == []
    found = values(watching.records[0])
    assert found["best_loss"] < found["initial_loss"]


# ---- budget, state, settings ---------------------------------------------------------------------------------------


def test_a_short_time_cuts_the_steps_once_for_all_tasks(tmp_path: Path) -> None:
    watching = probe(num_steps=10**6, max_seconds=0.2)
    net = Net()
    fit(net, callbacks=[watching])
    watching.max_seconds = 1e-9  # the choice stands
    run = fit(net, callbacks=[watching])
    first, second = watching.records
    steps = first.values[f"{PREFIX}num_steps"].value
    assert 1 <= steps < 10**6
    assert second.values[f"{PREFIX}num_steps"].value == steps
    assert first.settings["budget"] == second.settings["budget"]
    assert "of 1000000 steps, to keep to 0.2 seconds" in first.settings["budget"]
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = probe(num_steps=10**6, max_seconds=0.2)
    trainer(callbacks=[resumed], max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert [r.to_dict() for r in resumed.records[:2]] == [r.to_dict() for r in watching.records]
    assert resumed.state_dict()["cut"][0] == steps


def test_resuming_inside_a_task_repeats_nothing(tmp_path: Path) -> None:
    def run(checkpoint: Any = None) -> TrainabilityProbe:
        watching = probe(when=("start", "end"))
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        whole = trainer(callbacks=[watching, saver], max_epochs=2, enable_checkpointing=True)
        whole.fit(Net(), data(), ckpt_path=checkpoint)
        return watching

    first, again = run(), run(tmp_path / "epoch=0.ckpt")
    assert [(r.task, r.phase) for r in again.records] == [(0, "start"), (0, "end")]
    for before, after in zip(first.records, again.records, strict=True):
        assert before.to_dict()["values"] == after.to_dict()["values"]


def test_two_probes_keep_their_states_apart() -> None:
    probes = [probe(), probe(num_steps=6), probe(target="relative"), probe(name="other"), probe(tau=0.2)]
    fit(Net(), callbacks=list(probes))
    assert len({watching.state_key for watching in probes}) == 5
    assert any(key.startswith("plasticity/other/trainability/") for key in probes[3].records[0].values)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"target": "best"}, "target='best'"),
        ({"optimizer_state": "kept"}, "optimizer_state='kept'"),
        ({"optimizer": "adam"}, "optimizer='adam', expected a function"),
        ({"linearized_time": 0.0}, "linearized_time=0.0"),
        ({"fresh": False}, "target='fresh' needs fresh runs"),
        ({"mode": "train"}, "mode='train'"),
        ({"when": "middle"}, "when='middle'"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainabilityProbe(**settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has a new name in new versions
def test_a_configuration_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--probe", type=L.Callback)
    arguments = {"num_steps": 7, "target": "relative", "tau": 0.5, "fresh": False, "when": ["start", "end"]}
    config: Any = {"class_path": "lightning_plasticity.TrainabilityProbe", "init_args": arguments}
    built = parser.instantiate_classes(parser.parse_object({"probe": config})).probe
    assert (built.num_steps, built.target, built.fresh, built.when) == (7, "relative", False, ("start", "end"))


def test_optimizers_of_other_parameters_than_the_measured_ones_are_told() -> None:
    """As under a sharded strategy, where the probe gets a whole copy of the module."""

    copy = Net()

    class Copied(TrainabilityProbe):
        def measure(self, trainer: Any, pl_module: Any, batches: Any, phase: Any) -> Any:
            return super().measure(trainer, copy, batches, phase)

    watching = Copied(num_steps=2, seeds=1)
    (warning,) = [str(w.message) for w in _warned(watching)]
    assert "step pieces of its weights, and what is measured is a whole copy; pass optimizer=" in warning
    given = Copied(num_steps=2, seeds=1, optimizer=torch.optim.Adam, on_error="raise")
    assert _warned(given) == []


def _warned(watching: TrainabilityProbe) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(), callbacks=[watching])
    return [w for w in caught if "could not measure" in str(w.message)]
