"""The command line: ``lightning-plasticity demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    from lightning_plasticity.demo import run_demo

    try:
        run_demo(arguments.seed, arguments.out, arguments.tasks, arguments.epochs)
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"lightning-plasticity: {error}", file=sys.stderr)
        return 1
    return 0


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
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number >= 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
