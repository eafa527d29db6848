"""CPU seconds of whole runs on the digits networks in float32, by library and number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.nn import functional as F

from benchmarks.peers.adapters import load
from benchmarks.peers.digits_nets import network
from benchmarks.peers.problems import Problem
from benchmarks.peers.timing import cpu_seconds, repeated

SETUP_STEPS = 2  # a run of so few steps stands for what several probes share


def run_times(peer: str, names: Sequence[str], width: int, steps: Sequence[int], min_seconds: float) -> dict[str, Any]:
    """``{network: {steps: seconds}}``; ours also with what reading an estimate takes, and the exact way."""
    found: dict[str, Any] = {}
    for name in names:
        model, (inputs, targets) = network(name, width)
        problem = Problem(name, model.float(), inputs.float(), targets)
        run = load(peer).hessian
        assert run is not None
        run(problem, SETUP_STEPS)
        times = {str(m): _seconds(partial(run, problem, m), min_seconds) for m in (SETUP_STEPS, *steps)}
        found[name] = {"run": times} | (_ours(problem, steps, min_seconds) if peer == "ours" else {})
    return found


def _ours(problem: Problem, steps: Sequence[int], min_seconds: float) -> dict[str, Any]:
    from lightning_plasticity.curvature import hessian_spectrum

    reading: dict[str, list[float]] = {}
    for m in steps:
        found = hessian_spectrum(problem.model, F.cross_entropy, problem.data, method="lanczos", num_steps=m)
        counting = _seconds(partial(found.epsilon_rank, 1e-2, relative=True), min_seconds / 4)
        reading[str(m)] = [counting, cpu_seconds(found.effective_rank)]  # it remembers what it has computed
    about = {}
    for method in ("exact", "auto"):
        started = time.process_time()
        spectrum = hessian_spectrum(problem.model, F.cross_entropy, problem.data, method=method)
        about[method] = {"seconds": time.process_time() - started, "exact": spectrum.exact}
    return {"reading": reading, **about}


def _seconds(function: Callable[[], Any], min_seconds: float) -> float:
    return repeated(function, cpu_seconds(function), min_seconds, max_calls=20)
