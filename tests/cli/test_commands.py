"""The commands from outside: help, version, exit codes, errors in one line, JSON, completion."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_plasticity.cli import main
from lightning_plasticity.cli.common import to_json
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.records import TaskRecord, append_record

ROOT = Path(__file__).parents[2]
COMMANDS = ("demo", "study", "report", "measure", "fit")


def stopped(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys\nfrom lightning_plasticity.cli import main\n"
        "for words in ([], ['demo'], ['study'], ['report'], ['measure'], ['fit']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'matplotlib', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"lightning-plasticity {command} " in shown
    assert "Exit codes: 0 all went well" in shown
    assert "--debug" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("--version") == 0
    assert capsys.readouterr().out == f"lightning-plasticity {importlib.metadata.version('lightning-plasticity')}\n"


def test_without_a_command_there_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(command in shown.err for command in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("--print-completion", shell) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in (*COMMANDS, "--matrix"))
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        # What bash would offer after "lightning-plasticity s".
        asked = f"{script}\nCOMP_WORDS=(lightning-plasticity s); COMP_CWORD=1\n"
        asked += "$(complete -p | sed 's/.*-F \\([^ ]*\\).*/\\1/') && echo \"${COMPREPLY[@]}\""
        offered = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
        assert offered.stdout.split() == ["study"], offered.stderr


def offered(line: str, script: str, folder: Path) -> set[str]:
    """What bash offers at the end of a line: the function of the script, called as bash calls it."""
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    asked = f"{script}\nCOMP_WORDS=({' '.join(words[:-1])} {words[-1]!r}); COMP_CWORD={len(words) - 1}\n"
    asked += "$(complete -p lightning-plasticity | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
    asked += "printf '%s\\n' \"${COMPREPLY[@]}\""
    run = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, cwd=folder)
    return set(run.stdout.split())


def test_names_of_files_are_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("--print-completion", "bash") == 0
    script = capsys.readouterr().out
    (tmp_path / "base_run").mkdir()
    (tmp_path / "base.yaml").write_text("")
    directory, both = {"base_run"}, {"base_run", "base.yaml"}
    for line, expected in {
        "report ba": directory,
        "report base_run ba": directory,
        "report base_run --out ba": both,
        "study ba": both,
        "study --out ba": directory,
        "demo --out ba": directory,
        "measure --data ba": both,
        "measure --checkpoint ba": both,
        "measure --out ba": directory,
        "fit --config ba": both,
        "fit --ckpt_path ba": both,
        "measure --matrix n": {"ntk"},
        "measure --module ba": set(),
    }.items():
        assert offered(f"lightning-plasticity {line}", script, tmp_path) == expected, line


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["demo"], ["study", "study.yaml"]])
def test_a_file_in_the_way_is_named(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(
        "module: lightning_plasticity.demo.network.Plain\nstream: lightning_plasticity.streams.RandomLabelDigits\n"
        "methods: {a: }\n"
    )
    (tmp_path / "file").write_text("")
    command = [str(tmp_path / word) if word.endswith("yaml") else word for word in command]
    for place in ("file", "file/below"):
        assert main([*command, "--out", str(tmp_path / place)]) == 2
        assert f"cannot be a directory: {tmp_path / 'file'} is a file" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_directory_without_permission_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    try:
        assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    finally:
        tmp_path.chmod(0o700)
    assert "cannot be written: Permission denied. Give another --out." in capsys.readouterr().err


def test_errors_are_one_line_and_debug_shows_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr("lightning_plasticity.demo.run_demo", broken)
    words = ["demo", "--out", str(tmp_path)]
    assert main(words) == 1
    assert capsys.readouterr().err == "lightning-plasticity: ZeroDivisionError: mine (--debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        main([*words, "--debug"])

    def stopped_by_hand(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_plasticity.demo.run_demo", stopped_by_hand)
    assert main(words) == 130


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_json_is_valid_whatever_was_found() -> None:
    found = {"a": float("nan"), "b": [float("inf"), 1.5, True, None], 3: {"path": Path("x")}}
    assert json.loads(to_json(found)) == {"a": None, "b": [None, 1.5, True, None], "3": {"path": "x"}}


# ---- report --------------------------------------------------------------------------------------------------------


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the page of all runs, and says where it is."""
    runs, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "report.html"
    for run in runs:
        run.mkdir()
    words = ["report", *map(str, runs), "--out", str(out)]
    assert main(words) == 2
    assert "plasticity.jsonl" in capsys.readouterr().err
    for run, value in zip(runs, (12.5, 37.5), strict=True):
        values = {"plasticity/weights/norm": Estimate.exactly(value)}
        append_record(run, TaskRecord("FeatureRankMonitor", 0, "start", 0, values, {}, 0.1, None))
    assert main(words) == 0
    assert str(out) in capsys.readouterr().out
    assert all(number in out.read_text() for number in ("12.5", "37.5"))
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"report": str(out), "directories": [str(run) for run in runs]}
    assert main(["report", str(tmp_path / "c")]) == 2
    assert "c is not there, expected a directory" in capsys.readouterr().err
