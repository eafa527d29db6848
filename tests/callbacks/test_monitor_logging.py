"""Where the numbers of monitors go: loggers, callback metrics, checkpoints, progress bars, command lines."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from runs import Classifier, Validated, loader, loading, mlp, monitors, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, Spectrum, TaskRecord, read_records
from lightning_plasticity.callbacks import hessian_monitor
from lightning_plasticity.callbacks import monitor as monitor_file
from lightning_plasticity.curvature import measure_hessian
from lightning_plasticity.loggers import spectra_figure

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")

KEY = "plasticity/ggn/eps_rank_0.01"


def fit(callbacks: list[Any], tasks: int = 2, **settings: Any) -> L.Trainer:
    torch.manual_seed(0)
    module = Classifier(mlp())
    for task in range(tasks):
        last = trainer(callbacks, **settings)
        last.fit(module, loader(task))
    return last


def test_tensorboard_shows_scalars_histograms_and_figures_over_cumulative_steps(tmp_path: Path) -> None:
    hessian, features = monitors()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit([hessian, features], logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    for monitor in (hessian, features):
        for key in monitor.records[0].values:  # type: ignore[attr-defined]
            for phase, tag, steps in (("start", key, [0, 3]), ("end", key.replace("y/", "y/end/", 1), [3, 6])):
                shown = [(event.step, event.value) for event in events.Scalars(tag)]
                kept = [r.values[key].value for r in monitor.records if r.phase == phase]  # type: ignore[attr-defined]
                assert shown == [
                    (step, pytest.approx(value, rel=1e-6)) for step, value in zip(steps, kept, strict=True)
                ]
    assert [(event.step, event.value) for event in events.Scalars("plasticity/task")] == [
        (0, 0.0), (0, 0.0), (3, 0.0), (3, 0.0), (3, 1.0), (3, 1.0), (6, 1.0), (6, 1.0),
    ]  # fmt: skip
    for matrix in ("ggn", "hessian", "ntk"):
        tag = f"plasticity/{matrix}/spectrum_log10"
        assert [event.step for event in events.Histograms(tag)] == [0, 3]
        assert [event.step for event in events.Histograms(tag.replace("y/", "y/end/", 1))] == [3, 6]
        assert [event.step for event in events.Images(f"plasticity/{matrix}/spectra")] == [0, 3]
    histogram = events.Histograms("plasticity/features/singular_values_log10/net.1")[0].histogram_value
    assert histogram.num == sum(histogram.bucket)
    assert 0 < histogram.num <= 8
    assert events.Scalars("accuracy")  # the user's own are there too
    assert (Path(logger.log_dir) / "plasticity.jsonl").exists()


def test_csv(tmp_path: Path) -> None:
    hessian, features = monitors()
    logger = CSVLogger(tmp_path, name="", version="")
    fit([hessian, features], logger=logger)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [(int(row["step"]), float(row[KEY])) for row in rows if row[KEY]]
    kept = [(r.step, r.values[KEY].value) for r in hessian.records if r.phase == "start"]  # type: ignore[attr-defined]
    assert shown == kept
    assert len(list((tmp_path / "spectra").iterdir())) == 12


def test_intervals_of_estimates_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = HessianSpectrumMonitor(("hessian",), num_steps=8, when="start", on_error="raise")
    estimate = partial(measure_hessian, method="lanczos")
    monkeypatch.setitem(HessianSpectrumMonitor._spectrum.__globals__, "measure_hessian", estimate)
    fit([monitor], 1, logger=CSVLogger(tmp_path, name="", version=""))
    trace = monitor.records[0].values["plasticity/hessian/trace"]
    assert trace.lower < trace.value < trace.upper
    with open(tmp_path / "metrics.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["plasticity/hessian/trace"])
    assert float(row["plasticity/hessian/trace_lower"]) == pytest.approx(trace.lower)
    assert float(row["plasticity/hessian/trace_upper"]) == pytest.approx(trace.upper)


def test_early_stopping_and_checkpoints_can_follow_a_key(tmp_path: Path) -> None:
    stop = EarlyStopping(KEY, mode="min", patience=1, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, filename="best", monitor=KEY, save_on_train_epoch_end=True)
    hessian, features = monitors()
    last = fit([hessian, features, stop, keep], 1, max_epochs=9, enable_checkpointing=True)
    value = hessian.records[0].values[KEY].value  # type: ignore[attr-defined]
    assert float(last.callback_metrics[KEY]) == value
    assert float(last.callback_metrics["plasticity/features/effective_rank"]) > 0
    assert last.current_epoch == 2
    assert keep.best_model_score is not None
    assert float(keep.best_model_score) == value


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_state_is_plain_and_a_resumed_run_continues_the_records(tmp_path: Path) -> None:
    pair = monitors()
    fit(pair, 1)
    run = trainer(pair)
    run.fit(Classifier(mlp()), loader(1))
    run.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]
    assert sum("Monitor" in key for key in state) == 2
    again = monitors()
    resumed = trainer(again, max_epochs=2)
    resumed.fit(Classifier(mlp()), loader(1), ckpt_path=tmp_path / "after.ckpt", **loading(weights_only=True))
    for before, after in zip(pair, again, strict=True):
        assert after.records[:4] == before.records  # type: ignore[attr-defined]
    fit(again, 1)
    for after in again:
        assert [r.task for r in after.records][4:] == [2, 2, 3, 3]  # type: ignore[attr-defined]


def test_the_figure_of_a_resumed_run_shows_the_tasks_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []

    def figure(spectra: dict[int, object], title: str) -> Figure:
        shown.append(sorted(spectra))
        return Figure()

    monkeypatch.setattr(hessian_monitor, "spectra_figure", figure)
    logger = TensorBoardLogger(tmp_path)
    one = [HessianSpectrumMonitor(quantities=("ggn",), when="start", probe_samples=8)]
    run = trainer(one, logger=logger)
    run.fit(Classifier(mlp()), loader(1))
    run.save_checkpoint(tmp_path / "after.ckpt")
    other = [HessianSpectrumMonitor(quantities=("ggn",), when="start", probe_samples=8)]
    resumed = trainer(other, max_epochs=2, logger=logger)
    resumed.fit(Classifier(mlp()), loader(1), ckpt_path=tmp_path / "after.ckpt", **loading(weights_only=True))
    trainer(other, logger=logger).fit(Classifier(mlp()), loader(1))
    assert shown[0] == [0]
    assert shown[-1][:2] == [0, 1]


def test_an_evaluation_does_not_roll_the_records_back(tmp_path: Path) -> None:
    pair = monitors()
    module = Validated(mlp())
    first = trainer(pair)
    first.fit(module, loader(), loader())
    first.save_checkpoint(tmp_path / "early.ckpt")
    trainer(pair).fit(module, loader(1), loader())
    before = [list(monitor.records) for monitor in pair]  # type: ignore[attr-defined]
    trainer(pair).validate(module, loader(), ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert [monitor.records for monitor in pair] == before  # type: ignore[attr-defined]


# ---- progress and command lines ------------------------------------------------------------------------------------


class Bar(ProgressBar):
    """The least that a progress bar of one's own has."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[str] = []

    def enable(self) -> None:
        pass

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.printed.append(" ".join(args))


