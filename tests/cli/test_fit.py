"""``fit``: the example's file trains, with its own callbacks; errors and interrupts have their exit codes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_plasticity import read_records
from lightning_plasticity.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "fit.yaml"
SHORT = ("--data.num_tasks=2", "--data.epochs_per_task=1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=2",
         "--trainer.reload_dataloaders_every_n_epochs=1", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false")  # fmt: skip


def words(folder: Path) -> list[str]:
    text = EXAMPLE.read_text().replace("fit_out", str(folder / "fit_out")).replace("{n: 10}", "{n: 1}")
    (folder / "fit.yaml").write_text(text)
    return ["fit", "--config", str(folder / "fit.yaml"), *SHORT]


def test_the_example_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path)) == 0
    (directory,) = (tmp_path / "fit_out").glob("*/version_0")
    records = read_records(directory)
    assert [(r.monitor, r.task, r.failure) for r in records] == [
        (monitor, task, None) for task in (0, 1) for monitor in ("HessianSpectrumMonitor", "FeatureRankMonitor")
    ]
    assert "EffectiveRank" in (directory / "config.yaml").read_text()
    assert f"to see it: lightning-plasticity report {directory}" in capsys.readouterr().out


def test_what_is_wrong_is_an_error_of_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "give --config FILE" in capsys.readouterr().err
    assert main([*words(tmp_path), "--trainer.nonsense=3"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["fit", "--config", str(tmp_path / "none.yaml")]) == 2


def test_an_error_in_training_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Any = ZeroDivisionError("mine")

    def step(*args: Any) -> None:
        raise broken

    monkeypatch.setattr("lightning_plasticity.demo.network.Plain.training_step", step)
    plain = [*words(tmp_path), "--trainer.callbacks=[]"]
    assert main(plain) == 1
    assert "ZeroDivisionError: mine (--debug shows where)" in capsys.readouterr().err
    broken, before = KeyboardInterrupt(), signal.getsignal(signal.SIGINT)
    try:
        assert main(plain) == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--config=nowhere.yaml", "File does not exist"),
        ("--trainer.max_epochs=abc", "Expected a <class 'int'>"),
        ("--trainer.max_epoch=1", "--trainer.max_epoch=1"),  # no abbreviations
    ],
)
def test_what_lightnings_parser_refuses_is_one_line(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(tmp_path), setting]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-plasticity: ")
    assert message in said
    assert said.count("\n") == 1
    assert "usage" not in said
