"""What monitors measure, log, write and remember: the right numbers, under the documented keys, at every boundary."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from runs import Classifier, data, loader, mlp, monitors, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_plasticity import (
    EveryNEpochs,
    EveryNSteps,
    FeatureRankMonitor,
    HessianSpectrumMonitor,
    Spectrum,
    TaskTracker,
    linalg,
    read_records,
)
from lightning_plasticity.callbacks.arguments import decimal
from lightning_plasticity.callbacks.measurement import Measurement
from lightning_plasticity.callbacks.monitor import BoundaryMonitor
from lightning_plasticity.callbacks.probe_data import _spread, probe_batches
from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum, ntk_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")

KEY = "plasticity/ggn/eps_rank_0.01"


def fit(callbacks: list[Any], tasks: int = 2, module: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = Classifier(mlp()) if module is None else module
    for task in range(tasks):
        trainer(callbacks, **settings).fit(module, loader(task))
    return module


def both(**settings: Any) -> tuple[HessianSpectrumMonitor, FeatureRankMonitor]:
    first, second = monitors(**settings)
    assert isinstance(first, HessianSpectrumMonitor)
    assert isinstance(second, FeatureRankMonitor)
    return first, second


def boundaries(monitor: Any) -> list[tuple[int, str, int]]:
    return [(record.task, record.phase, record.step) for record in monitor.records]


# ---- keys ----------------------------------------------------------------------------------------------------------


def documented(monitor: Any, layers: tuple[str, ...], weights: tuple[str, ...]) -> set[str]:
    """The keys that the docstring promises, its placeholders filled in."""
    keys: set[str] = set()
    for line in re.findall(r"^    - (?!histograms)(.*)", type(monitor).__doc__, flags=re.MULTILINE):
        names = re.findall(r"``([^`]*)``", line.partition(":")[0])
        base = names[0].rpartition("/")[0]
        keys |= {name if "/" in name else f"{base}/{name}" for name in names}
        keys |= set(re.findall(r"``(plasticity/[^`]*)``", line))
    found: set[str] = set()
    for key in keys:
        filled = {key.replace("/m/", f"/{m}/") for m in ("ggn", "hessian", "ntk")}
        if "eps_rank" in key:
            eps = monitor.relative_eps if "relative" in key else monitor.eps
            filled = {f.replace("<eps>", decimal(e)) for f in filled for e in eps}
        if "<tau>" in key:
            filled = {f.replace("<tau>", decimal(t)) for f in filled for t in monitor.dormant_tau}
        own = weights if "weights" in key else layers
        found |= {f.replace("<layer>", layer) for f in filled for layer in own}
        if "features" in key:  # and the mean over layers
            found |= {f.removesuffix("/<layer>") for f in filled}
    return {k for k in found if "negative_fraction" not in k or "hessian" in k}


def test_logged_keys_are_exactly_the_documented_ones(tmp_path: Path) -> None:
    for one in both(save_dir=str(tmp_path)):
        module = fit([one], 1)
        weights = tuple(name.removesuffix(".weight") for name, p in module.named_parameters() if p.ndim == 2)
        expected = documented(one, ("net.1", "net.3"), weights)
        start, end = one.records
        assert set(start.values) | {"plasticity/task"} == expected
        assert set(end.values) == set(start.values)
        assert len(expected) > 15
        assert all(re.fullmatch(r"[A-Za-z0-9_./]+", key) for key in expected)


# ---- records and files ---------------------------------------------------------------------------------------------


def test_records_in_memory_are_those_on_disk(tmp_path: Path) -> None:
    hessian, features = both(save_dir=str(tmp_path))
    fit([hessian, features], 3)
    assert boundaries(hessian) == boundaries(features)
    assert boundaries(hessian) == [(t, p, 3 * (t + (p == "end"))) for t in range(3) for p in ("start", "end")]
    found = read_records(tmp_path)
    assert [r for r in found if r.monitor == "HessianSpectrumMonitor"] == hessian.records
    assert [r for r in found if r.monitor == "FeatureRankMonitor"] == features.records
    assert read_records(tmp_path / "plasticity.jsonl") == found
    for record in hessian.records:
        for matrix, name in record.spectra.items():
            spectrum = Spectrum.load(tmp_path / name)
            assert spectrum.matrix == matrix
            assert spectrum.epsilon_rank(0.01) == record.values[f"plasticity/{matrix}/eps_rank_0.01"]
    assert len(list((tmp_path / "spectra").iterdir())) == 18


def test_two_monitors_of_one_class_in_one_directory(tmp_path: Path) -> None:
    pair = [
        HessianSpectrumMonitor(("ggn",), mode="frozen", save_dir=str(tmp_path)),
        HessianSpectrumMonitor(("ggn",), mode="eval", save_dir=str(tmp_path)),
    ]
    fit(pair, 1)
    assert [record for monitor in pair for record in monitor.records] == sorted(
        read_records(tmp_path), key=lambda record: record.settings["mode"] == "eval"
    )
    assert len({name for monitor in pair for record in monitor.records for name in record.spectra.values()}) == 4


def test_a_line_cut_short_costs_only_itself(tmp_path: Path) -> None:
    hessian, _ = both(save_dir=str(tmp_path), when="start")
    fit([hessian], 1)
    file = tmp_path / "plasticity.jsonl"
    file.write_text(file.read_text() + '{"monitor": "Hess')
    fit([hessian], 1)
    assert read_records(tmp_path) == hessian.records
    assert len(hessian.records) == 2
    with pytest.raises(FileNotFoundError, match=r"No plasticity.jsonl at .*pass a run's log directory"):
        read_records(tmp_path / "nowhere")


def test_without_a_logger_nothing_is_written(scratch_directory: Path) -> None:
    pair = both()
    fit([*pair])
    assert [len(monitor.records) for monitor in pair] == [4, 4]
    assert list(scratch_directory.iterdir()) == []


def test_every_n_tasks_and_when() -> None:
    hessian, features = both(every_n_tasks=2)
    only_end = HessianSpectrumMonitor(("ggn",), when="end", eps=(0.5,))
    fit([hessian, features, only_end], 3)
    assert [r[:2] for r in boundaries(hessian)] == [(0, "start"), (0, "end"), (2, "start"), (2, "end")]
    assert boundaries(features) == boundaries(hessian)
    assert [r[:2] for r in boundaries(only_end)] == [(0, "end"), (1, "end"), (2, "end")]


def test_monitors_share_one_tracker_also_the_users() -> None:
    hessian, features = both(when="start")
    mine = TaskTracker(EveryNSteps(2))
    run = trainer([hessian, features, mine], max_epochs=2)
    run.fit(Classifier(mlp()), loader())
    assert [c for c in run.callbacks if isinstance(c, TaskTracker)] == [mine]  # type: ignore[attr-defined]
    assert boundaries(hessian) == boundaries(features) == [(k, "start", 2 * k) for k in range(3)]
    run = trainer(list(both()))
    run.fit(Classifier(mlp()), loader())
    assert sum(isinstance(c, TaskTracker) for c in run.callbacks) == 1  # type: ignore[attr-defined]


# ---- probe data ----------------------------------------------------------------------------------------------------


class Noting(BoundaryMonitor):
    """Keeps the samples that it is asked to measure on."""

    def __init__(self, given: Any = None, samples: int = 6, when: Any = ("start", "end")) -> None:
        super().__init__(samples, when, 1, given, "raise", None)
        self.seen: list[Any] = []

    def measure(self, trainer: Any, pl_module: Any, batches: list[Any], phase: Any) -> Any:
        self.seen.append([tuple(batch) for batch in batches])
        return Measurement()


def spread(total: int, count: int) -> list[int]:
    """The documented choice: evenly spread, in an order shuffled by a fixed seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [k * total // count for k in order]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*data(0), strict=True)


X, Y = data(7)
SOURCES: dict[str, tuple[Any, Any]] = {
    "batch": ((X, Y), X),
    "list batch": ([X, Y], X),
    "dataset": (TensorDataset(X, Y), X[spread(12, 6)]),
    "loader": (DataLoader(TensorDataset(X, Y), batch_size=4), X[:8]),
    "list of batches": ([(X[:4], Y[:4]), (X[4:9], Y[4:9])], X[:9]),
    "callable": (lambda trainer, module: (X + module.net[0].weight.detach()[0, 0] * 0, Y), X),
    "callable loader": (lambda trainer, module: loader(7), X[:8]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_given_probe_data(name: str) -> None:
    given, expected = SOURCES[name]
    noting = Noting(given)
    fit([noting], 1)
    for seen in noting.seen:
        assert torch.equal(torch.cat([x for x, _ in seen]), expected)
    assert [record.settings["data"] for record in noting.records] == ["given", "given"]


@pytest.mark.filterwarnings("ignore:.* followed through .* by other callbacks:UserWarning")  # they take turns
@pytest.mark.parametrize("when", ["start", "end", ("start", "end")])
def test_the_tasks_own_data_the_same_at_start_and_end(when: Any) -> None:
    noting, streaming = Noting(when=when), Noting(when=when)
    torch.manual_seed(0)
    module = Classifier(mlp())
    for task in range(2):
        trainer([noting]).fit(module, loader(task, shuffle=True))
        trainer([streaming]).fit(module, DataLoader(Stream(), batch_size=4))
    times = 1 if isinstance(when, str) else 2
    for task in range(2):
        for seen in noting.seen[task * times : (task + 1) * times]:
            assert torch.equal(torch.cat([x for x, _ in seen]), data(task)[0][spread(12, 6)])
    assert [record.settings["data"] for record in noting.records] == ["training dataset"] * 2 * times
    for seen in streaming.seen:
        assert torch.equal(seen[0][0], data(0)[0][:4])
    assert [record.settings["data"] for record in streaming.records] == ["first batch"] * 2 * times


def test_many_samples_come_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe_batches.__globals__, "CHUNK", 5)
    noting = Noting(samples=9)
    fit([noting], 1)
    assert [len(x) for x, _ in noting.seen[0]] == [5, 4]
    expected = data(0)[0][spread(12, 9)]
    assert torch.equal(torch.cat([x for x, _ in noting.seen[0]]), expected)


def test_a_task_over_two_fits_ends_on_the_samples_that_it_began_with() -> None:
    noting, tracker = Noting(), TaskTracker(EveryNEpochs(2))
    module = Classifier(mlp())
    for part in range(2):
        trainer([noting, tracker]).fit(module, loader(part))
    assert [(task, phase) for task, phase, _ in boundaries(noting)] == [(0, "start"), (0, "end")]
    assert torch.equal(noting.seen[0][0][0], noting.seen[1][0][0])


class CutError(Exception):
    pass


def test_after_a_cut_task_the_next_one_has_its_own_samples() -> None:
    class Cut(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            raise CutError

    noting = Noting()
    with pytest.raises(CutError):
        trainer([noting]).fit(Cut(mlp()), loader(0))
    trainer([noting]).fit(Classifier(mlp()), loader(1))
    for seen, task in zip(noting.seen, (0, 1, 1), strict=True):
        assert torch.equal(seen[0][0], data(task)[0][spread(12, 6)])


class Ragged(Dataset[Any]):
    """Samples of different lengths."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return X[index][: 10 + index], Y[index]


class Padding(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((F.pad(batch[0], (0, 16 - batch[0].shape[1])), batch[1]), batch_idx)


def test_samples_that_cannot_be_collated_come_in_batches_of_the_loaders_size() -> None:
    noting, pair = Noting(), both()
    loaded = DataLoader(Ragged(), batch_size=1)
    trainer([noting, *pair]).fit(Padding(mlp()), loaded)
    assert [len(x) for x, _ in noting.seen[0]] == [1] * 6
    for monitor in (noting, *pair):
        assert [r.settings["data"] for r in monitor.records] == ["training dataset, in batches of 1"] * 2
        assert [r.failure for r in monitor.records] == [None, None]


def test_samples_that_cannot_be_fetched_again_leave_the_first_batch() -> None:
    class Once(Ragged):
        served = 0

        def __getitem__(self, index: int) -> Any:
            Once.served += 1
            assert Once.served <= 1
            return X[index], Y[index]

    noting = Noting(when="start")
    trainer([noting], limit_train_batches=1).fit(Classifier(mlp()), DataLoader(Once(), batch_size=1))
    assert torch.equal(noting.seen[0][0][0], X[:1])
    assert noting.records[0].settings["data"] == "first batch"


class OnlyMany:
    def __len__(self) -> int:
        return 12

    def __getitems__(self, indices: list[int]) -> Any:
        return [(X[index], Y[index]) for index in indices]


def test_a_dataset_with_only_getitems() -> None:
    noting = Noting()
    trainer([noting]).fit(Classifier(mlp()), DataLoader(OnlyMany(), batch_size=4))  # type: ignore[arg-type]
    assert torch.equal(noting.seen[0][0][0], X[spread(12, 6)])
    assert noting.records[0].settings["data"] == "training dataset"


def test_what_a_batch_sampler_holds_out_is_not_measured() -> None:
    sampler = BatchSampler(SubsetRandomSampler(range(6, 12)), 2, drop_last=False)
    noting = Noting()
    trainer([noting]).fit(Classifier(mlp()), DataLoader(TensorDataset(X, Y), batch_sampler=sampler))
    assert torch.equal(noting.seen[0][0][0], X[6:][spread(6, 6)])


# ---- names ---------------------------------------------------------------------------------------------------------


def test_monitors_that_differ_in_their_data_have_names(tmp_path: Path) -> None:
    held_out = TensorDataset(*data(9))
    given: list[dict[str, Any]] = [{}, {"name": "val", "data": held_out}]
    four = [both(save_dir=str(tmp_path), **settings) for settings in given]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = fit([monitor for pair in four for monitor in pair], 2, logger=logger)
    assert isinstance(module, Classifier)
    for plain, named in zip(*four, strict=True):
        assert "name" not in plain.state_key
        assert "'name': 'val'" in named.state_key
        keys = [key.replace("plasticity/", "plasticity/val/", 1) for key in plain.records[0].values]
        assert list(named.records[0].values) == keys
        assert list(named.records[0].values.values()) != list(plain.records[0].values.values())
    hessian = four[1][0]
    assert hessian.records[0].spectra["ggn"] == "spectra/val_ggn_task0000_start.npz"
    assert sorted(read_records(tmp_path), key=str) == sorted((r for p in four for m in p for r in m.records), key=str)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert {"plasticity/val/ggn/trace", "plasticity/end/val/ggn/trace"} < set(events.Tags()["scalars"])
    assert "plasticity/val/ggn/spectra" in events.Tags()["images"]
    assert "plasticity/val/features/singular_values_log10/net.1" in events.Tags()["histograms"]


def test_names_that_would_be_equal_as_keys_are_numbered() -> None:
    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.parts = nn.ModuleDict({"a-b": nn.ReLU(), "a_b": nn.Linear(16, 16), "a b": nn.Linear(16, 16)})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0]
            for part in self.parts.values():
                x = part(x)
            return super().training_step((x, batch[1]), batch_idx)

    monitor = FeatureRankMonitor(["parts.*"], 6, "start", "raise")
    fit([monitor], 1, Twice())
    found = set(monitor.records[0].values)
    assert {f"plasticity/features/srank/parts.{tag}" for tag in ("a_b", "a_b_2", "a_b_3")} < found
    assert {f"plasticity/weights/norm/parts.{tag}" for tag in ("a_b", "a_b_2")} < found


@pytest.mark.parametrize(("max_rows", "method"), [(12, "lanczos"), (1500, "gram")])
def test_the_ggn_is_estimated_on_all_samples_where_too_few_fit(max_rows: int, method: str) -> None:
    monitor = HessianSpectrumMonitor(("ggn",), max_rows=max_rows)
    fit([monitor])
    for record in monitor.records:
        settings = record.settings["ggn"]
        assert (settings["method"], settings["num_samples"]) == (method, 12)


# ---- values --------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_functions_and_of_brute_force() -> None:
    x, y = data(3, 8)
    x = x.double()
    settings: Any = {"data": (x, y), "when": "start", "on_error": "raise"}
    hessian = HessianSpectrumMonitor(("ggn", "hessian", "ntk"), **settings)
    features = FeatureRankMonitor(**settings)
    torch.manual_seed(1)
    module = Classifier(mlp(), lr=0.0)
    trainer([hessian, features], precision="64-true").fit(module, loader())
    found = hessian.records[0].values
    functions = {"ggn": ggn_spectrum, "hessian": hessian_spectrum, "ntk": ntk_spectrum}
    for name, function in functions.items():
        spectrum = function(module.net, F.cross_entropy, (x, y))
        for eps in (1e-3, 1e-2, 1e-1):
            key = f"plasticity/{name}/eps_rank_{decimal(eps)}"
            assert found[key].value == spectrum.epsilon_rank(eps).value
        assert found[f"plasticity/{name}/lambda_max"].value == pytest.approx(spectrum.lambda_max().value, rel=1e-9)
    assert found[KEY].value == float((brute_force_ggn(module.net, x) > 0.01).sum())
    assert 0 < found[KEY].value < 16
    check_features(features.records[0].values, module.net, x)


def brute_force_ggn(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    total: Any = 0
    for sample in x:
        out = net(sample[None])[0]
        rows = [torch.autograd.grad(o, list(net.parameters()), retain_graph=True) for o in out]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        p = out.detach().softmax(0)
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(x)
    return torch.linalg.eigvalsh(total)


def check_features(values: Any, net: Any, x: torch.Tensor) -> None:
    hidden = {"net.1": net[:2](x).detach(), "net.3": net[:4](x).detach()}
    functions: dict[str, Callable[[torch.Tensor], Any]] = {
        "effective_rank": linalg.effective_rank,
        "stable_rank": lambda f: linalg.stable_rank_of(linalg.singular_values(f)),
        "srank": linalg.srank,
        "approximate_rank": linalg.approximate_rank,
        "feature_rank": linalg.feature_rank,
        "max_rank": lambda f: min(f.shape),
        "dead_units": lambda f: (f == 0).all(0).double().mean(),
        "dormant_units_0.1": lambda f: (f.abs().mean(0) <= 0.1 * f.abs().mean()).double().mean(),
    }
    for name, function in functions.items():
        each = {layer: float(function(f)) for layer, f in hidden.items()}
        for layer, value in each.items():
            assert values[f"plasticity/features/{name}/{layer}"].value == pytest.approx(value, rel=1e-6), name
        assert values[f"plasticity/features/{name}"].value == pytest.approx(sum(each.values()) / 2, rel=1e-6)
    norms = {f"net.{k}": float(net[k].weight.detach().norm()) for k in (0, 2, 4)}
    for layer, norm in norms.items():
        assert values[f"plasticity/weights/norm/{layer}"].value == pytest.approx(norm)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert values["plasticity/weights/norm"].value == pytest.approx(total)


def test_a_step_that_changes_its_batch_is_measured_on_the_batch_as_it_was() -> None:
    class Doubles(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(2.0)
            return super().training_step(batch, batch_idx)

    def measured(step: type[Classifier], x: torch.Tensor) -> list[Any]:
        torch.manual_seed(0)
        pair = both(data=(x, Y[:6]))
        fit(list(pair), 1, step(mlp(), lr=0.0))
        return [record.values for monitor in pair for record in monitor.records]

    found = measured(Doubles, X[:6])
    assert found == measured(Classifier, 2 * X[:6])
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_signatures_keep_their_positions() -> None:
    """What users may pass by position is fixed."""
    hessian = HessianSpectrumMonitor(("ggn",), (1e-2,), 64, "start", 2, None, "raise")
    assert (hessian.eps, hessian.probe_samples, hessian.when) == ((1e-2,), 64, ("start",))
    assert (hessian.every_n_tasks, hessian.data, hessian.on_error) == (2, None, "raise")
    features = FeatureRankMonitor(["net.1"], 32, "end", "raise")
    assert (features.layers, features.probe_samples, features.when) == (["net.1"], 32, ("end",))
    assert features.on_error == "raise"


def test_a_dataset_sorted_by_class_is_covered_by_every_part_of_the_probe() -> None:
    labels = torch.arange(10).repeat_interleave(500)
    dataset = TensorDataset(torch.zeros(5000, 1), labels)
    (batch,) = _spread(dataset, 512)
    assert len(batch[1]) == 512
    for part in (batch[1][:166], batch[1][166:]):
        counts = torch.bincount(part, minlength=10)
        assert counts.min() >= 5  # 16.6 and 34.6 expected in each class
