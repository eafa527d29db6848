"""The parser of all commands, and what happens to their errors."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.metadata import version
from typing import Any

from lightning_plasticity._optional import require
from lightning_plasticity.cli import demo, fit, measure, report, study
from lightning_plasticity.cli.common import (
    CLOSED_PIPE,
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    Interrupted,
    Parser,
    UsageError,
    complain,
    to_json,
)

COMMANDS = (demo, study, report, measure, fit)
SHELLS = ("bash", "zsh")
EPILOG = f"lightning-plasticity COMMAND --help shows a command's options and an example.\n\n{EXIT_CODES}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # what is left would be an error at the end of Python, where nobody catches it
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(words: list[str]) -> int:
    parser = make_parser()
    words, rest = fit.split(words)
    if not words:
        parser.exit(USAGE, parser.format_help())
    as_json, debug = "--json" in words, "--debug" in words
    try:
        arguments = parser.parse_args(words)
        arguments.rest = rest
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            code, found = arguments.run(arguments)
    except (KeyboardInterrupt, Interrupted) as stop:
        code, why = INTERRUPTED, str(stop) or "stopped"
    except UsageError as error:
        if debug and error.__cause__ is not None:
            raise
        code, why = USAGE, str(error)
    except Exception as error:
        if debug or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        code, why = FAILED, f"{type(error).__name__}: {error} (--debug shows where)"
    else:
        if as_json:
            print(to_json(found))
        return int(code)
    if as_json:
        print(to_json({"error": why}))
    return complain(why, code)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, as in ``... | head -1``."""
    try:
        (waiting := select.poll()).register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in waiting.poll(0))
    except (AttributeError, OSError, ValueError):  # not on this system, or no file at all
        return False


def make_parser() -> Parser:
    """With all commands."""
    parser = Parser(
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
        for action in _actions(parser):
            if kind := getattr(action, "completes", None):
                action.complete = getattr(shtab, kind)
        print(shtab.complete(parser, shell=values))
        parser.exit(OK)


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """All arguments, those of the commands too."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
