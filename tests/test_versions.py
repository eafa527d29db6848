"""The lower bounds that `make test-oldest` installs are those that pyproject.toml promises."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

OLDEST = Path(__file__).with_name("oldest.txt")
WHERE_NEEDED = {"pyparsing", "six", "protobuf"}  # of packages that ours pull in


def pins() -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?==(\S+)", line) for line in OLDEST.read_text().splitlines())
    return {match[1].lower(): match[2] for match in found if match}


def bounds() -> dict[str, str]:
    """Lower bounds of the dependencies and of the tests' own, from the file: an editable install may be an old one."""
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    project = toml.loads((OLDEST.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(line for name in ("rl", "report", "completion", "test") for line in extras[name]),
    ]
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement) for requirement in requirements)
    return {match[1].lower(): match[2] for match in found if match}


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_oldest_is_the_lower_bounds() -> None:
    assert len(bounds()) > 10
    pinned = {name: numbers(version) for name, version in pins().items() if name not in WHERE_NEEDED}
    assert pinned == {name: numbers(version) for name, version in bounds().items()}
