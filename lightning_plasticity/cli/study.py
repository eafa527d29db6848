"""``lightning-plasticity study``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_plasticity.cli.common import (
    FAILED,
    OK,
    Found,
    Interrupted,
    UsageError,
    add_command,
    add_json,
    by_hand,
    completes,
    names,
    new_directory,
    positive,
    seeds,
)

SUMMARY = "compare methods over seeds on one stream, from a YAML file"
EXAMPLE = """\
Example, a file study.yaml:

  module: lightning_plasticity.demo.network.Plain     # any LightningModule, by import path
  stream:                                             # any LightningDataModule with num_tasks and task_id
    class_path: lightning_plasticity.streams.RandomLabelDigits
    init_args: {num_tasks: 16, epochs_per_task: 30}
  fits: per_task                                      # a new optimizer for each task; or "one": its state is kept
  online_metric: accuracy                             # from training_step's dict, or what it logs
  seeds: [0, 1, 2, 3, 4]
  methods:
    plain:
    l2er:
      regularizers:
        - {class_path: lightning_plasticity.EffectiveRank, init_args: {strength: 0.1}}
        - {class_path: lightning_plasticity.L2, init_args: {strength: 1e-4}}

  lightning-plasticity study study.yaml --out study_out --jobs 2

Stopped or killed, the same command goes on where it was.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "study", SUMMARY, EXAMPLE)
    config = parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the study's file")
    completes(config, "FILE")
    out = parser.add_argument("--out", type=Path, default=Path("study_out"), help="directory for results (study_out)")
    completes(out, "DIRECTORY")
    parser.add_argument("--jobs", type=positive, default=1, help="processes on this machine (default 1: this one)")
    parser.add_argument("--only", type=names, default=[], metavar="A,B", help="methods to run (default all)")
    parser.add_argument("--seeds", type=seeds, default=[], metavar="0,1", help="instead of the file's")
    parser.add_argument("--reference", help="the method that others are compared with (default the first)")
    parser.add_argument("--backend", choices=("loky", "dask", "ray"), default="loky", help="default loky: this machine")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask or Ray cluster (default a new local one)")
    parser.add_argument("--rerun-changed", action="store_true", help="run units again whose settings have changed")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Found:
    """Run the study; the JSON holds the table's rows, and why units failed."""
    from lightning_plasticity.study import StudyError, load_study, run_study

    try:
        study = load_study(arguments.config, arguments.only, arguments.seeds)
        outcome = run_study(
            study,
            new_directory(arguments.out),
            jobs=arguments.jobs,
            backend=arguments.backend,
            scheduler=arguments.scheduler,
            rerun_changed=arguments.rerun_changed,
            reference=arguments.reference,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        if not by_hand(stop):
            raise
        raise Interrupted("stopped; the same command goes on from here") from None
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process runs a study in {arguments.out}; wait for it, or use another --out"
        ) from error
    except StudyError as error:
        if arguments.debug:
            raise
        raise UsageError(str(error)) from error
    found = {"out": arguments.out, "finished": outcome.finished, "failures": outcome.failures, "rows": outcome.rows}
    return FAILED if outcome.failures else OK, found
