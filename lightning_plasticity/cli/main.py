"""The parser of all commands, and what happens to their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from typing import Any

from lightning_plasticity._optional import require
from lightning_plasticity.cli import demo, fit, measure, report, study
from lightning_plasticity.cli.common import (
    EXIT_CODES,
    INTERRUPTED,
    OK,
    USAGE,
    Interrupted,
    UsageError,
    complain,
    to_json,
)

COMMANDS = (demo, study, report, measure, fit)
SHELLS = ("bash", "zsh")
EPILOG = f"lightning-plasticity COMMAND --help shows a command's options and an example.\n\n{EXIT_CODES}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = make_parser()
    words, rest = fit.split(list(sys.argv[1:] if argv is None else argv))
    if not words:
        parser.exit(USAGE, parser.format_help())
    arguments = parser.parse_args(words)
    arguments.rest = rest
    as_json = getattr(arguments, "json", False)
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            code, found = arguments.run(arguments)
    except (KeyboardInterrupt, Interrupted) as stop:
        return complain(str(stop) or "stopped", INTERRUPTED)
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, UsageError):
            return complain(error, USAGE)
        return complain(f"{type(error).__name__}: {error} (--debug shows where)")
    if as_json:
        print(to_json(found))
    return int(code)


def make_parser() -> argparse.ArgumentParser:
    """With all commands."""
    parser = argparse.ArgumentParser(
        prog="lightning-plasticity",
        description="Measure and preserve a network's ability to keep learning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"lightning-plasticity {version('lightning-plasticity')}"
    )
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=SHELLS, help="print a completion script")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints the script for a shell and ends."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            shtab = require("shtab", "Completion")
        except ModuleNotFoundError as error:
            parser.exit(complain(error))
        print(shtab.complete(parser, shell=values))
        parser.exit(OK)
