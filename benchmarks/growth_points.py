"""One point of the growth curves; run by ``growth`` in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.peers.adapters.ours import product
from benchmarks.peers.problems import Problem, mlp
from benchmarks.peers.timing import cpu_seconds, memory_mb, peak_mb, repeated
from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum
from lightning_plasticity.linalg import lanczos

CLASSES = 10


def width_of(num_params: float) -> int:
    """Of an MLP d-d-d-10 with about so many parameters."""
    return max(4, round((num_params / 2) ** 0.5 - CLASSES / 4))


def point(kind: str, num_params: float, samples: int, steps: int, min_seconds: float) -> dict[str, Any]:
    """CPU seconds, and the peak memory above network and data, of one call."""
    problem = make(num_params, samples)
    call = CALLS[kind](problem, steps)
    CALLS[kind](make(1e3, 8), 3)()  # loads code
    before = memory_mb()
    first = cpu_seconds(call)
    peak = peak_mb() - before
    seconds = repeated(call, first, min_seconds, max_calls=20)
    return {"params": problem.num_params, "seconds": seconds, "peak_mb": peak}


def make(num_params: float, samples: int) -> Problem:
    torch.manual_seed(0)
    width = width_of(num_params)
    model = mlp(width, width, width, CLASSES)
    return Problem("growth", model, torch.randn(samples, width), torch.randint(CLASSES, (samples,)))


def _hessian(problem: Problem, steps: int) -> Callable[[], Any]:
    return lambda: hessian_spectrum(problem.model, F.cross_entropy, problem.data, method="lanczos", num_steps=steps)


def _ggn(problem: Problem, steps: int) -> Callable[[], Any]:
    return lambda: ggn_spectrum(problem.model, F.cross_entropy, problem.data, max_rows=None)


def _product(problem: Problem, steps: int) -> Callable[[], Any]:
    multiply = product(problem)
    vector = torch.randn(problem.num_params)
    return lambda: multiply(vector)


def _sweeps(problem: Problem, steps: int) -> Callable[[], Any]:
    """Lanczos on a diagonal matrix: nothing but the vectors."""
    diagonal = torch.linspace(-1, 1, problem.num_params) ** 3
    start = torch.randn(problem.num_params)
    return lambda: lanczos(lambda v: v * diagonal, start, steps)


CALLS: dict[str, Callable[[Problem, int], Callable[[], Any]]] = {
    "hessian": _hessian,
    "ggn": _ggn,
    "product": _product,
    "sweeps": _sweeps,
}
