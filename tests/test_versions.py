"""The lower bounds that `make test-oldest` installs are those that pyproject.toml promises."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

OLDEST = Path(__file__).with_name("oldest.txt")
WHERE_NEEDED = {"pyparsing"}  # of packages that ours pull in


def pins() -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?==(\S+)", line) for line in OLDEST.read_text().splitlines())
    return {match[1].lower(): match[2] for match in found if match}


def bounds() -> dict[str, str]:
    """Lower bounds of the dependencies and of the tests' own."""
    found = {}
    for requirement in importlib.metadata.requires("lightning-plasticity") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        match = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
        if match and (extra is None or extra[1] == "test"):
            found[match[1].lower()] = match[2]
    return found


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


def test_oldest_is_the_lower_bounds() -> None:
    assert len(bounds()) > 10
    pinned = {name: numbers(version) for name, version in pins().items() if name not in WHERE_NEEDED}
    assert pinned == {name: numbers(version) for name, version in bounds().items()}
