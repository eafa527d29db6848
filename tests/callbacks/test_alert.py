"""``PlasticityAlert``: what it compares with what, when it speaks, and what it starts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from small_fits import Net, batches, data, trainer, weights

from lightning_plasticity import (
    ContinualBackprop,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    PlasticityAlert,
    ReDo,
    TaskTracker,
    read_records,
)
from lightning_plasticity.callbacks.measurement import Measurement
from lightning_plasticity.callbacks.monitor import BoundaryMonitor
from lightning_plasticity.callbacks.schedules import EveryNEpochs
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.linalg import Estimate, srank

KEY = "plasticity/features/srank"


class Scripted(BoundaryMonitor):
    """Records what it was told to."""

    def __init__(self, values: list[float], fresh: list[float] | None = None, when: Any = "start") -> None:
        super().__init__(4, when, 1, None, "raise", None)
        self.values, self.fresh = values, fresh

    def measure(self, trainer: Any, pl_module: Any, batches: Any, phase: Any) -> Measurement:
        task = len([record for record in self.records if record.phase == phase])
        found = {KEY: Estimate.exactly(self.values[task])}
        if self.fresh is not None:
            found["plasticity/fresh/features/srank"] = Estimate.exactly(self.fresh[task])
        return Measurement(values=found)


class Note(L.Callback):
    """An intervention that only remembers when it was asked."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def intervene(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(pl_module.net[0].weight.detach().clone())
        with torch.no_grad():
            pl_module.net[0].weight.mul_(0.5)


def run(alert: PlasticityAlert, monitor: Scripted | None, **options: Any) -> list[str]:
    """One epoch per task; the alert's warnings."""
    tasks = len(monitor.values) if monitor is not None else 3
    monitors = [] if monitor is None else [monitor]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=tasks, callbacks=[alert, *monitors, TaskTracker(EveryNEpochs(1))], **options).fit(
            Net(), data()
        )
    return [str(entry.message) for entry in caught if "PlasticityAlert" in str(entry.message)]


def test_it_warns_once_when_the_measure_falls_and_again_after_a_recovery():
    alert = PlasticityAlert(fraction=0.9, from_task=2)
    said = run(alert, Scripted([10.0, 20.0, 18.5, 17.0, 5.0, 19.0, 3.0]))
    assert alert.alerted == [3, 4, 6]
    assert len(said) == 2
    assert "start of task 3" in said[0]
    assert "is 17, below 0.9 of the best so far, of task 1 (20)" in said[0]
    assert "on_alert=" in said[0]
    assert "start of task 6" in said[1]


def test_no_task_before_from_task_alerts():
    alert = PlasticityAlert(fraction=0.9, from_task=3)
    assert run(alert, Scripted([10.0, 1.0, 1.0])) == []
    assert alert.history == {0: 10.0, 1: 1.0, 2: 1.0}


def test_early_compares_with_the_mean_of_the_early_tasks():
    alert = PlasticityAlert(against="early", fraction=0.5, from_task=2)
    (said,) = run(alert, Scripted([10.0, 20.0, 7.6, 7.4]))
    assert alert.alerted == [3]
    assert "0.5 of the mean before task 2 (15)" in said


def test_fresh_compares_with_a_fresh_network_on_the_same_task():
    alert = PlasticityAlert(against="fresh", fraction=0.5, from_task=0)
    (said,) = run(alert, Scripted([10.0, 10.0, 10.0], fresh=[12.0, 21.0, 19.0]))
    assert alert.alerted == [1]
    assert "a fresh network (21)" in said


def test_high_values_may_be_the_bad_ones():
    alert = PlasticityAlert(bad="high", fraction=2.0, from_task=1)
    run(alert, Scripted([0.2, 0.1, 0.19, 0.21]))
    assert alert.alerted == [3]


def test_the_end_of_a_task_counts_where_asked():
    alert = PlasticityAlert(phase="end", fraction=0.9, from_task=1)
    run(alert, Scripted([10.0, 5.0], when="end"))
    assert alert.alerted == [1]


