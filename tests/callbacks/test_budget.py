"""Monitors within a budget: nothing is disturbed, plans are kept, memory and time hold where they can be measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CLASSES, Classifier, Manual, Witness, fit_tasks, loader, mlp, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import HessianSpectrumMonitor
from lightning_plasticity.callbacks import hessian_monitor
from lightning_plasticity.callbacks.kept_plans import KeptPlans
from lightning_plasticity.curvature.hessian.plan import HessianPlan

TINY = {"max_seconds": 1e-3, "probe_samples": 40, "num_steps": 30, "on_error": "raise"}
SLACK = 32  # MiB that the allocator keeps of what has been freed, and the code that is loaded on the way


def wide() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def monitor(**settings: Any) -> HessianSpectrumMonitor:
    return HessianSpectrumMonitor(**{"quantities": ("ggn", "hessian", "ntk"), **TINY, **settings})


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A thousandth of a second on a core that counts as slow is too little for any of the networks here."""
    made: list[str] = []
    for module, name in (("hessian.plan", "timed"), ("gram.plan", "_trials")):
        path = f"lightning_plasticity.curvature.{module}"
        function = getattr(sys.modules[path], name)
        monkeypatch.setattr(f"{path}.{name}", lambda *a, f=function, n=name, **k: made.append(n) or f(*a, **k))
    return made


@pytest.mark.parametrize("mode", ["frozen", "as_is"])
@pytest.mark.parametrize("bounds", [{}, {"max_seconds": None, "max_memory": 3 * 2**18}])
def test_a_fit_with_trials_ends_bit_for_bit_where_one_without_ends(
    bounds: Any, mode: Any, trials: list[str], tmp_path: Path
) -> None:
    def tasks() -> list[Any]:
        return [loader(task, samples=40, shuffle=True) for task in range(2)]

    plain = fit_tasks(lambda: Classifier(wide()), tasks(), [], tmp_path / "plain")
    watching = monitor(mode=mode, **bounds)
    watched = fit_tasks(lambda: Classifier(wide()), tasks(), [watching], tmp_path / "watched")
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert trials
    assert [record.failure for record in watching.records] == [None] * 4
    for record in watching.records:
        assert record.settings["hessian"]["budget"] == watching.records[0].settings["hessian"]["budget"]
        assert record.settings["hessian"]["num_samples"] == watching.records[0].settings["hessian"]["num_samples"]


def test_manual_optimization(trials: list[str], tmp_path: Path) -> None:
    def tasks() -> list[Any]:
        return [loader(samples=40)]

    plain = fit_tasks(lambda: Manual(mlp()), tasks(), [], tmp_path / "plain")
    watched = fit_tasks(lambda: Manual(mlp()), tasks(), [watching := monitor(max_seconds=1e-6)], tmp_path / "watched")
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert trials
    assert all(record.failure is None for record in watching.records)


