"""What each logger holds after a run, read back from its files; services that are not installed are skipped."""

from __future__ import annotations

import csv
import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from runs import Classifier, loader, mlp, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, Spectrum
from lightning_plasticity.callbacks import hessian_monitor
from lightning_plasticity.loggers import log_histogram, log_image, takes_images

STEPS = [0, 3]  # cumulative; each Trainer counts from 0
SCALAR = "plasticity/ggn/eps_rank_0.01"
LAYERED = "plasticity/features/effective_rank/net.1"
MEAN = "plasticity/features/effective_rank"
HISTOGRAM = "plasticity/ggn/spectrum_log10"
FIGURE = "plasticity/ggn/spectra"


def fit(loggers: Any, **settings: Any) -> tuple[HessianSpectrumMonitor, FeatureRankMonitor]:
    """Two tasks, a Trainer each."""
    torch.manual_seed(0)
    hessian = HessianSpectrumMonitor(("ggn",), probe_samples=6, when="start", on_error="raise", **settings)
    features = FeatureRankMonitor(probe_samples=8, when="start", on_error="raise")
    module = Classifier(mlp())
    for task in range(len(STEPS)):
        trainer([hessian, features], logger=loggers).fit(module, loader(task))
    return hessian, features


def values(monitors: tuple[Any, Any], key: str) -> list[tuple[int, float]]:
    return [(r.step, r.values[key].value) for monitor in monitors for r in monitor.records if key in r.values]


def magnitudes(directory: Path, task: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """log10 |eigenvalue| of those that a histogram shows and how often each occurs, from the saved spectrum."""
    spectrum = Spectrum.load(directory / f"spectra/ggn_task{task:04d}_start.npz")
    sizes, counts = spectrum.eigenvalues.abs().double().numpy(), spectrum.counts.numpy()
    shown = sizes > max(spectrum.resolution, sizes.max() * 1e-8)
    return np.log10(sizes[shown]), counts[shown]


def is_picture(pixels: np.ndarray[Any, Any]) -> bool:
    """Wider than high, mostly white, with lines in it."""
    white = np.all(pixels[..., :3] == pixels.max(), axis=-1).mean()
    return pixels.shape[:2] == (450, 700) and 0.5 < white < 0.99


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


class Writer(Logger):
    """A logger around a summary writer, as Lightning's own is."""

    name = version = "x"
    log_hyperparams = None

    def __init__(self, experiment: Any) -> None:
        super().__init__()
        self._experiment = experiment

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for key, value in metrics.items():
            self.experiment.add_scalar(key, value, step)


def writer(backend: str, directory: Path) -> Any:
    if backend == "torch":
        return tensorboard.SummaryWriter(directory)
    return pytest.importorskip("tensorboardX").SummaryWriter(str(directory))


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"images": 0, "histograms": 0}).Reload()


def test_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitors = fit(logger)
    logger.experiment.flush()
    events = events_of(tmp_path)
    for key in (SCALAR, LAYERED):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in values(monitors, key)
        ]
    histograms = events.Histograms(HISTOGRAM)
    assert [event.step for event in histograms] == STEPS
    for task, event in enumerate(histograms):
        found, (logs, counts) = event.histogram_value, magnitudes(tmp_path, task)
        right = np.array(found.bucket_limit)
        edges = np.array([found.min, *right])
        assert np.allclose(np.diff(edges), 1 / 8)
        assert np.array_equal(edges * 8, np.round(edges * 8))  # the same grid at every task
        assert np.allclose(found.bucket, np.histogram(logs, edges, weights=counts)[0], atol=1e-9)
        assert found.num == pytest.approx(counts.sum())
        assert found.sum == pytest.approx((counts * logs).sum())
    images = events.Images(FIGURE)
    assert [event.step for event in images] == STEPS
    assert all(is_picture(imread(io.BytesIO(event.encoded_image_string))) for event in images)


