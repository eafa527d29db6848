"""Whole studies on tiny streams: what they write, that they go on where they were stopped, and what fails alone."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from study_cases import SEEN, Net, Stream, plain_study

from lightning_plasticity import read_records
from lightning_plasticity.cli import main
from lightning_plasticity.study import StudyError, load_study, read_table, run_study
from lightning_plasticity.study.config import parse_study
from lightning_plasticity.study.files import read_json
from lightning_plasticity.study.surroundings import one_unit
from lightning_plasticity.study.table import write_table

HERE = str(Path(__file__).parents[1])
TIMES = ("seconds", "measuring_seconds")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take the most time of a tiny study; one test makes them."""
    if request.node.name != "test_a_study_writes_all_it_promises":
        monkeypatch.setattr("lightning_plasticity.study.run.write_figures", lambda *_: None)


def run(out: Path, study: dict[str, Any], **options: Any) -> tuple[Any, str]:
    text = io.StringIO()
    outcome = run_study(parse_study(study, (HERE,)), out, console=Console(file=text, width=200), **options)
    return outcome, text.getvalue()


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): read_json(path)["weights"] for path in sorted(out.rglob("result.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted studies of three tasks, by kind of fits."""
    outs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_plasticity.study.run.write_figures", lambda *_: None)
        for fits in ("per_task", "one"):
            outs[fits] = tmp_path_factory.mktemp(fits)
            run(outs[fits], three_tasks(fits))
    return outs


def three_tasks(fits: str, **changes: Any) -> dict[str, Any]:
    stream = {"class_path": "study_cases.Stream", "init_args": {"num_tasks": 3}}
    return plain_study(fits=fits, stream=stream, seeds=[0], **changes)


def test_a_study_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ["online_accuracy", "features/effective_rank"]  # a picture takes a quarter of a second
    monkeypatch.setattr("lightning_plasticity.study.run.plottable", lambda rows: some)
    outcome, text = run(tmp_path, plain_study())
    assert outcome.failures == {}
    assert "4 of 4 units finished" in text
    index = [(row["method"], row["seed"], row["task"]) for row in outcome.rows]
    assert index == [(method, seed, task) for method in ("plain", "l2er") for seed in (0, 1) for task in (0, 1)]
    # The CSV and the JSON lines are the same table.
    assert read_table(tmp_path) == outcome.rows
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [float(line["online_accuracy"]) for line in lines] == [row["online_accuracy"] for row in outcome.rows]
    # What the monitors recorded, by key.
    records = read_records(tmp_path / "units" / "l2er" / "seed1")
    assert [record.task for record in records] == [0, 1]
    for record, row in zip(records, outcome.rows[-2:], strict=True):
        for key, estimate in record.values.items():
            assert row[key.removeprefix("plasticity/")] == estimate.value
    assert {"features/effective_rank/net.2", "features/dead_units", "weights/norm"} <= set(outcome.rows[0])
    assert all(row["steps"] == 2 * math.ceil(24 / 5) for row in outcome.rows)
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plots" / "features_effective_rank.png").exists()
    assert "against plain" in (tmp_path / "comparison.txt").read_text()
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.rglob("log.txt"))
    # Nothing is left to do, and nothing is done.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("units/*/*/*")}
    again, text = run(tmp_path, plain_study())
    assert again.rows == outcome.rows
    assert "4 of 4 finished before" in text
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("units/*/*/*")}


