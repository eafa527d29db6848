"""What commands share: exit codes, types of arguments, and where words and JSON go."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

OK, FAILED, USAGE, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 130, 141
EXIT_CODES = (
    "Exit codes: 0 all went well, 1 something failed, 2 the arguments or a file are wrong, 130 stopped by hand,\n"
    "141 nobody reads the output any more."
)
Found = tuple[int, dict[str, Any]]  # what a command's ``run`` returns: exit code, and what ``--json`` prints


MAX_SEED = 2**32 - 1  # NumPy's, and so Lightning's


class UsageError(Exception):
    """The arguments or a file that they name are wrong: exit code 2."""


class Interrupted(Exception):  # noqa: N818
    """Stopped by hand; the text says how to go on. Exit code 130."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and not its whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise it as ``UsageError``."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, summary: str, example: str, **options: Any) -> argparse.ArgumentParser:
    """A command's parser, with an example and the exit codes under its help, and ``--debug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{example.strip()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object to standard output, of an error too, and all else to standard error",
    )


def completes(action: argparse.Action, kind: Literal["FILE", "DIRECTORY"]) -> None:
    """Let completion offer names of files or directories for it; ``kind`` is a name in shtab, which may be missing."""
    action.completes = kind  # type: ignore[attr-defined]


def by_hand(stop: BaseException) -> bool:
    """Whether Ctrl-C is behind it; Lightning makes a ``SystemExit`` of it."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def complain(why: object, code: int = FAILED) -> int:
    """Say it on standard error; returns the exit code."""
    print(f"lightning-plasticity: {why}", file=sys.stderr)
    return code


def to_json(found: Mapping[str, Any]) -> str:
    """One line of valid JSON: numbers that are not finite become null, paths text."""
    return json.dumps(_plain(found), allow_nan=False)


def new_directory(path: Path) -> Path:
    """The directory, made when missing.

    Raises:
        UsageError: for one that cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (probe := path / ".lightning_plasticity_write_test").touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        in_the_way = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
        raise UsageError(
            f"--out {path} cannot be a directory: {in_the_way} is a file. Move it, or give another --out."
        ) from error
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}. Give another --out.") from error
    return path


def names(text: str) -> list[str]:
    """``A,B`` as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def seed(text: str) -> int:
    """A whole number that every library takes as a seed."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def seeds(text: str) -> list[int]:
    """``0,1,2`` as a list, each once."""
    if not names(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2")
    return list(dict.fromkeys(seed(name) for name in names(text)))


def positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def threshold(text: str) -> float:
    """A finite number of at least zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value


def seconds(text: str) -> float:
    """A finite number above zero."""
    if (value := threshold(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