def test_an_error_in_a_trial_does_not_kill_the_run_nor_change_it(tmp_path: Path) -> None:
    class Picky(Classifier):
        """Refuses batches that training never sees."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert len(batch[0]) == 4, "four samples, please"
            return super().training_step(batch, batch_idx)

    plain = fit_tasks(lambda: Picky(wide()), [loader(samples=40)], [], tmp_path / "plain")
    watched = fit_tasks(lambda: Picky(wide()), [loader(samples=40)], [watching := monitor()], tmp_path / "watched")
    assert {key for key in plain if plain[key] != watched[key]} == set()
    assert [record.failure for record in watching.records] == [None] * 2
    assert watching.records[0].settings["hessian"]["num_samples"] % 4 == 0


def test_plans_are_made_once_for_each_size_and_kept_over_tasks(trials: list[str]) -> None:
    watching, module = monitor(quantities=("hessian",)), Classifier(wide())
    for samples in (40, 40, 20):
        trainer([watching]).fit(module, loader(samples=samples))
    assert trials == ["timed"] * 2
    assert [record.failure for record in watching.records] == [None] * 6


def test_more_samples_in_a_later_task_are_used() -> None:
    watching, module = monitor(quantities=("hessian",), max_seconds=None), Classifier(wide())
    for samples in (12, 40):
        trainer([watching]).fit(module, loader(samples=samples))
    assert [record.settings["hessian"]["num_samples"] for record in watching.records] == [12, 12, 40, 40]


def test_resumed_runs_go_on_with_their_plans(trials: list[str], tmp_path: Path) -> None:
    module, first = Classifier(wide()), monitor()
    last = trainer([first, Witness()])
    last.fit(module, loader(samples=40))
    last.save_checkpoint(tmp_path / "one.ckpt")
    count = len(trials)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"][first.state_key]["plans"]
    resumed = monitor()
    trainer([resumed, Witness()], max_epochs=2).fit(
        Classifier(wide()), loader(samples=40), ckpt_path=tmp_path / "one.ckpt"
    )
    assert resumed.state_dict()["plans"] == saved
    assert len(trials) == count
    # Told to take less, it plans anew.
    other = monitor(max_memory=2**22)
    trainer([other, Witness()], max_epochs=2).fit(
        Classifier(wide()), loader(samples=40), ckpt_path=tmp_path / "one.ckpt"
    )
    assert len(trials) > count


def test_a_checkpoint_without_plans_loads() -> None:
    state = monitor().state_dict()
    del state["plans"]
    monitor().load_state_dict(state)


def test_kept_plans() -> None:
    made: list[int] = []

    def make() -> HessianPlan:
        made.append(1)
        return HessianPlan(5, 6, why="x")

    plans = KeptPlans([1.0, None])
    assert plans.get("a", HessianPlan, make) == (HessianPlan(5, 6, why="x"), True)
    assert plans.get("a", HessianPlan, make) == (HessianPlan(5, 6, why="x"), False)
    other, different = KeptPlans([1.0, None]), KeptPlans([2.0, None])
    for found in (other, different):
        found.load_state_dict(plans.state_dict())
    assert [found.get("a", HessianPlan, make)[1] for found in (other, different)] == [False, True]
    assert len(made) == 2


@pytest.mark.parametrize("name", ["max_seconds", "max_memory"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1"])
def test_bounds_are_checked_at_construction(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        HessianSpectrumMonitor(**{name: value})
    assert HessianSpectrumMonitor(**{name: None}).budget.max_memory is None


def test_memory_that_does_not_suffice_is_a_failure_that_says_what_to_do() -> None:
    watching = monitor(quantities=("hessian",), max_memory=2**10, on_error="warn")
    with pytest.warns(UserWarning, match=r"takes .* MiB at least.*Raise max_memory.*Training goes on"):
        trainer([watching]).fit(Classifier(wide()), loader(samples=40))


def test_the_default_bound_is_four_training_steps_or_64_mib() -> None:
    assert (hessian_monitor.STEP_MULTIPLE, hessian_monitor.LEAST_MEMORY) == (4, 64 * 2**20)
    data = DataLoader(TensorDataset(torch.randn(64, 16), torch.zeros(64, dtype=torch.long)), batch_size=32)
    watching = HessianSpectrumMonitor("ggn", on_error="raise")
    trainer([watching]).fit(Classifier(wide()), data)
    assert "budget" not in watching.records[0].settings["ggn"]


PEAK = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import lightning, torch
from runs import Classifier, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_plasticity import HessianSpectrumMonitor
from lightning_plasticity.curvature import hessian_spectrum

def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

def net(width):
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

def data(samples):
    torch.manual_seed(0)
    return torch.randn(samples, 784), torch.randint(3, (samples,))

def peak(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

class Peak(HessianSpectrumMonitor):
    def measure(self, *args):
        found = []
        self.peak = max(getattr(self, "peak", 0), peak(lambda: found.append(super(Peak, self).measure(*args))))
        return found[0]

def watched(width, samples):
    monitor = Peak(on_error="raise", when="start")
    trainer([monitor]).fit(Classifier(net(width)), DataLoader(TensorDataset(*data(samples)), batch_size=64))
    return monitor.peak

torch.set_num_threads(1)
watched(8, 64)  # what is loaded once
{what}
"""


def measured_peak(what: str) -> float:
    tests = Path(__file__).parents[1]
    code = PEAK.format(tests=str(tests), root=str(tests.parent), what=what)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return float(run.stdout.split()[-1])


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")


@linux
@pytest.mark.slow
def test_the_default_monitor_adds_four_training_steps_of_memory_at_most() -> None:
    # 666 627 weights: with gradients and Adam's two states 10 MiB, and a graph of 0.6; 64 MiB are the least.
    assert measured_peak("print(watched(512, 512))") <= 64 + SLACK


@linux
@pytest.mark.slow
@pytest.mark.parametrize("bound", [32, 64, 128, 300])
def test_a_spectrum_keeps_to_its_bound(bound: int) -> None:
    call = f"hessian_spectrum(net(512), nn.functional.cross_entropy, data(512), max_memory={bound} * 2**20)"
    assert measured_peak(f"print(peak(lambda: {call}))") <= bound + SLACK
