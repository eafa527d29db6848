"""Loaders, Trainer settings, loggers, directories and arguments that are wrong or unusual: told early, or survived."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from runs import Classifier, Validated, data, loader, mlp, monitors, run_tasks, same_with
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from zoo import KINDS

from lightning_plasticity import (
    EveryNEpochs,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    Spectrum,
    TaskTracker,
    read_records,
)
from lightning_plasticity.callbacks.arguments import decimal
from lightning_plasticity.nn import is_measuring


def two() -> list[Any]:
    return [loader(0), loader(1)]


def classifier() -> L.LightningModule:
    return Classifier(mlp())


def failures(monitor: Any) -> list[Any]:
    return [record.failure for record in monitor.records]


# ---- loaders and Trainer settings ----------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*data(0), strict=True)


@pytest.mark.parametrize("given", [[], iter([]), DataLoader(TensorDataset(*data(0)), batch_size=4)])
def test_empty_and_exhausted_probe_data(given: Any) -> None:
    empty = not isinstance(given, DataLoader)
    if not empty:
        given = iter(given)
    monitor = HessianSpectrumMonitor(("ggn",), data=given, probe_samples=12)
    _, told = run_tasks(classifier, two(), [monitor])
    assert len(told) == 1
    assert "The probe data holds no batch" in told[0]
    assert [failure is None for failure in failures(monitor)] == [not empty, not empty, False, False]


@pytest.mark.filterwarnings("ignore:.*fit ended without a training step")
@pytest.mark.filterwarnings("ignore:.*Total length of .* is zero")
def test_an_empty_training_loader_is_not_measured() -> None:
    pair = monitors()
    run_tasks(classifier, [DataLoader(TensorDataset(torch.zeros(0, 16), torch.zeros(0)))], pair)
    assert [monitor.records for monitor in pair] == [[], []]  # type: ignore[attr-defined]


def test_a_fast_dev_run_writes_no_file(scratch_directory: Path) -> None:
    pair = monitors()
    assert same_with(classifier, two, pair, fast_dev_run=True) == []
    for monitor in pair:
        assert failures(monitor) == [None] * 4
    assert not list(scratch_directory.rglob("plasticity.jsonl"))


def test_streams_and_sanity_checks() -> None:
    class Module(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=4)

        def val_dataloader(self) -> Any:
            return loader(3)

    pair = monitors()
    assert same_with(lambda: Validated(mlp()), lambda: [Module(), Module()], pair, num_sanity_val_steps=2) == []
    for monitor in pair:
        assert [(r.task, r.phase) for r in monitor.records] == [  # type: ignore[attr-defined]
            (task, phase) for task in (0, 1) for phase in ("start", "end")
        ]


def test_a_task_of_frozen_dataclasses_that_goes_on_in_the_next_fit() -> None:
    (kind,) = [kind for kind in KINDS if kind.name == "frozen dataclass batch"]
    watching = [TaskTracker(EveryNEpochs(2)), *monitors()]
    assert same_with(kind.make_module, kind.make_loaders, watching) == []
    for monitor in watching[1:]:
        assert [(r.task, r.phase) for r in monitor.records] == [(0, "start"), (0, "end")]  # type: ignore[attr-defined]


# ---- files and loggers ---------------------------------------------------------------------------------------------


def test_a_save_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = same_with(classifier, two, [monitor := HessianSpectrumMonitor(("ggn",), save_dir=str(tmp_path / "file"))])
    assert len(told) == 1
    assert "HessianSpectrumMonitor could not write its record: " in told[0]
    assert "file" in told[0]
    assert failures(monitor) == [None] * 4
    with pytest.raises(OSError, match="file"):
        run_tasks(
            classifier, two(), [HessianSpectrumMonitor(save_dir=str(tmp_path / "file" / "below"), on_error="raise")]
        )


class OnlySaveDir(Logger):
    """As the loggers of services: one directory for all runs."""

    name, version, save_dir = "mine", None, None
    log_metrics = log_hyperparams = lambda self, *args, **kwargs: None

    def __init__(self, directory: Path, version: Any) -> None:
        super().__init__()
        self.save_dir, self.version = str(directory), version


@pytest.mark.parametrize(("version", "below"), [("abc", "abc"), (3, "version_3")])
def test_runs_of_a_logger_with_only_a_save_dir_have_their_own_directories(
    version: Any, below: str, tmp_path: Path
) -> None:
    monitor = HessianSpectrumMonitor(("ggn",))
    run_tasks(classifier, two(), [monitor], logger=OnlySaveDir(tmp_path, version))
    assert read_records(tmp_path / "mine" / below) == monitor.records


def test_records_of_later_versions_can_be_read(tmp_path: Path) -> None:
    monitor = HessianSpectrumMonitor(("ggn",), save_dir=str(tmp_path))
    run_tasks(classifier, two(), [monitor])
    file = tmp_path / "plasticity.jsonl"
    file.write_text(file.read_text().replace('{"monitor"', '{"invented": [1], "monitor"'))
    assert read_records(tmp_path) == monitor.records


class BrokenLogger(Logger):
    name, version = "broken", "0"
    log_hyperparams = lambda self, *args, **kwargs: None  # noqa: E731

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("plasticity") for key in metrics):
            raise ConnectionError("no network")


def test_a_broken_logger_hurts_nobody_else(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = HessianSpectrumMonitor(("ggn",))
    _, told = run_tasks(classifier, [loader()], [monitor], logger=[BrokenLogger(), logger])
    assert told == [
        "HessianSpectrumMonitor could not log to BrokenLogger: ConnectionError: no network. Training goes on."
    ]
    assert "plasticity/ggn/eps_rank_0.01" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert read_records(tmp_path) == monitor.records


def test_a_spectrum_that_cannot_be_saved_leaves_its_record_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Spectrum.save

    def full(spectrum: Spectrum, path: Any) -> None:
        if spectrum.matrix == "hessian":
            Path(path).write_bytes(b"PK")
            raise OSError(28, "No space left on device")
        save(spectrum, path)

    monkeypatch.setattr(Spectrum, "save", full)
    monitor = HessianSpectrumMonitor(("hessian", "ggn"), save_dir=str(tmp_path))
    (told,) = same_with(classifier, two, [monitor])
    assert "could not write its record: OSError: [Errno 28] No space left on device. Training goes on." in told
    assert failures(monitor) == [None] * 4
    assert read_records(tmp_path) == monitor.records
    files = [record.spectra["ggn"] for record in monitor.records]
    assert [list(record.spectra) for record in monitor.records] == [["ggn"]] * 4
    assert sorted(files) == sorted(f"spectra/{file.name}" for file in (tmp_path / "spectra").iterdir())


def test_a_record_that_cannot_be_written_knows_its_spectra(tmp_path: Path) -> None:
    (tmp_path / "plasticity.jsonl").mkdir()
    monitor = HessianSpectrumMonitor(("ggn",), save_dir=str(tmp_path))
    (told,) = same_with(classifier, two, [monitor])
    assert "could not write its record: IsADirectoryError" in told
    assert all((tmp_path / record.spectra["ggn"]).exists() for record in monitor.records)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Homeless(BrokenLogger):
    @property
    def log_dir(self) -> str:
        raise ConnectionError("no network")


def test_a_logger_that_does_not_know_its_directory_ends_no_run() -> None:
    monitor = HessianSpectrumMonitor(("ggn",))
    _, told = run_tasks(classifier, [loader()], [monitor], logger=[Homeless()], enable_checkpointing=False)
    assert [each.partition(" could not ")[2].partition(":")[0] for each in told] == [
        "write its record",
        "log to Homeless",
    ]
    assert failures(monitor) == [None] * 2


class SpeechlessLogger(BrokenLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("plasticity") for key in metrics):
            raise UnspeakableError


class Speechless(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if is_measuring():
            raise UnspeakableError
        return super().training_step(batch, batch_idx)


def test_an_error_whose_message_cannot_be_made_ends_no_run() -> None:
    monitor = HessianSpectrumMonitor(("ggn",))
    (told,) = same_with(lambda: Speechless(mlp()), two, [monitor])
    why = "UnspeakableError: its message cannot be read"
    assert f"could not measure ggn at the start of task 0: {why}. Training goes on." in told
    assert failures(monitor) == [f"ggn: {why}"] * 4
    monitor = HessianSpectrumMonitor(("ggn",))
    _, told_of_logger = run_tasks(classifier, two(), [monitor], logger=[SpeechlessLogger()])
    assert told_of_logger == [f"HessianSpectrumMonitor could not log to SpeechlessLogger: {why}. Training goes on."]
    assert failures(monitor) == [None] * 4


def test_an_error_without_a_message_is_told_by_its_name() -> None:
    class Mute(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if is_measuring():
                raise AssertionError
            return super().training_step(batch, batch_idx)

    (told,) = same_with(lambda: Mute(mlp()), two, [HessianSpectrumMonitor(("ggn",))])
    assert told.endswith(": AssertionError. Training goes on.")


# ---- arguments -----------------------------------------------------------------------------------------------------

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"probe_samples": 0}, r"probe_samples=0, expected a whole number >= 1\."),
    ({"probe_samples": 2.5}, r"probe_samples=2\.5, expected a whole number"),
    ({"probe_samples": True}, r"probe_samples=True, expected a whole number"),
    ({"every_n_tasks": 0}, r"every_n_tasks=0, expected a whole number >= 1"),
    ({"every_n_tasks": "2"}, r"every_n_tasks='2', expected a whole number"),
    ({"when": "middle"}, r"when='middle', expected 'start', 'end' or both, e\.g\. when=\('start', 'end'\)"),
    ({"when": ()}, r"when=\(\), expected 'start', 'end' or both"),
    ({"when": ("start", "stop")}, r"when=\('start', 'stop'\), expected"),
    ({"when": 3}, r"when=3, expected 'start', 'end' or both"),
    ({"on_error": "ignore"}, r"on_error='ignore', expected 'warn' \(record the failure, go on\) or 'raise'"),
    ({"name": "a b"}, r"name='a b', expected letters, digits and _ \(not 'end'\), or None"),
    ({"name": ""}, r"name='', expected letters"),
    ({"name": "end"}, r"name='end', expected letters"),
    ({"name": 3}, r"name=3, expected letters"),
    ({"mode": "train"}, r"mode='train', expected one of \('frozen', 'as_is', 'eval'\)"),
]
HESSIAN: list[tuple[dict[str, Any], str]] = [
    ({"quantities": ()}, r"quantities=\(\), expected some of \('ggn', 'hessian', 'ntk'\)"),
    ({"quantities": ("ggn", "fisher")}, r"quantities=\('ggn', 'fisher'\), expected some of"),
    ({"quantities": "kfac"}, r"quantities='kfac', expected some of"),
    ({"eps": (0.1, -1.0)}, r"eps=\(0\.1, -1\.0\), expected numbers >= 0, e\.g\. eps=\(1e-3, 1e-2\)"),
    ({"eps": "0.1"}, r"eps='0\.1', expected numbers"),
    ({"eps": None}, r"eps=None, expected numbers"),
    ({"relative_eps": (math.nan,)}, r"relative_eps=\(nan,\), expected numbers"),
    ({"relative_eps": (True,)}, r"relative_eps=\(True,\), expected numbers"),
    ({"num_steps": 0}, r"num_steps=0, expected a whole number >= 1"),
    ({"max_rows": 1.5}, r"max_rows=1\.5, expected a whole number >= 1"),
    ({"seed": "x"}, r"seed='x', expected a whole number >= 0"),
    ({"seed": -1}, r"seed=-1, expected a whole number >= 0"),
    ({"loss_fn": "cross_entropy"}, r"loss_fn='cross_entropy', expected a function .*cross_entropy"),
]
FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"layers": "net.1"}, r"layers='net\.1', expected a list of names such as \['net\.1'\], or None"),
    ({"layers": []}, r"layers=\[\], expected a list of names"),
    ({"conv": "pixels"}, r"conv='pixels' is unknown; expected 'positions' or 'flatten'"),
    ({"dormant_tau": (-0.1,)}, r"dormant_tau=\(-0\.1,\), expected numbers >= 0"),
    ({"dormant_tau": ("a",)}, r"dormant_tau=\('a',\), expected numbers >= 0"),
    ({"loss_fn": 3}, r"loss_fn=3, expected a function"),
]


@pytest.mark.parametrize(
    ("monitor", "arguments", "message"),
    [(HessianSpectrumMonitor, *case) for case in BOTH + HESSIAN]
    + [(FeatureRankMonitor, *case) for case in BOTH + FEATURES],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_at_construction(monitor: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor(**arguments)


def test_one_value_instead_of_several() -> None:
    monitor = HessianSpectrumMonitor("ggn", eps=0.5, relative_eps=0, when="end")
    assert (monitor.quantities, monitor.eps, monitor.relative_eps) == (("ggn",), (0.5,), (0.0,))
    assert monitor.when == ("end",)
    assert FeatureRankMonitor(dormant_tau=0.2).dormant_tau == (0.2,)


def test_numbers_in_keys_have_no_exponent() -> None:
    found = [decimal(number) for number in (1e-3, 0.01, 1.0, 10.0, 0.0, 1e-7, 0.025, 2)]
    assert found == ["0.001", "0.01", "1", "10", "0", "0.0000001", "0.025", "2"]
    assert decimal(1e-15) == "0.000000000000001"
