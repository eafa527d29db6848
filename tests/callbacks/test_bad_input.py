"""Whatever goes wrong in a measurement is told once and recorded, and training goes on bit for bit as without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from runs import Classifier, Make, loader, mlp, monitors, run_tasks, same_with, trainer
from states import changed, state
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import EveryNSteps, FeatureRankMonitor, HessianSpectrumMonitor, TaskTracker, TrainabilityProbe
from lightning_plasticity.curvature import MeasurementError
from lightning_plasticity.nn import is_measuring


def two() -> list[Any]:
    return [loader(0), loader(1)]


def classifier() -> L.LightningModule:
    return Classifier(mlp())


def failures(monitor: Any) -> list[Any]:
    return [record.failure for record in monitor.records]


# ---- networks and data that are hard but can be measured -----------------------------------------------------------


def dead() -> L.LightningModule:
    module = Classifier(mlp())
    with torch.no_grad():
        module.net[0].weight.zero_()
        module.net[0].bias.fill_(-1.0)
    return module


def test_a_dead_network_is_measured() -> None:
    hessian, features = monitors()
    assert same_with(dead, two, [hessian, features]) == []
    start = features.records[0].values  # type: ignore[attr-defined]
    assert start["plasticity/features/dead_units/net.1"].value == 1.0
    assert start["plasticity/features/effective_rank/net.1"].value == 0.0
    values = hessian.records[0].values  # type: ignore[attr-defined]
    assert values["plasticity/ggn/eps_rank_0.001"].value == 2.0  # what the last bias sees: classes - 1
    assert values["plasticity/ntk/eps_rank_0.001"].value > 0


def of(x: torch.Tensor, batch: int = 4) -> Callable[[], list[Any]]:
    y = torch.arange(len(x)) % 3
    return lambda: [DataLoader(TensorDataset(x, y), batch_size=batch) for _ in range(2)]


@pytest.mark.parametrize(
    "tasks",
    [
        of(torch.zeros(8, 16)),
        of(torch.ones(8, 16)),
        of(torch.full((8, 16), 1e-30)),
        of(torch.randn(1, 16)),
        of(torch.randn(4, 16), batch=1),
        of(torch.randn(5, 16), batch=100),
    ],
    ids=["zero", "constant", "tiny", "one sample", "batches of one", "batch above the data"],
)
def test_degenerate_data_are_measured(tasks: Any) -> None:
    pair = monitors()
    assert same_with(classifier, tasks, pair) == []
    for monitor in pair:
        assert failures(monitor) == [None] * 4
        for record in monitor.records:  # type: ignore[attr-defined]
            assert all(math.isfinite(estimate.value) for estimate in record.values.values())


# ---- what cannot be measured ---------------------------------------------------------------------------------------


def broken_weights() -> L.LightningModule:
    module = Classifier(mlp())
    module.net[2].weight.data[0, 0] = math.nan
    return module


class Skips(Classifier):
    """Sometimes, or on probe data always, there is nothing to learn from."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net(batch[0])
        return None


class OutOfMemory(Classifier):
    """Fails in every measurement, or only where more samples come than in training."""

    error: BaseException = RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.")
    limit = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if is_measuring() and len(batch[0]) > self.limit:
            self.net[0].weight.data.zero_()
            self.losses.append(1.0)
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "tasks", "cause", "parts"),
    [
        (broken_weights, two, "The loss on the probe data is nan", "ggn, hessian, ntk"),
        (classifier, of(torch.full((8, 16), math.nan)), "The loss on the probe data is nan", "ggn, hessian, ntk"),
        (classifier, of(torch.full((8, 16), math.inf)), "The loss on the probe data is nan", "ggn, hessian, ntk"),
        (lambda: OutOfMemory(mlp()), two, "RuntimeError: CUDA out of memory. Tried", "ggn, hessian, ntk"),
        (lambda: Skips(mlp()), two, "training_step returned no loss on the probe batch", "ggn, hessian, ntk"),
    ],
    ids=["nan weights", "nan data", "inf data", "out of memory", "no loss"],
)  # fmt: skip
def test_failures_are_recorded_and_told_once(make: Make, tasks: Any, cause: str, parts: str) -> None:
    monitor = HessianSpectrumMonitor(("ggn", "hessian", "ntk"), probe_samples=6)
    told = same_with(make, tasks, [monitor])
    assert len(told) == 1
    assert told[0].startswith(f"HessianSpectrumMonitor could not measure {parts} at the start of task 0: {cause}")
    assert told[0].endswith(". Training goes on.")
    assert [(r.task, r.phase) for r in monitor.records] == [(t, p) for t in (0, 1) for p in ("start", "end")]
    for record in monitor.records:
        assert record.failure is not None
        assert record.failure.startswith(f"{parts}: {cause}")
        assert not any(key.startswith("plasticity/ggn") for key in record.values)
        assert record.settings["data"].startswith("training dataset")


