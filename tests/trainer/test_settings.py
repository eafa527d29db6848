"""Settings of the Trainer: with every one of them a boundary is measured, and training is the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from runs import NETWORKS, Classifier, Validated, data, loader, mlp, monitors, same_with, trainer
from torch.nn import functional as F

from lightning_plasticity import EveryNEpochs, HessianSpectrumMonitor, Regularization, TaskTracker
from lightning_plasticity.curvature import hessian_spectrum


class Module(L.LightningDataModule):
    """Shuffled training data of five batches, and validation data."""

    def __init__(self) -> None:
        super().__init__()
        self.served = 0

    def train_dataloader(self) -> Any:
        self.served += 1
        return loader(self.served, samples=20, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(9)


def validated() -> L.LightningModule:
    return Validated(NETWORKS["conv"]())


def summary(watching: list[Any]) -> list[Any]:
    """Phases and failures; a value of each that is not there is a failure too."""
    return [
        (record.task, record.phase, record.failure if record.values else "no value")
        for monitor in watching
        for record in monitor.records
    ]


WHOLE = [(task, phase, None) for task in (0, 1) for phase in ("start", "end")] * 2

SETTINGS: list[dict[str, Any]] = [
    {"accumulate_grad_batches": 3, "max_epochs": 2},
    {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
    {"overfit_batches": 2, "max_epochs": 2},
    {"overfit_batches": 0.5},
    {"limit_train_batches": 2, "limit_val_batches": 0},
    {"limit_train_batches": 0.4, "limit_val_batches": 0.5, "max_epochs": 2},
    {"max_steps": 3, "max_epochs": -1},
    {"max_steps": 7, "max_time": "00:01:00:00"},
    {"min_epochs": 2, "min_steps": 7, "max_epochs": 3},
    {"fast_dev_run": True},
    {"fast_dev_run": 2},
    {"inference_mode": True, "val_check_interval": 2, "num_sanity_val_steps": 0},
    {"inference_mode": False, "val_check_interval": 0.4, "num_sanity_val_steps": -1},
    {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2},
    {"detect_anomaly": True, "deterministic": True, "profiler": "simple", "enable_progress_bar": True},
    {"benchmark": True, "profiler": "advanced", "use_distributed_sampler": False, "sync_batchnorm": True},
    {"logger": True, "log_every_n_steps": 2, "enable_model_summary": True, "enable_progress_bar": False},
]


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()))
def test_settings(settings: dict[str, Any]) -> None:
    watching = monitors()
    assert same_with(validated, lambda: [Module()], watching, **settings) == []
    assert summary(watching) == WHOLE[:2] * 2


def values(monitor: Any, record: int = 0) -> str:
    return repr(sorted(monitor.records[record].values.items()))


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """What the monitors find before the first step of a run without any setting."""
    torch.manual_seed(0)
    watching: list[Any] = monitors(when="start")
    trainer(watching).fit(validated(), Module())
    return [values(monitor) for monitor in watching]


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "overfit_batches" not in s][::3], ids=str)
def test_settings_change_no_number(settings: dict[str, Any], plain: list[str]) -> None:
    torch.manual_seed(0)
    watching: list[Any] = monitors(when="start")
    trainer(watching, **settings).fit(validated(), Module())
    assert [values(monitor) for monitor in watching] == plain


@pytest.mark.parametrize(
    ("settings", "samples"),
    [({"overfit_batches": 2}, 8), ({"limit_train_batches": 0.4}, 8), ({"limit_train_batches": 4}, 16), ({}, 18)],
    ids=str,
)
def test_samples_that_training_never_sees_are_left_out(settings: dict[str, Any], samples: int) -> None:
    class Copies(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
            inputs, labels = data(0, 18)
            pair = (inputs[:samples], labels[:samples])
            spectrum = hessian_spectrum(pl_module.net, torch.nn.CrossEntropyLoss(), pair)
            self.expected = spectrum.lambda_max().value

    monitor, copies = HessianSpectrumMonitor(("hessian",), on_error="raise"), Copies()
    trainer([monitor, copies], **settings).fit(Classifier(mlp()), loader(samples=18))
    found = monitor.records[0].values
    assert found["plasticity/hessian/num_samples"].value == samples
    assert found["plasticity/hessian/lambda_max"].value == pytest.approx(copies.expected, rel=1e-4)


def test_barebones() -> None:
    found = []
    for watching in ([], monitors()):
        torch.manual_seed(0)
        module = Classifier(NETWORKS["conv"]())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = L.Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=watching)
            run.fit(module, loader(shuffle=True))
        told = [str(warning.message) for warning in caught if "plasticity" in str(warning.message)]
        found.append([*module.state_dict().values(), torch.get_rng_state(), torch.tensor(module.losses)])
    assert all(map(torch.equal, *found))
    assert told == []
    assert summary(watching) == WHOLE[:2] * 2


# ---- several loaders -----------------------------------------------------------------------------------------------


class Several(Classifier):
    """Takes a batch of each loader, in a dict, a list or a tuple."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else batch
        losses = [F.cross_entropy(self.net(x), y) for x, y in (part for part in parts if part is not None)]
        self.log("loss", sum(losses))
        return torch.stack(losses).sum()


