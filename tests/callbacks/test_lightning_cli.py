"""LightningCLI of either package: a file, the command line, and the saved file again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
FILE = """
trainer:
  max_epochs: 1
  limit_train_batches: 2
  limit_val_batches: 0
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger:
    class_path: {package}.loggers.CSVLogger
    init_args: {{save_dir: {folder}, name: ""}}
  callbacks:
    - class_path: lightning_plasticity.TaskTracker
      init_args: {{schedule: {{class_path: lightning_plasticity.EveryNSteps, init_args: {{n: 1}}}}}}
    - class_path: lightning_plasticity.HessianSpectrumMonitor
      init_args: {{quantities: [ggn], when: start, max_seconds: null, on_error: raise, probe_samples: 4}}
    - class_path: lightning_plasticity.Regularization
      init_args: {{regularizers: [{{class_path: lightning_plasticity.L2, init_args: {{strength: 0.25}}}}]}}
"""


@pytest.fixture(autouse=True)
def no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when a command line is there beside its ``args``."""
    monkeypatch.setattr("sys.argv", ["main.py"])


def run(package: str, *words: str) -> Any:
    cli = import_module(f"{package}.cli").LightningCLI
    return cli(
        import_module(f"{package}.demos.boring_classes").BoringModel, args=["fit", *words], seed_everything_default=0
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_and_the_file_saved_of_it(package: str, tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(FILE.format(package=package, folder=tmp_path / "logs"))
    first = run(package, "--config", str(tmp_path / "first.yaml"))
    saved = Path(first.trainer.log_dir) / "config.yaml"
    second = run(package, "--config", str(saved))
    again = Path(second.trainer.log_dir) / "config.yaml"
    assert saved != again
    assert yaml.safe_load(saved.read_text()) == yaml.safe_load(again.read_text())
    for cli in (first, second):
        tracker, monitor, regularization = ours(cli.trainer)
        assert tracker.schedule.n == 1
        assert tracker.task == 1  # two steps, two tasks
        assert monitor.budget.max_seconds is None
        assert [(record.task, record.phase, record.failure) for record in monitor.records] == [
            (0, "start", None),
            (1, "start", None),
        ]
        assert regularization.regularizers[0].strength == 0.25


def ours(trainer: Any) -> list[Any]:
    """The file's callbacks in the file's order, whatever order the Trainer has them in."""
    by_name = {type(callback).__name__: callback for callback in trainer.callbacks}
    return [by_name[name] for name in ("TaskTracker", "HessianSpectrumMonitor", "Regularization")]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_line(package: str) -> None:
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    cli = run(
        package,
        *(f"--trainer.{name}=false" for name in quiet),
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=lightning_plasticity.HessianSpectrumMonitor",
        "--trainer.callbacks.quantities=[ggn]",
        "--trainer.callbacks.eps=[0.25,1]",
        "--trainer.callbacks.max_seconds=null",
        "--trainer.callbacks+=lightning_plasticity.FeatureRankMonitor",
        "--trainer.callbacks.layers=[layer]",
    )
    by_name = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert by_name["HessianSpectrumMonitor"].quantities == ("ggn",)
    assert by_name["HessianSpectrumMonitor"].eps == (0.25, 1.0)
    assert by_name["FeatureRankMonitor"].records[0].failure is None
    assert "plasticity/features/srank/layer" in by_name["FeatureRankMonitor"].records[0].values
