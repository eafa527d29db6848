"""Reports on what crashed, failed, was cut short, or comes from another version; and names that are HTML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_cases import Seen, data_of, option_of, write_run, write_study

from lightning_plasticity.report import ReportError, write_report
from lightning_plasticity.report.page import embed

HOSTILE = "<img src=x onerror=alert(1)></script ><script>alert(2)</script>&amp;%{y}"


def report(directory: Path) -> tuple[dict[str, Any], str]:
    page = write_report(directory, directory / "report.html")
    return data_of(page), Seen(page).text


def line(**fields: Any) -> str:
    return json.dumps({"monitor": "M", "task": 0, "phase": "start", "step": 0, "values": {}, **fields}) + "\n"


def test_nothing_to_report_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"does not exist; pass a run's log directory"):
        write_report(tmp_path / "nowhere", tmp_path / "r.html")
    with pytest.raises(ReportError, match=r"No plasticity.jsonl and no results.jsonl of a study in .*expected what"):
        write_report(tmp_path, tmp_path / "r.html")
    with pytest.raises(ReportError, match="at least one"):
        write_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_without_plotly_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ModuleNotFoundError, match="pip install plotly"):
        write_report(write_run(tmp_path / "run"), tmp_path / "r.html")


def test_an_empty_file_is_a_run_that_has_measured_nothing(tmp_path: Path) -> None:
    (tmp_path / "plasticity.jsonl").write_text("")
    data, text = report(tmp_path)
    assert data["sections"] == data["heat"] == data["alerts"] == []
    assert "1 run, 0 tasks, 0 measurements." in text
    assert "Nothing failed" in text


def test_only_failures_are_listed_once_each_with_their_tasks(tmp_path: Path) -> None:
    lines = [line(task=task, failure="RuntimeError: weights hold NaN", seconds=0.1) for task in range(3)]
    (tmp_path / "plasticity.jsonl").write_text("".join(lines))
    data, text = report(tmp_path)
    assert data["sections"] == []
    assert "M at 3 task boundaries, task 0 (start), 1 (start), 2 (start): RuntimeError: weights hold NaN" in text
    assert "3 measurements failed" in text


def test_values_that_are_not_finite_stay_gaps(tmp_path: Path) -> None:
    key = "plasticity/trainability/steps_to_target"
    rows = [["nan", 101.0, "inf"], [40.0, 35.0, 40.0], ["inf", "inf", "inf"], ["nan", "nan", "nan"]]
    (tmp_path / "plasticity.jsonl").write_text("".join(line(task=k, values={key: row}) for k, row in enumerate(rows)))
    data, _ = report(tmp_path)
    (found,) = option_of(data, "trainability/steps_to_target")["lines"]
    assert found["value"] == [None, 40, "inf", None]
    assert found["lower"] == [101, 35, "inf", None]
    assert found["upper"] == ["inf", 40, "inf", None]


def test_a_half_written_line_is_named_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with open(tmp_path / "run" / "plasticity.jsonl", "a") as file:
        file.write('{"monitor": "M", "task": 4, "pha')
    data, text = report(tmp_path / "run")
    assert option_of(data, "weights/norm")["lines"][0]["tasks"] == [0, 1, 2, 3]
    assert "1 line(s) were cut short" in text


def test_records_of_other_versions(tmp_path: Path) -> None:
    lines = [
        json.dumps({"monitor": "M", "task": 0, "values": {"plasticity/features/srank": 3.5}}),
        json.dumps({"monitor": "M", "task": 1, "values": {"plasticity/features/srank": [2.5]}, "later": {"a": 1}}),
        json.dumps({"monitor": "M", "task": 2, "values": {"plasticity/features/srank": None}, "spectra": None}),
        json.dumps({"monitor": "M", "task": 3}),
        json.dumps({"task": 4}),
        json.dumps([1, 2]),
    ]
    (tmp_path / "plasticity.jsonl").write_text("\n".join(lines))
    data, text = report(tmp_path)
    (found,) = option_of(data, "features/srank")["lines"]
    assert found["tasks"] == [0, 1, 2]
    assert found["value"] == [3.5, 2.5, None]
    assert "1 line(s) are no records" in text
    assert "1 line(s) were cut short or are no JSON" in text


def test_spectra_that_are_gone_or_broken_are_named(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    files = sorted((directory / "spectra").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"PK half of a file")
    data, text = report(directory)
    assert data["heat"][0]["tasks"] == [2, 3]
    assert "run: 1 file(s) of spectra that the records name are not there." in text
    assert "run: 1 file(s) of spectra could not be read, the first hessian_task0001_start.npz" in text


def test_one_task(tmp_path: Path) -> None:
    data, text = report(write_run(tmp_path / "run", num_tasks=1))
    assert option_of(data, "weights/norm")["lines"][0]["value"] == [3]
    assert "1 run, 1 task, 1 measurement." in text


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    key = f"plasticity/features/srank/{HOSTILE}"
    text = line(monitor=HOSTILE, values={key: [1.0, 1.0, 1.0]}, settings={HOSTILE: HOSTILE}, failure=HOSTILE)
    (tmp_path / "x <b>&" / "seed0").mkdir(parents=True)
    (tmp_path / "x <b>&" / "seed0" / "plasticity.jsonl").write_text(text)
    page = write_report(tmp_path, tmp_path / "report.html")
    data, seen = data_of(page), Seen(page)
    assert data["groups"][0]["name"] == "x <b>&"
    assert option_of(data, f"features/srank/{HOSTILE}")["lines"][0]["value"] == [1]
    tags = [tag for tag, _ in seen.elements]
    assert tags.count("script") == 3  # data, plotly, ours
    assert "img" not in tags
    assert "b" not in tags
    assert HOSTILE in seen.text


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("plasticity.jsonl", None, "plasticity.jsonl could not be read (Is a directory)"),
        ("plasticity.jsonl", "[" * 100_000 + "\n", "plasticity.jsonl: 1 line(s) were cut short or are no JSON"),
        ("plasticity.jsonl", line(step=1e30) + line(task=10**400), "2 line(s) are no records of this package"),
        ("metrics.csv", "step,acc\n1,0.5\n1e30,0.75\n", "1 row(s) are at a step that no run reaches"),
        ("metrics.csv", "step,acc,plasticity/task\n1,0.5,1e30\n", ""),
        ("metrics.csv", None, "metrics.csv could be read in part at most (IsADirectoryError"),
        ("summary.json", "[" * 100_000, ""),
    ],
)
def test_one_bad_file_leaves_the_report_of_all_others(
    tmp_path: Path, name: str, content: str | None, note: str
) -> None:
    write_run(tmp_path / "good")
    bad = tmp_path / ("" if name == "summary.json" else "bad")
    if name == "metrics.csv":
        write_run(bad)
    bad.mkdir(exist_ok=True)
    if content is None:
        (bad / name).mkdir()
    else:
        (bad / name).write_text(content)
    data, text = report(tmp_path)
    assert "good" in [found["group"] for found in option_of(data, "weights/norm")["lines"]]
    assert note in text
    if name == "metrics.csv" and content:
        assert [found["value"] for found in option_of(data, "logged/acc")["lines"]] == [[0.5]]


@pytest.mark.parametrize(
    "row",
    [
        {"model": "x", "acc": 0.5},
        {"method": "x", "seed": 0, "task": "digits", "acc": 0.5},
        {"method": None, "seed": 0, "task": 0},
        {"method": "x", "task": 0},
        {"method": "x", "seed": 0, "task": 10**400},
    ],
)
def test_results_of_another_program_do_not_hide_runs(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ReportError, match=r"no results\.jsonl of a study in"):
        report(tmp_path)
    write_run(tmp_path / "version_0")
    assert [group["name"] for group in report(tmp_path)[0]["groups"]] == ["version_0"]


def test_rows_that_are_no_studys_are_a_note(tmp_path: Path) -> None:
    write_study(tmp_path)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"model": "x", "acc": 0.5}\n{"method": "plain", "seed": 0, "task": 4, "acc": 1' + "0" * 400 + "}\n")
    data, text = report(tmp_path)
    assert [group["name"] for group in data["groups"]] == ["plain", "other"]
    assert "results.jsonl: 1 line(s) are no rows of a study." in text


def test_a_search_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/deep/er", "b", "c"):
        write_run(tmp_path / name, num_tasks=1)
    (tmp_path / "again").symlink_to(tmp_path)
    monkeypatch.setattr("lightning_plasticity.report.search.MAX_RUNS", 2)
    data, text = report(tmp_path)
    assert [group["name"] for group in data["groups"]] == ["b", "c"]
    assert f"Only the nearest 2 runs below {tmp_path} are shown. Pass the directories of the runs themselves" in text
    monkeypatch.setattr("lightning_plasticity.report.search.MAX_RUNS", 3)  # as many as there are
    data, text = report(tmp_path)
    assert [group["name"] for group in data["groups"]] == ["a/deep/er", "b", "c"]
    assert "the nearest" not in text
    monkeypatch.setattr("lightning_plasticity.report.search.MAX_DIRECTORIES", 3)
    data, text = report(tmp_path)
    assert [group["name"] for group in data["groups"]] == ["b"]
    assert f"The search below {tmp_path} stopped after the nearest 3 directories. Pass the directories" in text
    monkeypatch.setattr("lightning_plasticity.report.search.MAX_DIRECTORIES", 1)
    with pytest.raises(ReportError, match=r"stopped after the nearest 1 directories\. Pass"):
        report(tmp_path)


def test_names_that_the_locale_cannot_spell(tmp_path: Path) -> None:
    write_run(tmp_path / "größe")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")  # no UTF-8 at all
    (tmp_path / "größe" / "plasticity.jsonl").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff/plasticity.jsonl"))
    write_run(tmp_path / "größe" / "version_0")
    command = [sys.executable, "-m", "lightning_plasticity.cli", "report", str(tmp_path), "--out", str(tmp_path)]
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(data_of(tmp_path / "report.html")["groups"]) == 2


def test_embedded_json_cannot_end_its_script() -> None:
    text = embed({"a": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_a_study_that_is_half_done(tmp_path: Path) -> None:
    write_study(tmp_path)
    other = tmp_path / "units" / "other"
    (tmp_path / "results.jsonl").unlink()  # is written at the end
    (other / "seed0" / "result.json").unlink()
    (other / "seed0" / "error.txt").write_text("ValueError: out of luck\n\nTraceback")
    (other / "seed1" / "plasticity.jsonl").unlink()
    data, text = report(tmp_path)
    assert {group["name"]: group["runs"] for group in data["groups"]} == {"plain": 2, "other": 2}
    lines = {x["group"]: x for x in option_of(data, "online_accuracy")["lines"]}
    assert lines["plain"]["runs"] == [2] * 4
    assert "runs" not in lines["other"]
    assert "ValueError: out of luck" in text


def test_a_study_whose_units_are_gone(tmp_path: Path) -> None:
    rows = [
        {
            "method": "a",
            "seed": s,
            "task": t,
            "ggn/eps_rank_0.01": 5 + s + t,
            "ggn/eps_rank_0.01_lower": 4,
            "loss": None,
        }
        for s in range(2)
        for t in range(3)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _ = report(tmp_path)
    (found,) = option_of(data, "ggn/eps_rank_0.01")["lines"]
    assert found["value"] == [5.5, 6.5, 7.5]
    assert data["heat"] == []