def test_long_measurements_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, _ = monitors()
    bar = Bar()
    fit([hessian, bar], 1, enable_progress_bar=True)
    assert bar.printed == []
    monkeypatch.setattr(monitor_file, "LONG", 0.0)
    fit([hessian, bar], 1, enable_progress_bar=True)
    assert bar.printed == [
        "HessianSpectrumMonitor: measuring at the start of task 1, about 0 s",
        "HessianSpectrumMonitor: measured at the start of task 1 in 0 s",
        "HessianSpectrumMonitor: measuring at the end of task 1, about 0 s",
        "HessianSpectrumMonitor: measured at the end of task 1 in 0 s",
    ]
    fit([hessian], 1)  # no bar, no announcement


def test_a_first_measurement_that_may_be_long_is_announced_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, features = monitors()
    bar = Bar()
    monkeypatch.setattr(hessian_monitor, "LONG_WORK", 100.0)
    fit([hessian, features, bar], 2, enable_progress_bar=True)
    assert bar.printed == ["HessianSpectrumMonitor: measuring at the start of task 0, this may take a while"]


def test_figures_of_many_tasks_are_thinned() -> None:
    spectra = {task: Spectrum.from_eigenvalues(torch.tensor([1.0, 2.0]), 2) for task in range(0, 246, 2)}
    assert len(spectra) == 123
    (axes,) = spectra_figure(spectra, "many").axes
    assert len(axes.lines) == 50
    assert axes.lines[-1].get_label() == "task 244"
    (axes,) = spectra_figure({task: spectra[task] for task in (0, 2, 4)}, "few").axes
    assert [line.get_label() for line in axes.lines] == ["task 0", "task 2", "task 4"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # instantiate_classes has a new name in new versions
def test_jsonargparse_makes_monitors_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    hessian = {"quantities": ["ggn"], "eps": [0.5], "when": "start", "loss_fn": "torch.nn.functional.cross_entropy"}
    config = [
        {"class_path": "lightning_plasticity.HessianSpectrumMonitor", "init_args": hessian},
        {
            "class_path": "lightning_plasticity.FeatureRankMonitor",
            "init_args": {"layers": ["net.1"], "conv": "flatten"},
        },
        {"class_path": "lightning_plasticity.FeatureRankMonitor"},
    ]
    first, second, third = parser.instantiate_classes(parser.parse_object({"callbacks": config})).callbacks
    assert isinstance(first, HessianSpectrumMonitor)
    assert (first.quantities, first.eps, first.when) == (("ggn",), (0.5,), ("start",))
    assert first.loss_fn is torch.nn.functional.cross_entropy
    assert isinstance(second, FeatureRankMonitor)
    assert (second.layers, second.conv) == (["net.1"], "flatten")
    assert third.layers is None


def test_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    names = ["HessianSpectrumMonitor", "FeatureRankMonitor"]
    arguments = ["fit", "--trainer.fast_dev_run=true", "--trainer.enable_model_summary=false"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    arguments += [f"--trainer.callbacks+=lightning_plasticity.{name}" for name in names]
    arguments += ["--trainer.callbacks.layers=[layer.input]", "--trainer.callbacks.on_error=raise"]
    cli = LightningCLI(
        BoringModel, BoringDataModule, args=arguments, save_config_callback=None, seed_everything_default=False
    )
    found = {type(c).__name__: c for c in cli.trainer.callbacks}
    assert set(names) < set(found)
    assert found["FeatureRankMonitor"].layers == ["layer.input"]
    assert len(found["FeatureRankMonitor"].records) == 2


def test_records_say_which_versions_made_them(tmp_path: Path) -> None:
    monitor = FeatureRankMonitor(when="start", save_dir=str(tmp_path))
    fit([monitor], tasks=1)
    (record,) = read_records(tmp_path)
    assert record.versions["torch"] == torch.__version__.partition("+")[0]
    assert record.versions["lightning"] == L.__version__
    assert record == monitor.records[0]
    # Records of before that know none.
    plain = record.to_dict()
    del plain["versions"]
    assert TaskRecord.from_dict(plain).versions == {}