class Joined(Classifier):
    """The same with one loss over all of them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else batch
        columns = zip(*(part for part in parts if part is not None), strict=True)
        return super().training_step(tuple(map(torch.cat, columns)), batch_idx)


COLLECTIONS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"a": loader(0, shuffle=True), "b": loader(1, samples=20)},
    "list": lambda: [loader(0), loader(1, samples=20, shuffle=True)],
}


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size", None])
@pytest.mark.parametrize("kind", ["dict", "list"])
def test_several_loaders(kind: str, mode: Any) -> None:
    def tasks() -> list[Any]:
        made = [COLLECTIONS[kind]() for _ in range(2)]
        return [each if mode is None else CombinedLoader(each, mode) for each in made]

    watching = monitors()
    assert same_with(lambda: Joined(NETWORKS["conv"]()), tasks, watching, max_epochs=2) == []
    assert summary(watching) == WHOLE


def test_a_loss_for_each_loader_leaves_the_hessian() -> None:
    """Which of two losses the GGN shall be of is not ours to guess."""
    watching: list[Any] = monitors("warn")
    told = same_with(lambda: Several(mlp()), lambda: [COLLECTIONS["dict"]()], watching)
    assert len(told) == 1
    assert "ggn, ntk at the start of task 0: The training step calls several loss functions" in told[0]
    for record in watching[0].records:
        assert record.values["plasticity/hessian/trace"].resolved
    assert [record.failure for record in watching[1].records] == [None, None]


def test_several_loaders_are_measured_on_their_first_batch() -> None:
    class Copies(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                losses = lambda out, y: F.cross_entropy(out[:4], y[:4]) + F.cross_entropy(out[4:], y[4:])  # noqa: E731
                joined = tuple(torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True))
                self.expected = hessian_spectrum(pl_module.net, losses, joined)

    monitor, copies = HessianSpectrumMonitor(("hessian",), when="start", on_error="raise"), Copies()
    trainer([monitor, copies]).fit(Several(mlp()), COLLECTIONS["dict"]())
    found = monitor.records[0]
    assert found.settings["data"] == "first batch"
    expected = copies.expected.lambda_max().value
    assert found.values["plasticity/hessian/lambda_max"].value == pytest.approx(expected, rel=1e-4)


def test_sequential_loaders_are_refused_by_lightning_before_anything_is_measured() -> None:
    watching: list[Any] = monitors()
    with pytest.raises(ValueError, match="sequential"):
        trainer(watching).fit(Several(mlp()), CombinedLoader(COLLECTIONS["dict"](), "sequential"))
    assert summary(watching) == []


# ---- settings together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_tasks_within_one_fit_whose_loaders_are_made_anew(every: int) -> None:
    watching: list[Any] = [*monitors(), TaskTracker(EveryNEpochs(every))]
    settings: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every, "max_epochs": 2 * every}
    extra = lambda: [Regularization.l2er(rank_every_n_steps=2)]  # noqa: E731
    assert same_with(validated, lambda: [Module()], watching, extra, gradient_clip_val=0.1, **settings) == []
    assert summary(watching[:2]) == WHOLE
