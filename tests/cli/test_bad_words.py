"""Words that mean nothing: exit code 2, and one line that says what to do; with ``--json`` on standard output too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_plasticity.cli import main
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.records import TaskRecord, append_record

ROOT = Path(__file__).parents[2]
MEASURE = ("measure", "--module", "lightning_plasticity.demo.network.Plain", "--samples", "8",
           "--data", "lightning_plasticity.streams.RandomLabelDigits")  # fmt: skip
SEED = "is not a whole number from 0 to 4294967295"
WRONG = {
    "demo, negative seed": (["demo", "--seed", "-1"], f"--seed: '-1' {SEED}"),
    "demo, huge seed": (["demo", "--seed", str(10**23)], SEED),
    "study, huge seed": (["study", "x.yaml", "--seeds", f"0,{10**23}"], SEED),
    "measure, negative seed": ([*MEASURE, "--seed", "-1"], SEED),
    "no time": ([*MEASURE, "--max-seconds", "0"], "--max-seconds: '0' is not a number > 0"),
    "no such parameter": (
        [*MEASURE, "--params", "nosuch*"],
        "--params: ['nosuch*'] match nothing; those that exist: net.",
    ),
    "binary study": (["study", "binary"], "is not text; expected a YAML file in UTF-8"),
    "abbreviation": (["demo", "--epoch", "1"], "unrecognized arguments: --epoch 1 (see lightning-plasticity --help)"),
    "no command": (["dmo"], "invalid choice: 'dmo'"),
    "report below a file": (["report", "run", "--out", "binary/x.html"], "--out binary/x.html"),
    "report where none can be": (["report", "run", "--out", "/proc/x.html"], "--out /proc/x.html"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a binary file and a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "run").mkdir()
    values = {"plasticity/weights/norm": Estimate.exactly(1.0)}
    append_record(tmp_path / "run", TaskRecord("FeatureRankMonitor", 0, "start", 0, values, {}, 0.1, None))
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_one_line_and_exit_code_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = WRONG[case]
    if "/proc/x.html" in words and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    assert main(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("lightning-plasticity: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert main([*words, "--json"]) == 2
    shown = capsys.readouterr()
    assert (
        message.removesuffix(" (see lightning-plasticity --help)").removesuffix(" 1") in json.loads(shown.out)["error"]
    )
    assert shown.out.count("\n") == 1
    assert shown.err == f"lightning-plasticity: {json.loads(shown.out)['error']}\n"


@pytest.mark.skipif(os.name != "posix", reason="a pipe as shells make them")
@pytest.mark.parametrize("python", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [("report", "run"), ("--help",), ("study", "binary", "--json")])
def test_a_pipe_that_nobody_reads_ends_without_words(
    words: tuple[str, ...], python: tuple[str, ...], folder: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, *python, "-m", "lightning_plasticity.cli", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(writing)
    assert ended.stderr == ""
    # argparse takes it for success when its help cannot be written.
    assert ended.returncode in ((0, 141) if words == ("--help",) else (141,))


def test_another_broken_pipe_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **options: object) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("lightning_plasticity.demo.run_demo", broken)
    assert main(["demo"]) == 1
    assert "BrokenPipeError: of a worker" in capsys.readouterr().err
