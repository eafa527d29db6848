"""The command line: ``lightning-plasticity demo`` and ``study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STUDY_EXAMPLE = """\
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

Stopped or killed, the same command goes on where it was. Exit codes: 0 all finished, 1 some failed, 2 the file or the
arguments are wrong, 130 stopped by hand.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _demo(arguments: argparse.Namespace) -> int:
    from lightning_plasticity.demo import run_demo

    try:
        run_demo(arguments.seed, arguments.out, arguments.tasks, arguments.epochs)
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        return _complain(error)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from lightning_plasticity.study import StudyError, load_study, run_study

    try:
        outcome = run_study(
            load_study(arguments.config, arguments.only, arguments.seeds),
            arguments.out,
            jobs=arguments.jobs,
            backend=arguments.backend,
            scheduler=arguments.scheduler,
            rerun_changed=arguments.rerun_changed,
            reference=arguments.reference,
        )
    except KeyboardInterrupt:
        print("\nlightning-plasticity: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BlockingIOError:
        return _complain(f"another process runs a study in {arguments.out}; wait for it, or use another --out")
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, StudyError):
            return _complain(error, 2)
        return _complain(f"{type(error).__name__}: {error} (--debug shows where)")
    return 1 if outcome.failures else 0


def _complain(why: object, code: int = 1) -> int:
    print(f"lightning-plasticity: {why}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-plasticity", description="Measure and preserve a network's ability to keep learning."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a plain and an L2-ER network on a continual stream and show what happens to both",
        epilog="Example: lightning-plasticity demo --seed 1 --out demo_out",
    )
    demo.add_argument("--seed", type=int, default=0, help="of data and initial weights (default 0)")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), help="directory for the results (default demo_out)")
    demo.add_argument("--tasks", type=_positive, default=16, help="length of the stream (default 16)")
    demo.add_argument("--epochs", type=_positive, default=30, help="epochs per task (default 30)")
    demo.set_defaults(run=_demo)
    _add_study(commands)
    return parser


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="compare methods over seeds on one stream, from a YAML file",
        epilog=STUDY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the study's file")
    study.add_argument("--out", type=Path, default=Path("study_out"), help="directory for the results (study_out)")
    study.add_argument("--jobs", type=_positive, default=1, help="processes on this machine (default 1: this one)")
    study.add_argument("--only", type=_names, default=[], metavar="A,B", help="methods to run (default all)")
    study.add_argument("--seeds", type=_seeds, default=[], metavar="0,1", help="instead of the file's")
    study.add_argument("--reference", help="the method that others are compared with (default the first)")
    study.add_argument("--backend", choices=("loky", "dask", "ray"), default="loky", help="default loky: this machine")
    study.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask or Ray cluster (default a new local one)")
    study.add_argument("--rerun-changed", action="store_true", help="run units again whose settings have changed")
    study.add_argument("--debug", action="store_true", help="show tracebacks")
    study.set_defaults(run=_study)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in _names(text)]
    except ValueError:
        seeds = [-1]
    if min(seeds, default=-1) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2")
    return list(dict.fromkeys(seeds))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
