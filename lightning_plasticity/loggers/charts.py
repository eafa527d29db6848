"""TensorBoard's tab "Custom Scalars": numbers in groups, layers of one quantity in one chart, estimates with a band.

The other tabs group tags by what stands before the first slash, so that there all of ours are one group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

Layout = dict[str, dict[str, list[Any]]]

SEARCHED = 2**24  # bytes at the start of an event file; a layout is written early
ANOTHER_LAYOUT = re.compile(rb"custom_scalars__config__(?!.{0,48}plasticity)", re.DOTALL)


@dataclass
class Board:
    """What a writer has been sent.

    Attributes:
        tags: of scalars, in order.
        gaps: tags that were missing where their interval was not; TensorBoard refuses to draw a band around those.
        layout: the last one written.
    """

    tags: dict[str, None] = field(default_factory=dict)
    gaps: set[str] = field(default_factory=set)
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
    sent = {tag for tag, value in values.items() if isfinite(value)}
    new = dict.fromkeys(tag for tag in values if tag in sent and tag not in board.tags)
    gaps = {tag for tag in values if 0 < len(sent & {tag, *_interval(tag)}) < 3 and not sent.isdisjoint(_interval(tag))}
    if not new and gaps <= board.gaps:
        return
    board.tags |= new
    board.gaps |= gaps
    layout = layout_of(board.tags, board.gaps)
    if layout != board.layout and not _has_another_layout(experiment):
        experiment.add_custom_scalars(layout)
        board.layout = layout


def layout_of(tags: Mapping[str, None], gaps: set[str]) -> Layout:
    """Charts by group: the path of a tag up to its quantity. The tags of layers are those that continue another tag.

    Args:
        tags: in the order of the groups.
        gaps: tags to be drawn as lines, with the ends of their intervals.
    """
    layout: Layout = {}
    ends = {end for tag in [*tags, *gaps] for end in _interval(tag)}
    for tag in dict.fromkeys([*tags, *gaps]):
        group, _, quantity = tag.rpartition("/")
        if tag in ends or group in tags:
            continue
        charts = layout.setdefault(group, {})
        around = [end for end in _interval(tag) if end in tags]
        if around and tag not in gaps:
            charts[quantity] = ["Margin", [tag, *around]]
        elif around:
            charts[quantity] = ["Multiline", [f"{re.escape(one)}$" for one in (tag, *around)]]
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
