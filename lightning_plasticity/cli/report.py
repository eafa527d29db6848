"""``lightning-plasticity report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_plasticity.cli.common import OK, Found, UsageError, add_command, add_json, completes

SUMMARY = "make one page with the numbers and pictures of one run or several"
EXAMPLE = """
Example: lightning-plasticity report lightning_logs/version_0 lightning_logs/version_1 --out report.html

A directory is one that a monitor wrote plasticity.jsonl to: a logger's, or a monitor's save_dir. Accuracies and losses
come from metrics.csv (CSVLogger) and TensorBoard files in it, below it, or else in the directory above.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "report", SUMMARY, EXAMPLE)
    runs = parser.add_argument("directories", type=Path, nargs="+", metavar="LOGDIR", help="a run's directory")
    completes(runs, "DIRECTORY")
    out = parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file (default report.html)")
    completes(out, "FILE")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a series that the run logged, such as val_acc; may be repeated (default: accuracies, returns, losses)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Found:
    """Write the report; the JSON says where it is."""
    for directory in arguments.directories:
        if not directory.is_dir():
            raise UsageError(f"{directory} is {'a file' if directory.exists() else 'not there'}, expected a directory.")
    from lightning_plasticity.report import ReportError, write_report

    try:
        written = write_report(arguments.directories, arguments.out, metrics=arguments.metric)
    except ReportError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(
            f"--out {arguments.out}: {error.filename or arguments.out}: {error.strerror or error}. Give another --out, "
            "in a directory that can be written."
        ) from error
    print(f"Report: {written}")
    return OK, {"report": written, "directories": arguments.directories}
