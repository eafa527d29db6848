"""The benchmarks on toy sizes, so that they do not rot; other libraries only where they are installed."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_plasticity import Spectrum

ROOT = Path(__file__).parents[1]
# What other libraries warn about is not ours to mend, and the worker of the benchmarks ignores it too.
pytestmark = pytest.mark.filterwarnings("ignore")

PACKAGES = {
    "ours": "torch",
    "ours-dual": "torch",
    "gemm": "torch",
    "pyhessian": "pyhessian",
    "pyhessian-loader": "pyhessian",
    "eigenthings": "hessian_eigenthings",
    "curvlinops": "curvlinops",
    "vivit": "vivit",
    "backpack": "backpack",
}
TASKS = [
    ("ggn", "ours"),
    ("ggn", "vivit"),
    ("ggn", "backpack"),
    ("counts", "ours"),
    ("counts", "ours-dual"),
    ("counts", "vivit"),
    ("counts", "pyhessian"),
    ("hessian", "ours"),
    ("hessian", "pyhessian"),
    ("hessian", "curvlinops"),
    ("hessian", "eigenthings"),
    ("product", "ours"),
    ("product", "gemm"),
    ("product", "pyhessian-loader"),
]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


# Next to other libraries


@pytest.mark.parametrize(("task", "peer"), TASKS)
def test_a_library_does_a_task(task: str, peer: str) -> None:
    pytest.importorskip(PACKAGES[peer])
    job = {"task": task, "peer": peer, "problem": "tiny-8", "steps": 5, "min_seconds": 0.0}
    found = module("peers.worker").run(job)
    if peer == "ours-dual" and "no method" in found.get("failed", ""):
        pytest.skip(found["failed"])
    assert found["seconds"] >= 0
    assert peer == "gemm" or all(math.isfinite(value) for value in found["check"].values())


def test_every_case_is_one_that_its_libraries_know() -> None:
    cases, adapters, problems = module("peers.cases"), module("peers.adapters"), module("peers.problems")
    for case in cases.FULL + cases.QUICK:
        assert set(case.peers) <= set(adapters.MODULES)
        assert not case.peers or case.problem.split("-")[0] in problems.NETWORKS


def test_every_target_has_its_case() -> None:
    known = {case.key: case for case in module("peers.cases").FULL}
    for target in module("peers.targets").TARGETS:
        assert target.case in known, target
        peers = known[target.case].peers
        assert not peers or {target.own, *target.against} <= set(peers), target


def rows(**seconds: list[float]) -> dict[str, Any]:
    return {name: {"seconds": values, "peak_mb": [1.0], "check": {}} for name, values in seconds.items()}


def test_a_verdict_is_on_the_best_of_the_others_turn_by_turn() -> None:
    targets = module("peers.targets")
    found = rows(ours=[1.0, 2.0, 1.0], vivit=[3.0, 4.0, 2.0], backpack=[9.0], gemm=[0.1, 0.1, 0.1])
    line = targets.judge(targets.Target("a", "ggn: x", 1.5), found)
    assert (line.measured, line.met) == ("2.00 (2.00-3.00)x (vivit)", True)
    assert targets.judge(targets.Target("a", "ggn: x", 2.5), found).met is False
    limit = targets.judge(targets.Target("a", "ggn: x", 12.0, "ours", ("gemm",), True), found)
    assert (limit.measured, limit.met) == ("10.00 (10.00-20.00)x (gemm)", True)
    assert targets.judge(targets.Target("a", "ggn: x", 1.5, "ours-dual"), found).met is False
    assert targets.judge(targets.Target("a", "ggn: x", 1.5), rows(ours=[1.0])).met is None


def test_slow_libraries_get_one_turn() -> None:
    turns = module("peers.run").turns
    found = rows(ours=[30.0], pyhessian=[40.0], curvlinops=[90.0], vivit=[1.0]) | {"backpack": {"failed": "memory"}}
    assert turns("vivit", found, 3) == 3
    assert turns("ours", found, 3) == 2
    assert turns("curvlinops", found, 3) == 1
    assert turns("backpack", found, 3) == 0
    assert turns("eigenthings", found, 3) == 3


def test_tables_are_written(tmp_path: Path) -> None:
    run, report = module("peers.run"), module("peers.report")
    about = {"when": "2026-01-01", "machine": report.machine()}
    results = {
        "ggn: mlp-500": {"rows": rows(ours=[1.0], vivit=[2.0]) | {"backpack": {"failed": "too large"}}} | about,
        "boundary: mlp": {"rows": {"memory": {"peak_mb": [3.0]}}, "lines": []} | about,
    }
    run.write(results, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert "| exact GGN spectrum, MLP, N=500 | >= 1.5x | 2.00x (vivit) | met |" in text
    assert "too large" in text


@pytest.mark.parametrize(("kind", "size"), [("penalty", "8x12"), ("streaming", "500x8")])
def test_ranks(kind: str, size: str) -> None:
    found = getattr(module("peers.ranks"), kind)(size, 1, 0.0)
    values = [row["check"]["effective rank"] for row in found["rows"].values()]
    torch.testing.assert_close(torch.tensor(values), torch.full((len(values),), values[0]))


def test_boundary_measures_start_and_end() -> None:
    boundary = module("peers.boundary")
    found = boundary._task("tiny", boundary.MONITORS["FeatureRankMonitor"]())
    assert len(found["seconds"]) == 2
    assert boundary._epoch("tiny", 64, 0.0) > 0
    assert boundary.step_memory("tiny", 4)["peak_mb"] >= 0


# Accuracy and growth


def test_accuracy_from_study_to_page() -> None:
    accuracy = module("peers.accuracy")
    plan = accuracy.Plan(6, 4, (8, 16), (1, 2), (16,), ("60 % dead",), 1, 0.0)
    study = module("peers.estimates").study("60 % dead", 6, 4, plan.steps, plan.probes, plan.table)
    times = {"ours": module("peers.run_times").run_times("ours", plan.names, 6, plan.steps, 0.0)}
    times["pyhessian"] = {"60 % dead": {"run": {"2": 0.1, "8": 1.0, "16": 2.0}}}
    found = {"studies": [study], "rounds": [times], "machine": "here"}
    text = accuracy.report(found, plan)
    assert "| 16 | ours |" in text
    assert "time to an error" in text
    # The exact spectrum is always one of ours; two probes share the set-up.
    assert math.isfinite(accuracy.cheapest(accuracy.our_costs(study, times["ours"], 0))[0])
    sure = study | {"plain": {"2 x 8": [0.0] * 5}}
    costs = accuracy.peer_costs(sure, times["pyhessian"], 0)
    assert accuracy.on_all([costs]) == (pytest.approx(1.9), "2 x 8")
    assert accuracy.on_each([costs, costs, {"1 x 8": (0.5, 1.0)}])[0] == pytest.approx(1.9)


def test_plain_and_our_reading_agree_when_all_is_resolved() -> None:
    estimates, nets = module("peers.estimates"), module("peers.digits_nets")
    truth = nets.Truth("diagonal", torch.tensor([4.0, 2.0, 0.5]).double(), torch.eye(3).double(), torch.ones(3).bool())
    true = estimates.true_values(truth)[:5]
    shares = estimates.plain_shares(estimates.plain_run(truth, 0, 3), 3, truth)
    # A Rademacher probe weighs the eigenvectors of a diagonal matrix alike: the quadrature is the spectrum itself.
    errors = estimates.plain_errors(np.array([shares]), 2, 3, true)
    assert max(errors) < 1e-9
    ours = estimates.our_values(estimates.our_spectrum(estimates.our_run(truth, 0, 3), 3, truth), truth)
    assert ours == pytest.approx(true)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "product", "sweeps"])
def test_a_point_of_growth(kind: str) -> None:
    found = module("growth_points").point(kind, 1e3, 8, 3, 0.0)
    assert found["params"] == pytest.approx(1e3, rel=0.2)
    assert found["seconds"] > 0


def test_growth_finds_slopes(tmp_path: Path) -> None:
    growth = module("growth")
    points = [{"at": x, "seconds": x**2, "peak_mb": 1.0} for x in (10.0, 20.0, 40.0, 80.0)]
    assert growth.slope(points, "seconds") == pytest.approx(2.0)
    series = (growth.Series("hessian", "steps", (10, 20, 40, 80), 2, 1, "m^2 P"),)
    found = [{"kind": "hessian", "axis": "steps", "points": points, "failed": ""}]
    time, memory = growth.lines(series, found)
    assert time.met is True
    assert memory.met is None
    growth.draw(series, found, tmp_path / "growth.png")
    assert "slope 2.00" in growth.report(series, {"series": found, "machine": "here"})


# Studies


def test_cost_of_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        """
module: study_cases.Net
stream: study_cases.Stream
trainer: {accelerator: cpu}
methods:
  plain:
  twice: {transforms: [{class_path: study_cases.halve}]}
