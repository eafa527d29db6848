"""Runs each command of an installed package once, briefly: `python tests/smoke.py`, with that package's Python.

Knows nothing of the source tree, so that it tells whether a wheel has all that it needs. Without the extras a command
that needs one must say which.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

NETWORK, STREAM = "lightning_plasticity.demo.network.Plain", "lightning_plasticity.streams.RandomLabelDigits"
STUDY = f"""\
module: {NETWORK}
stream:
  class_path: {STREAM}
  init_args: {{num_tasks: 2, epochs_per_task: 1}}
seeds: [0]
online_metric: accuracy
trainer: {{accelerator: cpu}}
measure:
  - class_path: lightning_plasticity.FeatureRankMonitor
methods:
  plain:
"""
FIT = f"""\
model: {NETWORK}
data:
  class_path: {STREAM}
  init_args: {{num_tasks: 1, epochs_per_task: 1}}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: fit_out}}}}
  callbacks: [{{class_path: lightning_plasticity.FeatureRankMonitor}}]
"""


def run(directory: Path, *arguments: str, code: int = 0) -> str:
    """What a command writes; it must end with a code."""
    command = [sys.executable, "-m", "lightning_plasticity.cli", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    said = f"{' '.join(arguments)} ended with {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, said
    assert "Traceback" not in done.stderr, said
    print(f"lightning-plasticity {' '.join(arguments)}: {code}", flush=True)
    return done.stdout + done.stderr


def needs(directory: Path, package: str, *arguments: str) -> str:
    """The same, of a command that needs a package of an extra: where it is missing it must be named."""
    if find_spec(package):
        return run(directory, *arguments)
    said = run(directory, *arguments, code=1)
    assert f"pip install {package}" in said, said
    return said


def every_command(directory: Path) -> None:
    """In an empty directory."""
    (directory / "study.yaml").write_text(STUDY)
    (directory / "fit.yaml").write_text(FIT)
    assert run(directory, "--version").startswith("lightning-plasticity ")
    listed = run(directory, "--help")
    for command in ("demo", "study", "report", "measure", "fit"):
        assert command in listed
        run(directory, command, "--help")

    run(directory, "demo", "--tasks", "2", "--epochs", "1", "--out", "demo_out")
    assert set(json.loads((directory / "demo_out/summary.json").read_text())["methods"]) == {"plain", "l2er"}
    run(directory, "study", "study.yaml", "--out", "study_out")
    run(directory, "fit", "--config", "fit.yaml")
    assert list(directory.glob("fit_out/**/plasticity.jsonl"))
    found = run(directory, "measure", "--module", NETWORK, "--data", STREAM, "--samples", "16", "--json")
    assert "eps_rank" in found, found
    records = next(directory.glob("fit_out/**/plasticity.jsonl"))
    needs(directory, "plotly", "report", str(records.parent), "--out", "report.html")
    assert (directory / "report.html").exists() == bool(find_spec("plotly"))
    needs(directory, "shtab", "--print-completion=bash")
    run(directory, "report", "no/such/directory", code=2)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        every_command(Path(scratch))