def test_one_fit_is_the_users_own_fit(tmp_path: Path, whole: dict[str, Path]) -> None:
    """The same seed, module, stream and Trainer by hand."""
    import lightning as L

    from lightning_plasticity.study.unit import _fingerprint

    L.seed_everything(0, verbose=False)
    net, stream = Net(), Stream(num_tasks=3)
    L.Trainer(
        max_epochs=6,
        reload_dataloaders_every_n_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(net, stream)
    assert _fingerprint(net) == weights(whole["one"])["units/plain/seed0/result.json"]


def test_a_study_in_one_fit_is_the_demo(tmp_path: Path) -> None:
    """Another implementation of the same run: accuracy, curvature and features are the same numbers."""
    from lightning_plasticity.demo.train import train

    stream = {
        "class_path": "lightning_plasticity.streams.RandomLabelDigits",
        "init_args": {"num_tasks": 2, "epochs_per_task": 2},
    }
    study = plain_study(module="lightning_plasticity.demo.network.Plain", stream=stream, fits="one", seeds=[3])
    del study["measure"]  # the default is the demo's
    study["methods"] = {"plain": None, "l2er": {"module": {"class_path": "lightning_plasticity.demo.network.L2ER"}}}
    outcome, _ = run(tmp_path / "study", study)
    for method in study["methods"]:
        demo: list[dict[str, float]] = []
        train(method, 3, tmp_path / "demo", 2, 2, demo.append)
        rows = [row for row in outcome.rows if row["method"] == method]
        assert [row["online_accuracy"] for row in rows] == pytest.approx([row["online_accuracy"] for row in demo])
        assert [row["ggn/eps_rank_0.01"] for row in rows] == [row["ggn_eps_rank_0.01"] for row in demo]
        assert [row["features/dead_units"] for row in rows] == [row["dead_units"] for row in demo]
        last = [key for key in rows[0] if key.startswith("features/effective_rank/")][-1]
        assert [row[last] for row in rows] == [row["effective_rank"] for row in demo]


def test_fits_for_each_task_are_the_users_own(whole: dict[str, Path]) -> None:
    import lightning as L

    from lightning_plasticity.study.unit import _fingerprint

    L.seed_everything(0, verbose=False)
    net, stream = Net(), Stream(num_tasks=3)
    for task in range(3):
        stream.task_id = task
        L.Trainer(
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(net, stream)
    assert _fingerprint(net) == weights(whole["per_task"])["units/plain/seed0/result.json"]


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("fits", ["per_task", "one"])
def test_a_unit_that_failed_goes_on_bit_identically(
    fits: str, task: int, tmp_path: Path, whole: dict[str, Path]
) -> None:
    marker = tmp_path / "mended"
    broken = three_tasks(fits)
    fails = {"class_path": "study_cases.Fails", "init_args": {"task": task, "marker": str(marker)}}
    broken["methods"] = {name: {**(own or {}), "callbacks": [fails]} for name, own in broken["methods"].items()}
    out = tmp_path / "out"
    outcome, text = run(out, broken)
    assert outcome.rows == []
    assert set(outcome.failures) == {"plain, seed 0", "l2er, seed 0"}
    assert f"FAILED plain, seed 0: RuntimeError: meant to fail in task {task}" in text
    assert "Traceback" in (out / "units/plain/seed0/error.txt").read_text()
    marker.touch()
    outcome, _ = run(out, broken)
    assert outcome.failures == {}
    assert timeless(outcome.rows) == timeless(read_table(whole[fits]))
    assert weights(out) == weights(whole[fits])


@pytest.mark.parametrize("fits", [pytest.param("per_task", marks=pytest.mark.slow), "one"])
def test_a_killed_study_goes_on_bit_identically(fits: str, tmp_path: Path, whole: dict[str, Path]) -> None:
    """``kill -9`` of the process that runs it, in the second task of the second unit."""
    marker = tmp_path / "waiting"
    study = three_tasks(fits)
    waits = {"class_path": "study_cases.Waits", "init_args": {"task": 1, "marker": str(marker)}}
    study["methods"]["l2er"]["callbacks"] = [waits]
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_plasticity.cli", "study", str(file), "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([HERE, str(Path(HERE).parent)])},
        stdout=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    assert marker.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_json(out / "units/l2er/seed0/progress.json")["done"] == 1
    assert not (out / "units/l2er/seed0/result.json").exists()
    outcome, text = run(out, study)
    assert "1 of 2 finished before" in text
    assert timeless(outcome.rows) == timeless(read_table(whole[fits]))
    assert weights(out) == weights(whole[fits])


@pytest.mark.parametrize(
    "deaths", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_jobs_give_what_one_process_gives(deaths: int, tmp_path: Path, whole: dict[str, Path]) -> None:
    """Two processes; one is killed so many times, so the pool breaks and is made again."""
    study = three_tasks("per_task")
    dies = {"class_path": "study_cases.Dies", "init_args": {"directory": str(tmp_path), "times": deaths}}
    study["methods"]["plain"] = {"callbacks": [dies]}
    outcome, text = run(tmp_path / "out", study, jobs=2)
    expected = timeless(read_table(whole["per_task"]))
    if deaths < 2:
        assert outcome.failures == {}
        assert timeless(outcome.rows) == expected
        assert weights(tmp_path / "out") == weights(whole["per_task"])
    else:
        assert set(outcome.failures) == {"plain, seed 0"}
        assert "its process died 2 times in task 1" in text
        assert timeless(outcome.rows) == [row for row in expected if row["method"] == "l2er"]
    assert len(list(tmp_path.glob("died*"))) == min(deaths, 2)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightnings_advice_is_left_out(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both packages write through one logger, that of the package imported last."""
    from lightning_utilities.core import rank_zero

    logger = logging.getLogger(f"{package}.utilities.rank_zero")
    monkeypatch.setattr(rank_zero, "log", logger)
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    monkeypatch.setattr(logger.parent, "level", logging.INFO)
    try:
        with one_unit(1, tmp_path / "log.txt"):
            rank_zero.rank_zero_info("advice")
            warnings.warn("a warning", stacklevel=1)
            warnings.warn("The dataloader does not have many workers", stacklevel=1)
        assert capfd.readouterr().err == ""
        assert (tmp_path / "log.txt").read_text() == "UserWarning: a warning\n"
        rank_zero.rank_zero_info("advice")
        assert "advice" in capfd.readouterr().err
    finally:
        logger.removeHandler(handler)


def test_a_failed_unit_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = plain_study(seeds=[0])
    study["methods"] = {"bad": {"callbacks": [{"class_path": "study_cases.Fails", "init_args": {}}]}, "good": None}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "good, seed 0: task 2 of 2" in shown
    assert "FAILED bad, seed 0" in shown
    assert "1 of 2 units finished" in shown
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--only", "good"]) == 0


def test_changed_settings_are_refused_or_run_again(tmp_path: Path) -> None:
    study = plain_study(seeds=[0], methods={"a": None, "b": None})
    first, _ = run(tmp_path, study)
    changed = plain_study(seeds=[0], methods={"a": None, "b": {"module": {"init_args": {"lr": 0.1}}}})
    with pytest.raises(StudyError, match=r"b, seed 0: module.init_args.lr was null, is 0.1.*--rerun-changed"):
        run(tmp_path, changed)
    again, _ = run(tmp_path, changed, rerun_changed=True)
    assert again.rows[:2] == first.rows[:2]  # with the same seconds: not run again
    assert timeless(again.rows[2:]) != timeless(first.rows[2:])


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("fits", ["per_task", "one"])
def test_a_logged_metric_is_read(fits: str, per_step: bool, as_object: bool, tmp_path: Path) -> None:
    SEEN.clear()
    module = {"class_path": "study_cases.Logging", "init_args": {"per_step": per_step, "as_object": as_object}}
    # 20 samples in batches of 5: the torchmetrics object weighs samples, a mean of batches weighs batches.
    stream = {"class_path": "study_cases.Stream", "init_args": {"samples": 20, "epochs_per_task": 3}}
    outcome, _ = run(
        tmp_path,
        plain_study(
            module=module,
            stream=stream,
            fits=fits,
            online_metric="train/acc",
            seeds=[0],
            methods={"a": None},
            measure=[],
        ),
    )
    assert outcome.failures == {}
    # 3 epochs of 4 batches for each task; what measures the end comes after them, in one batch.
    tasks = [SEEN[:12], SEEN[13:25]]
    assert [row["online_train_acc"] for row in outcome.rows] == pytest.approx([np.mean(task) for task in tasks])
    assert [row["end_train_acc"] for row in outcome.rows] == pytest.approx([SEEN[12], SEEN[25]])


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, plain_study(online_metric="acc", seeds=[0], methods={"a": None}))
    (why,) = outcome.failures.values()
    assert "online_metric 'acc' was not found: training_step returned loss, accuracy" in why


def test_a_metric_that_is_not_there_is_named_after_the_first_step(tmp_path: Path) -> None:
    """Nothing else could log it; and where a hook of the module could, the log says so at once."""
    SEEN.clear()
    module = {"class_path": "study_cases.Logging", "init_args": {"per_step": False}}
    plain = {"online_metric": "train/ac", "seeds": [0], "methods": {"a": None}, "measure": []}
    outcome, _ = run(tmp_path / "a", plain_study(module=module, **plain))
    (why,) = outcome.failures.values()
    assert "online_metric 'train/ac' was not found" in why
    assert "logged train/acc." in why
    assert len(SEEN) == 1
    module["class_path"] = "study_cases.LoggingLater"
    outcome, _ = run(tmp_path / "b", plain_study(module=module, **plain | {"online_metric": "later"}))
    assert outcome.failures == {}
    assert "one of these logs it: on_train_batch_end." in (tmp_path / "b/units/a/seed0/log.txt").read_text()


def test_methods_that_are_left_out_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = plain_study(seeds=[0], methods={"a": None, "b": {"callbacks": ["lightning_plasticity.ReDoo"]}})
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--only", "a"]) == 2
    assert "methods.b: callbacks[0]: lightning_plasticity has no ReDoo. Did you mean 'ReDo'?" in capsys.readouterr().err


def test_a_study_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(seeds=[0], methods={"a": None}), sort_keys=False))
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.out.count("\n") == 1
    assert (found["finished"], found["failures"]) == (1, {})
    assert [(row["method"], row["seed"], row["task"]) for row in found["rows"]] == [("a", 0, 0), ("a", 0, 1)]
    assert "1 of 1 units finished" in shown.err


def test_an_interrupt_while_measuring_ends_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It does not end one measurement, as in a run by itself: the table would have a hole."""
    callback = {"class_path": "study_cases.Interrupts", "init_args": {}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(seeds=[0], methods={"a": {"callbacks": [callback]}}), sort_keys=False))
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["study", str(file), "--out", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "units/a/seed0/result.json").exists()


def test_two_processes_do_not_share_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(), sort_keys=False))
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["study", str(file), "--out", str(tmp_path)]) == 1
    assert "another process runs a study" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("lightning-plasticity: ")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study(), sort_keys=False))
    assert main(["study", str(file), "--out", str(tmp_path), "--only", "nobody"]) == 2
    assert "the study has: plain, l2er" in capsys.readouterr().err
    assert main(["study", str(file), "--out", str(tmp_path), "--reference", "nobody"]) == 2
    assert main(["study", str(file), "--seeds", "a"]) == 2
    with pytest.raises(StudyError):
        main(["study", str(tmp_path / "none.yaml"), "--debug"])


