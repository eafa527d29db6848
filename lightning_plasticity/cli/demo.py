"""``lightning-plasticity demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_plasticity.cli.common import OK, Found, add_command, add_json, completes, new_directory, positive, seed

SUMMARY = "train a plain and an L2-ER network on a continual stream and show what happens to both"
EXAMPLE = """
Example: lightning-plasticity demo --seed 1 --out demo_out

It takes about a minute. The table counts tasks from 0, as records, spectra and messages do.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "demo", SUMMARY, EXAMPLE)
    parser.add_argument("--seed", type=seed, default=0, help="of data and initial weights (default 0)")
    out = parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="directory for the results (default demo_out)"
    )
    completes(out, "DIRECTORY")
    parser.add_argument("--tasks", type=positive, default=16, help="length of the stream (default 16)")
    parser.add_argument("--epochs", type=positive, default=30, help="epochs per task (default 30)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Found:
    """Run the demo; the JSON is that of ``summary.json``."""
    out = new_directory(arguments.out)
    from lightning_plasticity.demo import run_demo

    return OK, run_demo(arguments.seed, out, arguments.tasks, arguments.epochs)
