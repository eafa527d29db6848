"""What no count of eigenvalues can exceed: the rows that a GGN or NTK was measured with, the size of the Hessian."""

from __future__ import annotations

import re
from typing import Any

from lightning_plasticity.records import TaskRecord

MATRICES = ("ggn", "hessian", "ntk")
Caps = dict[int, float]  # by task


def cap_of(record: TaskRecord, measure: str) -> float | None:
    """The cap of a count (``ggn/eps_rank_0.01``, ``ntk/relative_eps_rank_0.1``) in a record; None where there is none.

    N samples give the GGN of a softmax N (C - 1) eigenvalues that are not zero, the NTK N C: the ``rows`` that were
    recorded. None has more than there are parameters.
    """
    matrix, _, rest = measure.partition("/")
    about: Any = record.settings.get(matrix)
    if matrix not in MATRICES or not re.match(r"(relative_)?eps_rank_", rest) or not isinstance(about, dict):
        return None
    sizes = [about.get("num_params"), about.get("rows") if matrix != "hessian" else None]
    known = [float(size) for size in sizes if isinstance(size, int | float) and size > 0]
    return min(known, default=None)