def test_tables_hold_what_is_not_finite(tmp_path: Path) -> None:
    rows = [
        {"method": "a", "seed": 0, "task": 0, "x": 0.1, "y": math.nan},
        {"method": "a", "seed": 0, "task": 1, "z": math.inf},
    ]
    write_table(rows, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0]["y"] is None
    assert "x" not in lines[1]
    read = read_table(tmp_path)
    assert read[0]["x"] == 0.1
    assert math.isnan(read[0]["y"])
    assert (tmp_path / "results.csv").read_text().splitlines()[1:] == ["a,0,0,0.1,nan,", "a,0,1,,,inf"]


def test_a_terminal_shows_a_live_table(tmp_path: Path) -> None:
    fails = {"class_path": "study_cases.Fails", "init_args": {}}
    study = plain_study(seeds=[0], measure=[], methods={"good": None, "bad": {"callbacks": [fails]}})
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    run_study(parse_study(study, (HERE,)), tmp_path, console=console)
    shown = text.getvalue()
    assert "seeds finished" in shown
    last = shown[shown.rindex("seeds finished") :]
    assert "1 of 1" in last
    assert "0 of 1, " in last
    assert "1 failed" in last


def test_results_come_back_from_machines_without_our_disk(tmp_path: Path) -> None:
    """What a worker elsewhere returns is written where it is read, result and error alike."""
    from lightning_plasticity.study.run import _keep
    from lightning_plasticity.study.unit import run_unit

    study = parse_study(plain_study(seeds=[0], methods={"a": None}), (HERE,))
    (unit,) = study.units()
    elsewhere = run_unit(unit, tmp_path / "elsewhere")
    _keep(unit, elsewhere, tmp_path / "here")
    assert read_json(unit.directory(tmp_path / "here") / "result.json") == elsewhere["result"]
    _keep(unit, {"error": "out of luck"}, tmp_path / "other")
    assert (unit.directory(tmp_path / "other") / "error.txt").read_text() == "out of luck"