"""
    )
    module("methods").main([str(file), "--quick"])
    shown = capsys.readouterr().out
    assert "plain" in shown
    assert "ratio 1.000 (1.000 to 1.000)" in shown
    assert "twice" in shown


def test_prediction_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"method": method, "seed": seed, "task": task, "online_accuracy": accuracy, "x": accuracy, "x/net.1": accuracy}
        for method in ("plain", "l2er")
        for seed in range(3)
        for task in range(6)
        for accuracy in [0.8 - 0.1 * task * (method == "plain") + 0.001 * seed]
    ]
    importlib.import_module("lightning_plasticity.study.table").write_table(rows, tmp_path)
    module("prediction").main([str(tmp_path), "--resamples", "5"])
    assert "3 runs fall, 3 do not" in capsys.readouterr().out
    lines = (tmp_path / "prediction.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["measure", "online_accuracy", "x"]


# Slippery Ant


def test_slippery_ant_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium.envs.mujoco.ant_v5")
    ant = module("slippery_ant")
    monkeypatch.setitem(ant.STREAM, "num_tasks", 2)
    monkeypatch.setitem(ant.STREAM, "num_envs", 2)
    monkeypatch.setitem(ant.STREAM, "change_every", 256)
    monkeypatch.setitem(ant.STREAM, "rollout_steps", 128)
    monkeypatch.setitem(ant.STREAM, "num_minibatches", 2)
    runs = [ant.train(name, 0, tmp_path, passes=1, max_episode_steps=40) for name in ant.METHODS]
    for run in runs:
        assert all(math.isfinite(value) for values in run["measures"].values() for value in values)
        assert {row[0] for row in run["episodes"]} == {0, 1}
    ant.draw(runs, tmp_path / "ant.png")
    assert (tmp_path / "ant.png").stat().st_size > 1000
    assert "| plain |" in ant.report(runs)


def test_tables_of_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, least and most of two seeds; the alarm of one study is tried on the other; what fell first."""
    from benchmarks import alert_default, prediction, study_table
    from lightning_plasticity.study.table import write_table

    for name in ("one", "two"):
        rows: list[dict[str, Any]] = []
        for method, low in (("plain", 0.2), ("steady", 0.6)):
            for seed in (0, 1):
                for task in range(8):
                    accuracy = 0.6 if task < 5 else low + 0.02 * seed
                    row = {"online_accuracy": accuracy, "end_accuracy": accuracy, "features/srank": 100 * accuracy}
                    rank = 50.0 if task < 4 or method == "steady" else 5.0
                    rows.append({"method": method, "seed": seed, "task": task, **row, "ggn/eps_rank_0.01": rank})
        (tmp_path / name).mkdir()
        write_table(rows, tmp_path / name)
    study_table.main([str(tmp_path / "one")])
    text = capsys.readouterr().out
    assert "| plain | 0.60 | 0.21 (0.20 to 0.22) |" in text
    assert "GGN > 0.01" in text
    assert "probe" not in text  # which these have not
    prediction.main([str(tmp_path / "one"), "--resamples", "5"])
    text = capsys.readouterr().out
    assert "2 runs fall, 2 do not" in text
    order = text[text.index("Which fell first") :]
    assert "| plain 0 | 5 | 4 | never | never | 5 |" in order
    assert "steady" not in order
    alert_default.main([str(tmp_path / "one"), str(tmp_path / "two"), "--resamples", "5"])
    text = capsys.readouterr().out
    assert "| ggn/eps_rank_0.01 | 0.550 to 0.550 | +1.00 [+1.00, +1.00] | +1.00 [+1.00, +1.00] | +0.00" in text


# The eps-rank two ways


def test_eps_ranks_of_known_spectra(tmp_path: Path) -> None:
    # Nine of ten coordinates are flat; at a range of 200 the kernel is 0.045 wide.
    values = torch.tensor([200.0, 1.0, 0.05, *[0.0] * 27], dtype=torch.float64)
    directory = tmp_path / "tensorboard/plain/seed0/spectra"
    directory.mkdir(parents=True)
    for task in range(2):
        Spectrum.from_eigenvalues(values, 30).save(directory / f"hessian_task000{task}_start.npz")
    epsilon_rank = module("epsilon_rank")
    spectra = epsilon_rank.spectra_of(tmp_path)
    *_, row = epsilon_rank.table(spectra)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["1", "200", "0.1000 (0.1000-0.1000)"]
    assert cells[6] == "0.0667 (0.0667-0.0667)"
    assert float(cells[3]) > 0.8  # the flat coordinates count as curvature
    epsilon_rank.draw(spectra, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
