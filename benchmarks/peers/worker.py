"""Runs the jobs it is given in one process and prints one line of JSON for each; ``run`` starts it."""

from __future__ import annotations

import json
import resource
import sys
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import problems
from benchmarks.peers.adapters import NotApplicableError, Peer, load
from benchmarks.peers.cases import EPS
from benchmarks.peers.timing import cpu_seconds, memory_mb, peak_mb, repeated

# Tasks that need no adapter: (module, function), called with the job's arguments.
OWN = {
    "penalty": ("peers.ranks", "penalty"),
    "streaming": ("peers.ranks", "streaming"),
    "boundary": ("peers.boundary", "boundary"),
    "step-memory": ("peers.boundary", "step_memory"),
    "measurement-memory": ("peers.boundary", "measurement_memory"),
    "run-times": ("peers.run_times", "run_times"),
    "growth": ("growth_points", "point"),
}
MAX_BYTES = 12 * 2**30  # a library that leaks must not take the machine with it


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``{"seconds", "peak_mb", "check"}``, or ``{"failed": why}``."""
    if job["task"] in OWN:
        return _own_measurement(job)
    try:
        peer = load(job["peer"])
        task = getattr(peer, job["task"])
        if task is None:
            return {"failed": "not offered"}
        _warm_up(peer, job)
        problem = problems.make(job["problem"])
        # Fused attention cannot be differentiated twice; ours switches it off by itself.
        with sdpa_kernel(SDPBackend.MATH):
            return _measure(job, task, problem)
    except NotApplicableError as error:
        return {"failed": str(error)}
    except Exception as error:  # what a library cannot do is a result
        text = " ".join(str(error).split())
        if "t allocate memory" in text:
            return {"failed": f"ran out of the {MAX_BYTES / 2**30:.0f} GiB that a process may take here"}
        return {"failed": f"{type(error).__name__}: {text[:200]}"}


def _measure(job: dict[str, Any], task: Any, problem: problems.Problem) -> dict[str, Any]:
    before, check = memory_mb(), {}
    if job["task"] == "product":
        dtype = next(problem.model.parameters()).dtype
        vector = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        multiply = partial(task(problem), vector.to(dtype))
        found = multiply()
        if found is not None:
            parts = [found] if isinstance(found, torch.Tensor) else found
            check["vHv"] = float(torch.cat([part.reshape(-1) for part in parts]).double() @ vector)
        first = cpu_seconds(multiply)
        return _result(repeated(multiply, first, job["min_seconds"]), before, check)
    arguments = {"hessian": (job.get("steps"),), "counts": (EPS,)}.get(job["task"], ())

    def call() -> None:
        check.update(task(problem, *arguments))

    first = cpu_seconds(call)
    peak = peak_mb()
    return _result(repeated(call, first, job["min_seconds"], max_calls=50), before, check, peak)


def _result(seconds: float, before: float, check: dict[str, float], peak: float | None = None) -> dict[str, Any]:
    return {"seconds": seconds, "peak_mb": (peak_mb() if peak is None else peak) - before, "check": check}


def _warm_up(peer: Peer, job: dict[str, Any]) -> None:
    """First calls load code and start thread pools."""
    small = problems.make("tiny-8")
    if job["task"] == "product":
        assert peer.product is not None
        multiply = peer.product(small)
        multiply(torch.randn(small.num_params, dtype=torch.float64))
    else:
        arguments = {"hessian": (3,), "counts": (EPS,)}.get(job["task"], ())
        getattr(peer, job["task"])(small, *arguments)


def _own_measurement(job: dict[str, Any]) -> dict[str, Any]:
    module, function = OWN[job["task"]]
    measure = getattr(import_module(f"benchmarks.{module}"), function)
    return measure(**job["arguments"])


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for job in json.loads(sys.argv[1]):
        print("RESULT " + json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()