def test_the_ready_made_study_can_be_run() -> None:
    """All its classes exist and take these arguments."""
    from lightning_plasticity.study.run import check

    check(load_study(Path(HERE).parent / "examples" / "study_digits.yaml"))


@pytest.mark.parametrize("fits", ["per_task", "one"])
def test_an_optimizer_in_place_of_the_modules_own(fits: str, tmp_path: Path) -> None:
    rms = {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 0.02}}
    methods = {"plain": None, "by_hand": {"module": "study_cases.OtherOptimizer"}, "given": {"optimizer": rms}}
    outcome, text = run(tmp_path, plain_study(fits=fits, seeds=[0], methods=methods))
    assert outcome.failures == {}, text
    found = {name.split("/")[1]: value for name, value in weights(tmp_path).items()}
    assert found["given"] == found["by_hand"] != found["plain"]


@pytest.mark.parametrize("fits", ["per_task", "one"])
def test_sparse_methods_by_transform_and_by_callback(fits: str, tmp_path: Path) -> None:
    """The masks of a transform have the unit's seed, as the callback's; both survive a module that is pickled."""
    density = {"density": 0.5}
    methods = {
        "transform": {"transforms": [{"class_path": "lightning_plasticity.sparsity.sparsify", "init_args": density}]},
        "static": {"callbacks": [{"class_path": "lightning_plasticity.SparseTopology", "init_args": density}]},
        "rigl": {
            "callbacks": [
                {
                    "class_path": "lightning_plasticity.SparseTopology",
                    "init_args": density | {"method": "rigl", "every_n_steps": 1},
                }
            ]
        },
    }
    run(tmp_path, plain_study(fits=fits, methods=methods))
    found = weights(tmp_path)
    for seed in (0, 1):
        transform, static, rigl = (found[f"units/{name}/seed{seed}/result.json"] for name in methods)
        assert transform == static != rigl
    assert found["units/static/seed0/result.json"] != found["units/static/seed1/result.json"]
