"""A search for files of one name that ends soon, wherever it begins."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

MAX_RUNS = 500  # of one directory
MAX_DIRECTORIES = 20_000  # a mistaken directory such as / must not be searched to its end
INSTEAD = "Pass the directories of the runs themselves to see others."


def search(root: Path, name: str) -> tuple[list[Path], str]:
    """Files of that name at or below ``root``, the nearest where there are very many; and what was left out.

    Links to directories are not followed.

    Returns:
        The files in the order of their paths, and a sentence, empty where the search came to its end.
    """
    found: list[Path] = []
    waiting, searched = deque([root]), 0
    while waiting:
        if len(found) > MAX_RUNS:
            return sorted(found[:MAX_RUNS]), f"Only the nearest {MAX_RUNS} runs below {root} are shown. {INSTEAD}"
        if searched == MAX_DIRECTORIES:
            left_out = f"The search below {root} stopped after the nearest {searched} directories. {INSTEAD}"
            return sorted(found), left_out
        directory = waiting.popleft()
        searched += 1
        try:
            with os.scandir(directory) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # gone meanwhile, or not ours to read
            continue
        for entry in listed:
            if entry.name == name:
                found.append(directory / name)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(directory / entry.name)
    return sorted(found), ""
