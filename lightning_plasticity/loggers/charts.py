"""TensorBoard's tab "Custom Scalars": numbers in groups, layers of one quantity in one chart, estimates with a band.

The other tabs group tags by what stands before the first slash, so that there all of ours are one group.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

Layout = dict[str, dict[str, list[Any]]]

# Estimates that always have a value. TensorBoard draws an error for a band where one of its three lines lacks a step.
BANDS = ("effective_rank", "trace", "lambda_max", "lambda_min")
SEARCHED = 2**24  # bytes at the start of an event file; a layout is written early
ANOTHER_LAYOUT = re.compile(rb"custom_scalars__config__(?!.{0,48}plasticity)", re.DOTALL)


@dataclass
class Board:
    """What a writer has been sent.

    Attributes:
        tags: of scalars, in the order of the charts.
        finite: those of them that have had a finite value.
        layout: the last one written.
    """

    tags: dict[str, None] = field(default_factory=dict)
    finite: set[str] = field(default_factory=set)
    layout: Layout = field(default_factory=dict)


_boards: WeakKeyDictionary[Any, Board] = WeakKeyDictionary()


def arrange_charts(experiment: Any, values: Mapping[str, float]) -> None:
    """Write the layout of the tab whenever there are new charts; TensorBoard takes a run's newest.

    A layout that the user wrote in the same run stays, and ours is not written.

    Args:
        experiment: a summary writer.
        values: numbers just sent, and those that were not finite.
    """
    board = _boards.setdefault(experiment, Board())
    finite = {tag for tag, value in values.items() if isfinite(value)}
    if values.keys() <= board.tags.keys() and finite <= board.finite:
        return
    board.tags |= dict.fromkeys(values)
    board.finite |= finite
    layout = layout_of(board.tags, board.finite)
    if layout != board.layout and not _has_another_layout(experiment):
        experiment.add_custom_scalars(layout)
        board.layout = layout


def layout_of(tags: Collection[str], finite: Collection[str]) -> Layout:
    """Charts by group: the path of a tag up to its quantity. The tags of layers are those that continue another tag.

    It depends on names alone, so that the layouts of several runs agree, which TensorBoard merges.

    Args:
        tags: in the order of the charts.
        finite: those with something to show.
    """
    layout: Layout = {}
    ends = {end for tag in tags for end in _interval(tag)}
    for tag in tags:
        group, _, quantity = tag.rpartition("/")
        around = [end for end in _interval(tag) if end in finite]
        if tag in ends or group in tags or not (around or tag in finite):
            continue
        charts = layout.setdefault(group, {})
        if around and quantity in BANDS:
            charts[quantity] = ["Margin", [tag, *around]]
        elif around:
            charts[quantity] = ["Multiline", [f"{re.escape(tag)}(_lower|_upper)?$"]]
        else:  # thresholds of one quantity share a chart
            lines = charts.setdefault(re.sub(r"_[\d.]+$", "", quantity), ["Multiline", []])
            lines[1].append(f"{re.escape(tag)}(/.*)?$")
    return layout


def _interval(tag: str) -> tuple[str, str]:
    return f"{tag}_lower", f"{tag}_upper"


def _has_another_layout(experiment: Any) -> bool:
    """Whether the run's files hold a layout of the user's."""
    directory = getattr(experiment, "log_dir", None) or getattr(experiment, "logdir", None)
    if directory is None or not Path(directory).is_dir():
        return False
    experiment.flush()
    for file in Path(directory).glob("*tfevents*"):
        with open(file, "rb") as content:
            if ANOTHER_LAYOUT.search(content.read(SEARCHED)):
                return True
    return False
