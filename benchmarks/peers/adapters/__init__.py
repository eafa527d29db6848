"""One module for each library: the same tasks in its own words, and no more than its documentation asks for.

A task is a function of a ``Problem``. ``product`` prepares and returns the function that multiplies, and only that is
timed; the others do everything from the network to the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from benchmarks.peers.problems import Problem

Check = dict[str, float]


class NotApplicableError(Exception):
    """The library cannot do this one; the message is shown in the table."""


@dataclass(frozen=True)
class Peer:
    """What a library offers.

    Attributes:
        hessian: (problem, num_steps) -> {"lambda_max"} of one Lanczos run from one probe.
        product: problem -> function (P,) -> (P,) with one Hessian-vector product.
        ggn: problem -> {"lambda_max", "trace"} of the exact GGN spectrum.
        counts: (problem, relative eps) -> {"lambda_max", "count"}: GGN eigenvalues above eps times the largest, or an
            estimate of their number from one probe (PyHessian's is of the Hessian, the only matrix it has).
    """

    hessian: Callable[[Problem, int], Check] | None = None
    product: Callable[[Problem], Callable[[Tensor], Any]] | None = None
    ggn: Callable[[Problem], Check] | None = None
    counts: Callable[[Problem, float], Check] | None = None


# Modules are imported in the process that runs them, so that a library that is missing fails alone.
MODULES = {
    "ours": "ours:PEER",
    "ours-dual": "ours:DUAL",
    "pyhessian": "pyhessian:KEPT",
    "pyhessian-loader": "pyhessian:LOADER",
    "eigenthings": "eigenthings:PEER",
    "curvlinops": "curvlinops:PEER",
    "vivit": "vivit:PEER",
    "backpack": "backpack:PEER",
    "gemm": "gemm:PEER",
}


def load(key: str) -> Peer:
    module, attribute = MODULES[key].split(":")
    peer: Peer = getattr(import_module(f"{__name__}.{module}"), attribute)
    return peer
