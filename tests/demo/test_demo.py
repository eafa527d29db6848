"""The demo and its command: what it writes, and (slow) what it shows."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from report_cases import data_of, option_of

from lightning_plasticity import Spectrum, read_records
from lightning_plasticity.cli import main
from lightning_plasticity.demo.lines import PrefixedLines
from lightning_plasticity.demo.network import L2ER, Plain

ROOT = Path(__file__).parents[2]
KEYS = ("online_accuracy", "ggn_eps_rank_0.01", "effective_rank", "dead_units")


def run(out, *arguments):
    assert main(["demo", "--out", str(out), *arguments]) == 0
    return json.loads((out / "summary.json").read_text())


def test_short_demo_writes_all_it_promises(tmp_path, capfd):
    summary = run(tmp_path / "out", "--seed", "3", "--tasks", "2", "--epochs", "2")
    assert set(summary["methods"]) == {"plain", "l2er"}
    assert summary["seconds"] > 0
    for numbers in summary["methods"].values():
        assert set(numbers) == set(KEYS)
        assert all(len(values) == 2 for values in numbers.values())
        assert all(0 <= accuracy <= 1 for accuracy in numbers["online_accuracy"])
        assert all(0 <= share <= 1 for share in numbers["dead_units"])
    # The same seed gives both networks the same start.
    for key in KEYS[1:]:
        assert summary["methods"]["plain"][key][0] == summary["methods"]["l2er"][key][0]
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    directory = tmp_path / "out" / "tensorboard" / "plain" / "seed3"
    records = [record for record in read_records(directory) if record.spectra]
    assert [record.task for record in records] == [0, 1]
    spectrum = Spectrum.load(directory / records[1].spectra["ggn"])
    assert spectrum.epsilon_rank(0.01).value == summary["methods"]["plain"]["ggn_eps_rank_0.01"][1]
    assert spectrum.num_samples == 150
    assert list(directory.glob("events.out.tfevents.*"))
    shown = capfd.readouterr().out
    assert "Seed 3" in shown
    assert "tensorboard --logdir" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line[:4].strip().isdecimal()]
    assert rows == ["0", "1"]  # as records, spectra and messages count
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in shown
    data = data_of(tmp_path / "out" / "report.html")
    assert data["groups"] == [{"name": "plain", "runs": 1}, {"name": "l2er", "runs": 1}]
    for measure, key in (("ggn/eps_rank_0.01", KEYS[1]), ("online_accuracy", KEYS[0])):
        for line in option_of(data, measure)["lines"]:
            assert line["value"] == pytest.approx(summary["methods"][line["group"]][key], rel=1e-5)


def test_a_second_run_replaces_the_first_and_json_is_the_summary(tmp_path, capfd):
    run(tmp_path, "--tasks", "1", "--epochs", "1")
    capfd.readouterr()
    summary = run(tmp_path, "--tasks", "1", "--epochs", "1", "--json")
    shown = capfd.readouterr()
    assert json.loads(shown.out) == summary
    assert shown.out.count("\n") == 1
    assert "Seed 0" in shown.err
    assert len(summary["methods"]["plain"]["online_accuracy"]) == 1
    assert len(list((tmp_path / "tensorboard" / "plain" / "seed0").glob("events.out.tfevents.*"))) == 1


def test_l2er_differs_from_plain_by_the_mixin_only():
    torch.manual_seed(0)
    plain = Plain()
    torch.manual_seed(0)
    l2er = L2ER()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), l2er.parameters(), strict=True))
    assert (l2er.rank_strength, l2er.rank_every_n_steps, l2er.l2_strength) == (0.1, 8, 1e-4)


@pytest.mark.parametrize("arguments", [["demo", "--tasks", "0"], ["demo", "--epochs", "x"], ["nonsense"], []])
def test_bad_arguments_end_with_usage(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # without a command there is the help
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert "usage: lightning-plasticity" in said if not arguments else said.startswith("lightning-plasticity: ")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("lightning-plasticity: ")


def test_lines_of_two_processes_do_not_mix():
    shown = io.StringIO()
    plain, l2er = PrefixedLines(shown, "[plain] "), PrefixedLines(shown, "[L2-ER] ")
    for piece in ("one ", "line\nand", " another\n", "\n", "no end"):
        plain.write(piece)
        l2er.write(piece)
    lines = ["one line", "and another", ""]
    assert shown.getvalue() == "".join(f"[{name}] {line}\n" for line in lines for name in ("plain", "L2-ER"))


WORKER = """
import logging, sys, warnings
logging.basicConfig(stream=sys.stderr, format="%(message)s")
sys.path.insert(0, "lightning_plasticity/demo")  # without torch
from lines import prefix_output
prefix_output("[plain] ")
print("printed")
warnings.warn("warned")
logging.warning("logged")
raise ZeroDivisionError("raised")
"""


def test_all_that_a_process_writes_has_its_prefix():
    run = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, cwd=ROOT)
    lines = [*run.stdout.splitlines(), *run.stderr.splitlines()]
    assert all(line.startswith("[plain] ") for line in lines)
    for word in ("printed", "warned", "logged", "ZeroDivisionError: raised"):
        assert sum(word in line for line in lines) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plain_loses_plasticity_and_l2er_keeps_it(tmp_path, seed):
    """Bounds with room around three reference seeds of an independent implementation (plain .12-.16, L2-ER .82-.83)."""
    methods = run(tmp_path, "--seed", str(seed))["methods"]
    plain, l2er = methods["plain"], methods["l2er"]
    assert plain["online_accuracy"][-1] < 0.25
    assert l2er["online_accuracy"][-1] > 0.75
    assert l2er["ggn_eps_rank_0.01"][-1] > 10 * plain["ggn_eps_rank_0.01"][-1]
    assert l2er["effective_rank"][-1] > 5 * plain["effective_rank"][-1]