class OutOfMemoryForMany(OutOfMemory):
    limit = 4


def test_what_fails_for_many_samples_is_measured_in_batches_of_trainings_own_size() -> None:
    pair = HessianSpectrumMonitor(("ggn", "hessian"), probe_samples=6), FeatureRankMonitor(probe_samples=6)
    assert same_with(lambda: OutOfMemoryForMany(mlp()), two, list(pair)) == []
    for monitor in pair:
        assert failures(monitor) == [None] * 4
        sources = [record.settings["data"] for record in monitor.records]
        assert sources == ["training dataset, in batches of 4"] * 4
    assert pair[0].records[0].values["plasticity/ggn/num_samples"].value == 6


def test_a_failed_measurement_is_not_made_twice_for_nan() -> None:
    calls: list[int] = []

    class Counts(HessianSpectrumMonitor):
        def measure(self, trainer: Any, pl_module: Any, batches: Any, phase: Any) -> Any:
            calls.append(len(batches))
            return super().measure(trainer, pl_module, batches, phase)

    run_tasks(broken_weights, two(), [Counts(probe_samples=6)])
    assert calls == [1] * 4


class ScaledLoss(Classifier):
    """Fails with another number in the message each time."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.scale = 1.5

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if is_measuring():
            raise ValueError(f"loss of {self.scale} at step {-self.scale:e}")
        self.scale *= 3.7


def test_a_cause_with_other_numbers_is_told_once() -> None:
    monitor = HessianSpectrumMonitor(("ggn",), probe_samples=4)
    _, told = run_tasks(ScaledLoss, two(), [monitor])
    assert len(told) == 1
    assert len(set(failures(monitor))) > 1


def test_features_need_no_loss() -> None:
    monitor = FeatureRankMonitor()
    assert same_with(lambda: Skips(mlp()), two, [monitor]) == []
    assert failures(monitor) == [None] * 4


@pytest.mark.parametrize("make", [broken_weights, lambda: OutOfMemory(mlp())])
def test_features_fail_alone(make: Make) -> None:
    monitor = FeatureRankMonitor(probe_samples=6)
    told = same_with(make, two, [monitor])
    assert len(told) == 1
    assert all(failures(monitor))
    if make is broken_weights:
        assert "net.3: The features hold NaN or inf" in failures(monitor)[0]
        assert "plasticity/features/effective_rank/net.1" in monitor.records[0].values


class NothingToTrain(Classifier):
    """All frozen, with one parameter for the optimizer that the loss may or may not know."""

    def __init__(self, free: bool) -> None:
        super().__init__(mlp())
        self.requires_grad_(False)
        self.spare = nn.Parameter(torch.zeros(1), requires_grad=free)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.spare], lr=0.1)


@pytest.mark.parametrize(
    ("free", "cause"),
    [(True, "The loss does not depend on any trainable"), (False, "NothingToTrain has no trainable parameter")],
)
def test_nothing_to_train(free: bool, cause: str) -> None:
    hessian, features = HessianSpectrumMonitor(), FeatureRankMonitor()
    told = same_with(lambda: NothingToTrain(free), two, [hessian, features])
    assert len(told) == 1
    assert cause in told[0]
    assert all(f"ggn, hessian: {cause}" in failure for failure in failures(hessian))
    assert failures(features) == [None] * 4
    assert "plasticity/features/srank/net.3" in features.records[0].values


def test_later_tasks_are_measured_again() -> None:
    def tasks() -> list[Any]:
        good = loader(0)
        bad = DataLoader(TensorDataset(torch.full((8, 16), math.nan), torch.zeros(8, dtype=torch.long)), batch_size=4)
        return [good, bad, good]

    pair = monitors("warn")
    run_tasks(lambda: Guarded(mlp()), tasks(), pair)
    for monitor in pair:
        assert [failure is None for failure in failures(monitor)] == [True, True, False, False, True, True]


class Guarded(Classifier):
    """Survives a bad batch: skips it in training, but not when asked for its loss."""

    def curvature_loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if torch.isfinite(loss) else None


@pytest.mark.parametrize(
    ("monitor", "error", "match"),
    [
        (HessianSpectrumMonitor(on_error="raise"), MeasurementError, "ggn, hessian: The loss on the probe data is nan"),
        (FeatureRankMonitor(on_error="raise"), MeasurementError, "hold NaN or inf"),
    ],
)
def test_on_error_raise(monitor: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        run_tasks(broken_weights, two(), [monitor])


def test_an_unknown_layer_stops_before_training() -> None:
    with pytest.raises(ValueError, match=r"'net.9' matches no layer of Classifier.*exist: net, net.0"):
        run_tasks(classifier, two(), [FeatureRankMonitor(layers=["net.9"])])


def test_layers_that_cannot_be_measured_leave_the_others() -> None:
    monitor = FeatureRankMonitor(layers=["net.1", "accuracy", "spare"])

    def make() -> L.LightningModule:
        module = Classifier(mlp())
        module.spare = nn.Linear(1, 1)
        return module

    told = same_with(make, two, [monitor])
    assert len(told) == 2
    assert "could not measure accuracy at" in told[0]
    assert "have no feature dimension" in told[0]
    assert "could not measure spare at the start of task 0: The layer was not reached" in told[1]
    assert "plasticity/features/srank/net.1" in monitor.records[0].values


def test_a_network_without_hidden_layers() -> None:
    monitor = FeatureRankMonitor()
    told = same_with(lambda: Classifier(nn.Linear(16, 3)), two, [monitor])
    assert len(told) == 1
    assert "No hidden layer was found" in told[0]
    assert "else name layers with layers=[...]. Training goes on." in told[0]
    assert monitor.records[0].values["plasticity/weights/norm"].value > 0


# ---- interruptions -------------------------------------------------------------------------------------------------


class Interrupted(OutOfMemory):
    error = KeyboardInterrupt()


@pytest.mark.parametrize("make", [HessianSpectrumMonitor, FeatureRankMonitor])
@pytest.mark.filterwarnings("ignore:.*was interrupted by hand")
def test_interrupts_inside_measurements_leave_the_module_as_it_was(make: Any) -> None:
    torch.manual_seed(0)
    module = Interrupted(mlp())
    states: list[Any] = []

    class Before(L.Callback):
        def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
            states.append(state(pl_module))

        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            states.append(state(pl_module))

    with pytest.raises(SystemExit):
        trainer(
            [TaskTracker(EveryNSteps(9)), Before(), make(probe_samples=6), make(probe_samples=6, name="second")]
        ).fit(module, loader())
    before, after = states
    assert [key for key in changed(before, after) if "_current_fx_name" not in key] == []


# ---- layers without a shape ----------------------------------------------------------------------------------------


def lazy() -> L.LightningModule:
    return Classifier(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3)))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected:UserWarning")
def test_lazy_layers_are_left_to_training_and_measured_once_they_have_a_shape() -> None:
    found = [
        HessianSpectrumMonitor("ggn"),
        FeatureRankMonitor(),
        TrainabilityProbe(num_steps=2, seeds=1, when=("start", "end")),
    ]
    said = same_with(lazy, two, found)
    assert len(said) == 2  # of the two named monitors, once each, and nothing has changed
    assert all("lazy parameters" in text and "run one forward pass before fit" in text for text in said)
    for monitor in found:
        why, *others = failures(monitor)
        assert "(net.0.weight, net.0.bias, net.2.weight, ...)" in why
        assert others == [None] * 3


def test_a_progress_bar_that_breaks_does_not_end_the_run() -> None:
    class Broken(L.pytorch.callbacks.ProgressBar):
        is_enabled = True

        def print(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no terminal")

    monitor = FeatureRankMonitor(when="start")
    monitor.may_be_long = lambda pl_module: True  # type: ignore[method-assign]
    run = trainer([monitor, Broken()], enable_progress_bar=True)
    with pytest.warns(UserWarning, match="could not say that it measures: RuntimeError: no terminal"):
        run.fit(classifier(), loader(0))
    assert failures(monitor) == [None]
