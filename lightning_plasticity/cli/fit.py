"""``lightning-plasticity fit``: LightningCLI, with this package's streams and callbacks at hand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_plasticity.cli.common import FAILED, OK, Found, Interrupted, UsageError, add_command, by_hand, completes

OWN = ("-h", "--help", "--debug", "--all-settings")  # the rest is LightningCLI's
SUMMARY = "train from a YAML file: Lightning's own command line, with streams, monitors and methods by class path"
EXAMPLE = """
Example: lightning-plasticity fit --config examples/fit.yaml --trainer.max_epochs 4

Everything else goes to LightningCLI: --config, --print_config, --trainer.*, --model.*, --data.*, and
--trainer.callbacks+=lightning_plasticity.FeatureRankMonitor. Model and data are given by import path, from installed
packages and the current directory.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "fit", SUMMARY, EXAMPLE, usage="lightning-plasticity fit [--config FILE] [SETTING ...]"
    )
    # For help and completion alone: ``split`` leaves them to LightningCLI.
    completes(parser.add_argument("--config", metavar="FILE", help="a YAML file; the later of several wins"), "FILE")
    completes(parser.add_argument("--ckpt_path", metavar="FILE", help="a checkpoint to go on from"), "FILE")
    parser.add_argument("--all-settings", action="store_true", help="list all settings of LightningCLI, and end")
    parser.set_defaults(run=run)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """What the parser of all commands reads, and what LightningCLI reads."""
    if words[:1] != ["fit"]:
        return words, []
    own = [word for word in words[1:] if word in OWN]
    return ["fit", *own], [word for word in words[1:] if word not in OWN]


def run(arguments: argparse.Namespace) -> Found:
    """Fit; the rest of the command line is in ``arguments.rest``."""
    if not arguments.rest and not arguments.all_settings:
        raise UsageError("fit has nothing to train; give --config FILE, or see fit --help and fit --all-settings.")
    from lightning.pytorch.cli import LightningCLI

    import lightning_plasticity.callbacks
    import lightning_plasticity.streams  # noqa: F401  # named without their module, classes are found among those imported
    from lightning_plasticity.loggers import log_directory
    from lightning_plasticity.records import FILE_NAME

    words = ["--help"] if arguments.all_settings else arguments.rest
    # An error in one line without the usage of all settings, and no --trainer.max_epoch for max_epochs.
    strict = {"exit_on_error": False, "allow_abbrev": False}
    with _command_line("fit", *words):
        try:
            trainer = LightningCLI(
                save_config_kwargs={"overwrite": True}, parser_kwargs={**strict, "fit": {**strict}}
            ).trainer
        except argparse.ArgumentError as error:
            why = " ".join(str(error).split())
            raise UsageError(f"{why} (see lightning-plasticity fit --all-settings)") from error
        except SystemExit as stop:
            if by_hand(stop):
                raise Interrupted("training was stopped by hand") from None
            return stop.code if isinstance(stop.code, int) else FAILED if stop.code else OK, {}
    directory = log_directory(trainer.loggers)
    if directory is not None and (directory / FILE_NAME).exists() and trainer.is_global_zero:
        print(f"What was measured is in {directory / FILE_NAME}; to see it: lightning-plasticity report {directory}")
    return OK, {}


@contextmanager
def _command_line(*words: str) -> Iterator[None]:
    """LightningCLI reads ``sys.argv``: given words beside it, it warns."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["lightning-plasticity", *words]
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
