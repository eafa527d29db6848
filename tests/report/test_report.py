"""The numbers in a report against the records they come from."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from report_cases import NUM_PARAMS, Seen, data_of, option_of, spectrum_of, values_of, write_run, write_study
from scipy import stats

from lightning_plasticity.report import offer_report, write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = write_run(tmp_path_factory.mktemp("one") / "version_0")
    return directory, write_report(directory, directory / "report.html")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_study(tmp_path_factory.mktemp("study"), num_seeds=3)
    return write_report(str(root), root)


def test_values_and_intervals_of_one_run_are_those_of_the_records(run: tuple[Path, Path]) -> None:
    data = data_of(run[1])
    (line,) = option_of(data, "hessian/eps_rank_0.01")["lines"]
    expected = [values_of(task)["plasticity/hessian/eps_rank_0.01"] for task in range(4)]
    assert line["tasks"] == [0, 1, 2, 3]
    assert line["value"] == [estimate.value for estimate in expected]
    assert line["lower"] == [estimate.lower for estimate in expected]
    assert line["upper"] == [estimate.upper for estimate in expected]
    (norms,) = option_of(data, "weights/norm")["lines"]
    assert norms["value"] == pytest.approx([3.0 + 1.23456789 * task for task in range(4)], rel=1e-5)
    assert "lower" not in norms  # exact numbers have no interval to draw
    assert option_of(data, "features/srank/net.1")["cap"][0]["value"] == [16] * 4
    assert data["groups"] == [{"name": "version_0", "runs": 1}]


def test_seeds_are_a_mean_with_students_interval(study: Path) -> None:
    data = data_of(study)
    for measure, start, slope, step in (
        ("hessian/eps_rank_0.01", 20.0, -1.0, 1.0),
        ("online_accuracy", 0.9, -0.1, 0.01),
    ):
        lines = option_of(data, measure)["lines"]
        assert [line["group"] for line in lines] == ["plain", "other"]
        for line in lines:
            assert line["runs"] == [3] * 4
            for task in range(4):
                seeds = [start + slope * task + step * seed for seed in range(3)]
                error = statistics.stdev(seeds) / math.sqrt(3)
                lower, upper = stats.t.interval(0.95, 2, statistics.mean(seeds), error)
                found = [line[part][task] for part in ("value", "lower", "upper")]
                assert found == pytest.approx([statistics.mean(seeds), lower, upper], rel=1e-5)


def test_heat_maps_count_every_eigenvalue_once(run: tuple[Path, Path]) -> None:
    (heat,) = data_of(run[1])["heat"]
    assert heat["tasks"] == [0, 1, 2, 3]
    for task in range(4):
        values = spectrum_of(task).eigenvalues.tolist()
        assert heat["zeros"][task] == NUM_PARAMS - 12
        assert heat["rounding"][task] == sum(0 < abs(x) <= 1e-4 for x in values)
        everything = sum(heat["counts"][task]) + heat["below"][task] + heat["zeros"][task] + heat["rounding"][task]
        assert everything == heat["params"][task] == NUM_PARAMS
        for part, signs in (("counts", (-1, 1)), ("negative", (-1,))):
            for k, count in enumerate(heat[part][task]):
                low, high = (10 ** (heat["from"] + (k + more) * heat["step"]) for more in (0, 1))
                seen = [x for x in values if abs(x) > 1e-4 and math.copysign(1, x) in signs]
                assert count == sum(low <= abs(x) < high for x in seen)
        # Bins end at whole decades, so that counts above a power of ten are the recorded kind of count.
        first = round((-2 - heat["from"]) / heat["step"])
        assert sum(heat["counts"][task][first:]) == spectrum_of(task).epsilon_rank(1e-2).value
    assert data_of(run[1])["eps"] == {"hessian": [0.01]}


def test_alerts_are_on_the_time_line(run: tuple[Path, Path]) -> None:
    (alert,) = data_of(run[1])["alerts"]
    assert alert["measure"] == "features/srank"
    assert alert["tasks"] == [2, 3]
    assert alert["ratio"] == pytest.approx([7 / 9, 6 / 9], rel=1e-5)
    assert alert["active"] == [False, True]
    assert alert["fraction"] == 0.7
    assert "alert on features/srank against best at 0.7 of it sounded 1 time, at task 3." in Seen(run[1]).text


def test_cards_say_last_and_best_and_at_which_task(run: tuple[Path, Path]) -> None:
    text = Seen(run[1]).text
    assert "\u25bc srank: mean over layers below 0.946 of its best." in text
    assert (
        "PlasticityAlert watches it\u25bc below 0.946 of its best69highest, task\xa0067%" in text
    )  # last, best, ratio
    assert "passes no gradient0.30lowest, task\xa00" in text
    assert "no value since" not in text
    assert "Accuracy is not known" in text


def test_a_value_of_an_earlier_task_is_not_taken_for_the_last(tmp_path: Path) -> None:
    write_run(tmp_path)
    with open(tmp_path / "plasticity.jsonl", "a") as file:
        values = '{"plasticity/hessian/eps_rank_0.01": ["nan", 1, 9], "plasticity/weights/norm": [9, 9, 9]}'
        file.write(f'{{"monitor": "HessianSpectrumMonitor", "task": 4, "phase": "start", "values": {values}}}\n')
    text = Seen(write_report(tmp_path, tmp_path)).text
    assert "the same of the whole Hessian1 to 9not resolved closer20highest, task\xa00srank: mean over" in text
    assert "\u25bc below 0.946 of its bestlast is task 3: no value since69highest, task\xa00dead units" in text


def test_page_can_be_walked_without_a_mouse(study: Path) -> None:
    elements = Seen(study).elements
    tags = [tag for tag, _ in elements]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert tags.count(landmark) == 1
    ids = {attributes.get("id") for _, attributes in elements}
    targets = [a["href"] for tag, a in elements if tag == "a"]
    assert "#main" in targets
    assert all(target is not None and target.removeprefix("#") in ids for target in targets)
    assert tags.count("details") >= len([1 for _, a in elements if a.get("class") == "figure"])
    outside = [
        value for _, a in elements for key, value in a.items() if key in ("src", "href") and value and "//" in value
    ]
    assert not outside  # works offline


def test_several_directories_and_the_end_of_tasks(tmp_path: Path) -> None:
    from lightning_plasticity.linalg import Estimate
    from lightning_plasticity.records import TaskRecord, append_record

    for name in ("a", "b"):
        write_run(tmp_path / name / "version_0")
    key = "plasticity/end/val/fresh/features/srank"
    append_record(tmp_path / "b" / "version_0", TaskRecord("M", 0, "end", 9, {key: Estimate.exactly(2.5)}))
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "new" / "both.html")
    lines = option_of(data_of(page), "features/srank")["lines"]
    assert [(line["group"], line["variant"]) for line in lines] == [
        ("a/version_0", ""),
        ("b/version_0", ""),
        ("b/version_0", "val, fresh network, end of task"),
    ]
    assert lines[2]["value"] == [2.5]


def test_a_resumed_run_counts_its_last_measurement(tmp_path: Path) -> None:
    from lightning_plasticity.linalg import Estimate
    from lightning_plasticity.records import TaskRecord, append_record

    for value in (1.0, 2.0):
        append_record(tmp_path, TaskRecord("M", 0, "start", 0, {"plasticity/features/srank": Estimate.exactly(value)}))
    data = data_of(write_report(tmp_path, tmp_path / "r.html"))
    assert option_of(data, "features/srank")["lines"][0]["value"] == [2]


def test_offer_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    offer_report(tmp_path, told.append)  # nothing there
    write_run(tmp_path / "run")
    offer_report(tmp_path, told.append)
    monkeypatch.setattr("lightning_plasticity.report.write.if_installed", lambda module: None)
    offer_report(tmp_path, told.append)
    assert told[0].startswith("No HTML report: ReportError: No plasticity.jsonl")
    assert told[1] == f"Report: {tmp_path / 'report.html'}"
    assert "pip install plotly" in told[2]
    assert len(told) == 3