@pytest.mark.parametrize("backend", ["torch", "tensorboardX"])
def test_a_collapse_is_a_ridge_in_both_backends(backend: str, tmp_path: Path) -> None:
    logger = Writer(writer(backend, tmp_path))
    for step, size in enumerate((1.0, 1e-2, 3e-5)):  # all of the spectrum falls by as much
        log_histogram(logger, "h", size * torch.tensor([1.5, 0.2, 0.0]), torch.tensor([3.0, 4.0, 90.0]), step)
    log_image(logger, "i", np.full((4, 6, 3), 7, dtype=np.uint8), 5)
    log_histogram(logger, "none", torch.zeros(3), torch.ones(3), 0)
    log_histogram(logger, "none", torch.zeros(0), torch.zeros(0), 0)
    logger.experiment.close()
    events = events_of(tmp_path)
    assert events.Tags()["histograms"] == ["h"]
    peaks = []
    for event in events.Histograms("h"):
        found = event.histogram_value
        assert found.num == 7
        filled = [(limit, count) for limit, count in zip(found.bucket_limit, found.bucket, strict=True) if count]
        assert [count for _, count in filled] == [4, 3]
        peaks.append([limit for limit, _ in filled])
    # Right edges of the bins of log10(0.2) = -0.699 and log10(1.5) = 0.176, then two and 4.52 decades lower.
    assert peaks == [[-0.625, 0.25], [-2.625, -1.75], [-5.125, -4.25]]
    (image,) = events.Images("i")
    assert image.step == 5
    assert np.array_equal(np.unique(np.round(imread(io.BytesIO(image.encoded_image_string)) * 255)), [7])


# ---- CSV and files -------------------------------------------------------------------------------------------------


def test_csv_has_figures_beside_it(tmp_path: Path) -> None:
    monitors = fit(CSVLogger(tmp_path, name="", version=""))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in (SCALAR, LAYERED):
        assert [(int(row["step"]), float(row[key])) for row in rows if row[key]] == values(monitors, key)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["ggn_spectra.png"]
    assert is_picture(imread(tmp_path / "figures/ggn_spectra.png"))
    assert len(list((tmp_path / "spectra").iterdir())) == 2


# ---- Weights & Biases ----------------------------------------------------------------------------------------------


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a transaction file: LevelDB's log format (blocks of 32 KiB, chunks of crc, length and type)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield Record.FromString(parts)
            parts = b""


def wandb_row(history: Any) -> dict[str, Any]:
    """Values by key; parts of a histogram or picture are stored one by one."""
    row: dict[str, Any] = {}
    for item in history.item:
        *groups, key = item.nested_key or [item.key]
        place = row
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = json.loads(item.value_json)
    return row


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    module = pytest.importorskip("wandb")
    yield module
    module.teardown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
def test_wandb_offline(wandb: Any, tmp_path: Path) -> None:
    settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off", disable_git=True)
    logger = WandbLogger(save_dir=tmp_path, project="p", version="abc", offline=True, settings=settings)
    monitors = fit(logger)
    files = Path(logger.experiment.dir)
    wandb.finish()
    (file,) = files.parent.glob("*.wandb")
    deadline = time.monotonic() + 30
    while not any(record.HasField("exit") for record in wandb_records(file)):  # its writer may lag behind finish()
        assert time.monotonic() < deadline, "wandb has not written the end of its file"
        time.sleep(0.1)
    records = list(wandb_records(file))
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "trainer/global_step"  # the x axis of all panels: what ``shown`` gives below
    rows = [wandb_row(record.history) for record in records if record.HasField("history")]

    def shown(key: str) -> list[tuple[int, Any]]:
        return [(row["trainer/global_step"], row[key]) for row in rows if key in row]

    for key in (SCALAR, LAYERED):
        assert shown(key) == values(monitors, key)
    histograms = shown(HISTOGRAM)
    assert [step for step, _ in histograms] == STEPS
    for task, (_, found) in enumerate(histograms):
        logs, counts = magnitudes(tmp_path / "p" / "abc", task)
        assert found["_type"] == "histogram"
        assert np.allclose(found["values"], np.histogram(logs, found["bins"], weights=counts)[0], atol=1e-9)
    images = shown(FIGURE)
    assert [step for step, _ in images] == STEPS
    assert all(is_picture(imread(files / name)) for _, found in images for name in found["filenames"])


