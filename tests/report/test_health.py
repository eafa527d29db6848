"""What the cards say of counts at their cap, of intervals, and of records that others took the place of."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from report_cases import Seen, data_of, option_of

from lightning_plasticity.demo.report import COLOURS
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.records import TaskRecord, append_record
from lightning_plasticity.report import write_report

Count = float | tuple[float, float]  # a value, or the ends of an interval


def write(directory: Path, matrix: str, counts: dict[str, list[Count]], about: dict[str, int]) -> Path:
    """A run with the counts above each eps over tasks."""
    for task in range(max(map(len, counts.values()))):
        values = {}
        for eps, course in counts.items():
            found = course[task]
            one = Estimate(math.nan, *found) if isinstance(found, tuple) else Estimate.exactly(found)
            values[f"plasticity/{matrix}/eps_rank_{eps}"] = one
        append_record(directory, TaskRecord(matrix, task, "start", 10 * task, values, {matrix: about}))
    return directory


def text_of(directory: Path) -> str:
    return Seen(write_report(directory, directory / "report.html")).text


@pytest.mark.parametrize("about", [{"num_params": 999, "rows": 320}, {"num_params": 320, "rows": 500}])
def test_a_count_at_its_cap_is_not_health(tmp_path: Path, about: dict[str, int]) -> None:
    text = text_of(write(tmp_path, "ggn", {"0.01": [300, 320]}, about))
    assert (
        "at its cap (320), so it cannot show more: look at a larger eps, or measure more samples320320highest" in text
    )
    assert "100%" not in text


def test_more_samples_do_not_lift_the_hessians_cap(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, "hessian", {"0.01": [40, 40]}, {"num_params": 40, "rows": 7}))
    assert "at its cap (40), so it cannot show more: look at a larger eps4040" in text


def test_a_count_below_its_cap_has_its_ratio(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, "ggn", {"0.01": [319, 319]}, {"num_params": 999, "rows": 320}))
    assert "100%" in text
    assert "its cap (" not in text


def test_the_next_larger_eps_that_is_not_at_its_cap_is_shown_instead(tmp_path: Path) -> None:
    counts: dict[str, list[Count]] = {
        "0.001": [320, 320],
        "1": [9, 5],
        "0.1": [50, 30],
        "0.03": [320, 320],
        "0.01": [9, 320],
    }
    text = text_of(write(tmp_path, "ggn", counts, {"num_params": 999, "rows": 320}))
    card = text.partition("GGN: eigenvalues > ")[2]
    assert card.startswith("0.1directions with curvature")
    assert "; > 0.01 is at its cap (320), so it cannot show more3050highest, task\xa0060%" in card


def test_one_seed_at_its_cap_is_told(tmp_path: Path) -> None:
    for seed, last in enumerate((320.0, 100.0)):
        write(tmp_path / "plain" / f"seed{seed}", "ggn", {"0.01": [200, last]}, {"num_params": 999, "rows": 320})
    text = text_of(tmp_path)
    assert "at its cap (320) in 1 of 2 runs" in text


def test_caps_are_drawn_where_the_runs_of_a_method_agree(tmp_path: Path) -> None:
    for seed, rows in enumerate((320, 400)):
        write(tmp_path / "a" / f"seed{seed}", "ggn", {"0.01": [200, 100]}, {"num_params": 999, "rows": 320})
        write(tmp_path / "b" / f"seed{seed}", "ggn", {"0.01": [200, 100]}, {"num_params": 999, "rows": rows})
        write(tmp_path / "b" / f"seed{seed}", "ntk", {"0.1": [4, 4]}, {"num_params": 999, "rows": 320})
    data = data_of(write_report(tmp_path, tmp_path))
    caps = option_of(data, "ggn/eps_rank_0.01")["common_cap"]
    assert [(line["group"], line["tasks"], line["value"]) for line in caps] == [
        ("a", [0, 1], [320, 320]),
        ("b", [0, 1], [None, None]),
    ]
    assert "common_cap" not in option_of(data, "ntk/eps_rank_0.1")  # far above: the counts would lie on the ground


def test_an_interval_is_no_alarm_and_has_no_ratio(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, "hessian", {"0.01": [3940.8, (7000, 9000), (5926, 11177)]}, {"num_params": 27710}))
    row = text.partition("the same of the whole Hessian")[2]
    assert row.startswith("5926 to 11177not resolved closer7000 to 11177highest, not resolved closer")
    assert "%" not in row[:80]
    assert "\u25bc" not in text


def test_a_value_is_the_best_where_no_interval_reaches_it(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, "hessian", {"0.01": [400, (30, 399), 100]}, {"num_params": 27710}))
    assert "the same of the whole Hessian100400highest, task\xa0025%" in text
    reached = text_of(write(tmp_path / "b", "hessian", {"0.01": [400, (30, 401), 100]}, {"num_params": 27710}))
    assert "the same of the whole Hessian100400 to 401highest, not resolved closer" in reached


def test_intervals_with_one_end(tmp_path: Path) -> None:
    text = text_of(write(tmp_path, "hessian", {"0.01": [4, (9, math.inf)]}, {"num_params": 27710}))
    assert "the same of the whole Hessianat least 9not resolved closerat least 9highest, not resolved closer" in text


def steps_told(directory: Path, boundaries: list[tuple[int, str, int]]) -> str:
    for task, phase, step in boundaries:
        values = {"plasticity/features/srank": Estimate.exactly(2.0)}
        append_record(directory, TaskRecord("M", task, phase, step, values))  # type: ignore[arg-type]
    found = re.search(r"(\d+) record\(s\) were replaced", text_of(directory))
    return found[1] if found else ""


def test_records_replaced_by_another_run_are_counted(tmp_path: Path) -> None:
    once = [(0, "start", 0), (0, "end", 2)]
    assert steps_told(tmp_path / "trainers", once * 3) == "4"  # each from step 0
    assert steps_told(tmp_path / "callbacks", [*once, (0, "start", 2), (0, "end", 4)]) == "2"  # one Trainer goes on


def test_a_resumed_run_says_nothing_of_records_that_it_made_again(tmp_path: Path) -> None:
    tasks = [(0, "start", 0), (1, "start", 10), (2, "start", 20)]
    assert steps_told(tmp_path / "later", [*tasks, *tasks[1:], (3, "start", 30)]) == ""
    assert steps_told(tmp_path / "first", [tasks[0], *tasks]) == ""  # had not been past it


def test_the_demos_picture_has_the_colours_of_the_report() -> None:
    from importlib.resources import files

    script = (files("lightning_plasticity.report") / "assets" / "figures.js").read_text(encoding="utf-8")
    light = re.search(r"light: \[([^\]]*)\]", script)
    assert light
    assert list(COLOURS) == ["plain", "l2er"]
    assert list(COLOURS.values()) == re.findall(r"#\w{6}", light[1])[:2]


@pytest.mark.parametrize(
    ("metric", "last", "judged"),
    [("accuracy", 0.86, True), ("accuracy", 0.88, False), ("top1_acc", 0.86, True), ("reward", 0.5, False)],
)
def test_the_threshold_is_one_of_accuracy(metric: str, last: float, judged: bool, tmp_path: Path) -> None:
    rows = [{"method": "plain", "seed": 0, "task": task, f"online_{metric}": x} for task, x in enumerate((1.0, last))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = text_of(tmp_path)
    assert ("below 0.87 of its best." in text) == judged