def test_what_the_module_logs_can_be_watched():
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("quality", 10.0 - 4.0 * self.current_epoch, on_step=False, on_epoch=True, batch_size=1)
            return super().training_step(batch, batch_idx)

    alert = PlasticityAlert("quality", phase="end", fraction=0.5, from_task=1)
    with pytest.warns(UserWarning, match="end of task 2: quality is 2, below"):
        trainer(max_epochs=3, callbacks=[alert, TaskTracker(EveryNEpochs(1))]).fit(Logging(), data())
    assert alert.history == {0: 10.0, 1: 6.0, 2: 2.0}


def test_it_starts_the_intervention_after_the_monitors_and_before_the_first_update():
    note, monitor = Note(), Scripted([10.0, 10.0, 1.0])
    alert = PlasticityAlert(fraction=0.9, from_task=1, on_alert=note)
    (said,) = run(alert, monitor)
    assert "Acting now: Note." in said
    assert len(note.weights) == 1
    plain = Net()
    trainer(max_epochs=2).fit(plain, data())
    assert torch.equal(note.weights[0], plain.net[0].weight)  # the weights as two tasks have left them
    assert [record.task for record in monitor.records] == [0, 1, 2]


def test_without_an_intervention_training_is_untouched():
    nets = [Net(), Net()]
    torch.manual_seed(0)
    trainer(max_epochs=3, callbacks=[TaskTracker(EveryNEpochs(1))]).fit(nets[0], data())
    torch.manual_seed(0)
    alert = PlasticityAlert(fraction=0.999, from_task=1)
    callbacks = [alert, FeatureRankMonitor(probe_samples=8), TaskTracker(EveryNEpochs(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(max_epochs=3, callbacks=callbacks).fit(nets[1], data())
    assert len(alert.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


def test_a_failed_measurement_is_passed_over():
    alert = PlasticityAlert(fraction=0.9, from_task=1)
    assert run(alert, Scripted([10.0, math.nan, 10.0])) == []
    assert alert.history == {0: 10.0, 2: 10.0}


def test_a_measure_that_nobody_records_is_named_once_with_those_that_exist():
    (said,) = run(PlasticityAlert("plasticity/features/rank"), Scripted([1.0, 1.0]))
    assert "'plasticity/features/rank'" in said
    assert f"Known there: {KEY}" in said
    (said,) = run(PlasticityAlert(), None)
    assert "add a monitor" in said


def test_alerts_are_logged_and_written(tmp_path):
    alert = PlasticityAlert(fraction=0.9, from_task=1)
    run(alert, Scripted([10.0, 10.0, 1.0]), logger=CSVLogger(tmp_path, name=None, version=""))
    records = [record for record in read_records(tmp_path) if record.monitor == "PlasticityAlert"]
    seen = [
        (r.task, r.values["plasticity/alert/active"].value, r.values["plasticity/alert/ratio"].value) for r in records
    ]
    assert seen == [(1, 0.0, 1.0), (2, 1.0, 0.1)]


def test_a_resumed_run_remembers_values_and_alerts(tmp_path):
    alert = PlasticityAlert(fraction=0.9, from_task=1)
    callbacks = [alert, Scripted([10.0, 5.0, 5.0, 5.0]), TaskTracker(EveryNEpochs(1))]
    first = trainer(max_epochs=2, callbacks=callbacks)
    with pytest.warns(UserWarning, match="PlasticityAlert"):
        first.fit(Net(), data())
    first.save_checkpoint(tmp_path / "run.ckpt")
    resumed = PlasticityAlert(fraction=0.9, from_task=1)
    callbacks = [resumed, Scripted([10.0, 5.0, 5.0, 5.0]), TaskTracker(EveryNEpochs(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the alert is on already: no new warning
        warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec|Checkpoint directory).*")
        trainer(max_epochs=4, callbacks=callbacks).fit(Net(), data(), ckpt_path=tmp_path / "run.ckpt")
    assert resumed.history == {0: 10.0, 1: 5.0, 2: 5.0, 3: 5.0}
    assert resumed.alerted == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"against": "worst"}, ValueError, "against='worst'"),
        ({"fraction": 1.2}, ValueError, "would alert at the reference itself"),
        ({"fraction": 0.5, "bad": "high"}, ValueError, "would alert at the reference itself"),
        ({"fraction": math.nan}, ValueError, "fraction=nan"),
        ({"measure": ""}, ValueError, "measure=''"),
        ({"from_task": 0}, ValueError, "from_task=0"),
        ({"phase": "middle"}, ValueError, "phase='middle'"),
        ({"on_alert": 3}, TypeError, "on_alert=3"),
        ({"on_alert": L.Callback()}, TypeError, "intervene"),
    ],
)
def test_bad_settings_are_refused(settings, error, part):
    with pytest.raises(error, match=part):
        PlasticityAlert(**settings)


def test_a_fresh_network_is_measured_beside_the_trained_one():
    """A network that has unlearned its features, and what the same layers hold when new."""
    spectra = HessianSpectrumMonitor(quantities="ggn", fresh_control=True, on_error="raise", when="start")
    features = FeatureRankMonitor(fresh_control=True, on_error="raise", when="start")
    alert = PlasticityAlert(against="fresh", fraction=0.9, from_task=0)
    net = Net()
    with torch.no_grad():
        net.net[0].weight.zero_()
        net.net[0].bias.fill_(1.0)  # every sample looks the same: one direction in each layer
    before = weights(net)
    with pytest.warns(UserWarning, match="below 0.9 of a fresh network"):
        trainer(max_steps=1, callbacks=[alert, features, spectra, Witness(before)]).fit(net, data())
    ((ranks,), (curvature,)) = features.records, spectra.records
    assert ranks.values[KEY].value == 1.0
    torch.manual_seed(0)
    fresh = Net().net
    for layer in reversed(list(fresh.modules())):
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    inputs, labels = (torch.cat(part) for part in zip(*batches(), strict=True))
    hidden = [torch.relu(fresh[0](inputs)), fresh[:4](inputs)]
    expected = [float(srank(layer.double())) for layer in hidden]
    assert ranks.values["plasticity/fresh/features/srank"].value == pytest.approx(sum(expected) / 2)
    spectrum = ggn_spectrum(fresh, torch.nn.functional.cross_entropy, (inputs, labels))
    found = curvature.values["plasticity/fresh/ggn/lambda_max"].value
    assert found == pytest.approx(spectrum.lambda_max().value, rel=1e-5)
    assert curvature.values["plasticity/ggn/lambda_max"].value != pytest.approx(found, rel=1e-2)


class Witness(L.Callback):
    """Refuses a first batch with other weights than before."""

    def __init__(self, before: torch.Tensor) -> None:
        self.before = before

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            assert torch.equal(weights(pl_module), self.before)


def test_a_network_that_cannot_be_initialised_anew_is_said_to_be_so():
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    features = FeatureRankMonitor(fresh_control=True, when="start")
    with pytest.warns(UserWarning, match=r"could not measure a fresh network .* No reset_parameters .* scale"):
        trainer(max_steps=1, callbacks=[features]).fit(Odd(), data())
    assert KEY in features.records[0].values


class Speechless(Logger):
    """Breaks on the alert, with an error that cannot say what it is."""

    name, version = "broken", 0
    log_hyperparams = lambda self, *args, **kwargs: None  # noqa: E731

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "plasticity/alert/ratio" in metrics:
            raise SpeechlessError


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_broken_logger_leaves_the_other_loggers_and_the_record(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    said = run(PlasticityAlert(from_task=1), Scripted([10.0, 10.0, 10.0]), logger=[Speechless(), logger])
    assert len(said) == 1  # of two tasks: the cause is the same
    assert set(said) == {"PlasticityAlert could not write what it saw: SpeechlessError: its message cannot be read. "
                         "Training goes on."}  # fmt: skip
    assert "plasticity/alert/ratio" in (tmp_path / "metrics.csv").read_text()
    assert [record.task for record in read_records(tmp_path) if record.monitor == "PlasticityAlert"] == [1, 2]


class HalfWay(Note):
    """Changes weights, then fails."""

    def intervene(self, trainer: Any, pl_module: Any) -> None:
        super().intervene(trainer, pl_module)
        raise RuntimeError("no memory left.")


def test_an_intervention_that_fails_is_told_once_and_training_goes_on():
    half, after = HalfWay(), Note()
    alert = PlasticityAlert(fraction=0.9, from_task=1, on_alert=[half, after])
    monitor = Scripted([10.0, 10.0, 1.0, 1.0, 10.0])
    said = [text for text in run(alert, monitor) if "HalfWay failed" in text]
    (text,) = said
    assert "HalfWay failed at the start of task 2: RuntimeError: no memory left. It may have changed" in text
    assert (len(half.weights), len(after.weights)) == (2, 2)  # asked again, and the others are asked too
    assert len(monitor.records) == 5


class Recurrent(Net):
    """No hidden layer whose units could be re-drawn."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = torch.nn.LSTM(4, 3)

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0])[0], batch[1])


@pytest.mark.parametrize("make", [ReDo, ContinualBackprop])
def test_an_intervention_on_demand_that_cannot_act_here_is_told_and_training_goes_on(make):
    alert = PlasticityAlert(fraction=0.9, from_task=1, on_alert=make())
    nets, monitor = [Recurrent(), Recurrent()], Scripted([10.0, 1.0, 1.0])
    trainer(max_epochs=3).fit(nets[0], data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [alert, monitor, TaskTracker(EveryNEpochs(1))]
        trainer(max_epochs=3, callbacks=callbacks).fit(nets[1], data())
    said = [str(entry.message) for entry in caught if make.__name__ in str(entry.message)]
    assert len([text for text in said if f"{make.__name__} cannot act when asked to: " in text]) == 1
    assert len([text for text in said if f"{make.__name__} failed" in text and "no hidden layer" in text]) == 1
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert alert.alerted == [1, 2]
    with pytest.raises(ValueError, match="no hidden layer"):  # asked for by its own schedule: as ever
        trainer(callbacks=[make()]).fit(Recurrent(), data())


def test_an_evaluation_from_an_older_checkpoint_leaves_the_history(tmp_path):
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    alert, net = PlasticityAlert(fraction=0.9, from_task=1), Validated()
    callbacks = [alert, Scripted([10.0, 10.0, 9.5]), TaskTracker(EveryNEpochs(1))]
    run = trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=callbacks)
    run.fit(net, data(), data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    run.fit_loop.max_epochs = 3
    run.fit(net, data(), data())
    run.validate(net, data(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert alert.history == {0: 10.0, 1: 10.0, 2: 9.5}


@pytest.mark.parametrize("name", [None, "a"])
def test_the_fresh_network_of_a_named_monitor_is_found(name):
    key = KEY if name is None else "plasticity/a/features/srank"
    alert = PlasticityAlert(key, against="fresh", fraction=0.01, from_task=0)
    monitor = FeatureRankMonitor(fresh_control=True, on_error="raise", when="start", name=name)
    heard = Heard()
    trainer(max_epochs=2, callbacks=[alert, monitor, TaskTracker(EveryNEpochs(1))], logger=heard).fit(Net(), data())
    controls = [value for found in monitor.records for at, value in found.values.items()
                if at.endswith("fresh/features/srank")]  # fmt: skip
    ratios = [
        record.values[key].value / control.value for record, control in zip(monitor.records, controls, strict=True)
    ]
    assert heard.ratios == ratios


class Heard(Logger):
    name, version = "heard", 0
    log_hyperparams = lambda self, *args, **kwargs: None  # noqa: E731

    def __init__(self) -> None:
        super().__init__()
        self.ratios: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "plasticity/alert/ratio" in metrics:
            self.ratios.append(metrics["plasticity/alert/ratio"])


def test_a_fresh_reference_that_nobody_measures_is_asked_for_once():
    (said,) = run(PlasticityAlert(against="fresh", from_task=0), Scripted([10.0, 10.0, 10.0]))
    assert "give the monitor fresh_control=True" in said


def test_an_idle_alert_costs_a_step_nothing():
    alert = PlasticityAlert()
    inside = ("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward",
              "on_before_optimizer_step", "on_before_zero_grad")  # fmt: skip
    assert [name for name in inside if callable(getattr(alert, name))] == []
    assert alert.state_key is alert.state_key
    assert PlasticityAlert(against="early").state_key != alert.state_key