# ---- MLflow --------------------------------------------------------------------------------------------------------


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("p", tracking_uri=f"file:{tmp_path}")
    monitors = fit(logger)
    client = logger.experiment
    # Of a number and its group only one can have the name: a file, or a directory.
    names = {key: key for key in (SCALAR, LAYERED, "plasticity/weights/norm/net.0")}
    for key, name in (names | {key: f"{key}_all" for key in (MEAN, "plasticity/weights/norm")}).items():
        history = client.get_metric_history(logger.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == values(monitors, key)
    (picture,) = client.list_artifacts(logger.run_id, "plasticity/ggn")
    assert picture.path == f"{FIGURE}.png"
    assert is_picture(imread(client.download_artifacts(logger.run_id, picture.path, str(tmp_path))))


# ---- a logger of one's own, none, several --------------------------------------------------------------------------


class Least(Logger):
    """The least that Lightning asks of a logger."""

    name = version = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Shows(Least):
    """With the method that W&B's logger has for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, Any, int | None]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.pictures.append((key, images, step))


class Breaks(Shows):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        raise OSError("full")


class Broken(Least):
    @property
    def experiment(self) -> Any:
        raise ConnectionError("no route")


def test_a_minimal_logger_gets_scalars_and_no_figure_is_drawn_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_monitor, "spectra_figure", None)  # to call it would raise
    logger = Least()
    monitors = fit(logger)
    for key in (SCALAR, LAYERED):
        assert [(step, row[key]) for step, row in logger.rows if key in row] == values(monitors, key)


def test_without_a_logger(tmp_path: Path) -> None:
    hessian, features = fit(False)
    assert [len(hessian.records), len(features.records)] == [2, 2]
    assert fit(False, save_dir=str(tmp_path))[0].records[1].values.keys() == hessian.records[1].values.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plasticity.jsonl", "spectra"]


def test_several_loggers_share_one_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = hessian_monitor.spectra_figure

    def figure(*args: Any) -> Any:
        drawn.append(args)
        return plain(*args)

    monkeypatch.setattr(hessian_monitor, "spectra_figure", figure)
    shows, least = Shows(), Least()
    monitors = fit([TensorBoardLogger(tmp_path / "a", "", ""), shows, CSVLogger(tmp_path / "b", "", ""), least])
    assert len(drawn) == len(monitors[0].records) == 2
    assert [(key, step) for key, _, step in shows.pictures] == [(FIGURE, step) for step in STEPS]
    assert np.array_equal(
        imread(tmp_path / "b/figures/ggn_spectra.png")[..., :3],
        shows.pictures[-1][1][0] / np.float32(255),
    )
    event = events_of(tmp_path / "a").Images(FIGURE)[-1]
    assert np.array_equal(
        imread(io.BytesIO(event.encoded_image_string))[..., :3], shows.pictures[-1][1][0] / np.float32(255)
    )
    assert [step for step, row in least.rows if SCALAR in row] == STEPS
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if "tfevents" not in path.name) == [
        "hparams.yaml", "plasticity.jsonl", "spectra",
    ]  # fmt: skip


def test_a_broken_experiment_costs_the_others_nothing() -> None:
    shows = Shows()
    assert takes_images(shows)
    assert not takes_images(Broken())
    monitor = HessianSpectrumMonitor(("ggn",), probe_samples=6, when="start")
    fails = Breaks()
    with pytest.warns(UserWarning, match="could not log to Breaks: OSError: full. Training goes on") as told:
        trainer([monitor], logger=[fails, shows]).fit(Classifier(mlp()), loader())
    assert len([warning for warning in told if "Breaks" in str(warning.message)]) == 1
    assert [step for step, row in fails.rows if SCALAR in row] == [0]  # numbers come before pictures
    assert [key for key, _, _ in shows.pictures] == [FIGURE]


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    own = plt.figure()
    before = plt.get_fignums(), mpl.get_backend(), dict(mpl.rcParams)
    fit(TensorBoardLogger(tmp_path, "", ""))
    assert (plt.get_fignums(), mpl.get_backend(), dict(mpl.rcParams)) == before
    assert plt.gcf() is own
    plt.close(own)
