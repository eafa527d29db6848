"""Where units run: this process, processes on this machine, or a Dask or Ray cluster, all through joblib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import joblib

from lightning_plasticity._optional import require
from lightning_plasticity.study.config import Unit
from lightning_plasticity.study.unit import run_unit

Backend = Literal["loky", "dask", "ray"]
BACKENDS = ("loky", "dask", "ray")


class WorkersDied(RuntimeError):  # noqa: N818 - it is an event, not a mistake of the caller
    """Worker processes ended without an answer; some units have finished, some have not."""


@contextmanager
def connected(backend: Backend, scheduler: str | None) -> Iterator[None]:
    """Inside, joblib sends work to that backend.

    Args:
        backend: ``"loky"`` for processes on this machine, ``"dask"`` or ``"ray"`` for a cluster.
        scheduler: its address; None for a new local cluster.

    Raises:
        ModuleNotFoundError: without the packages of a cluster.
        OSError: when the scheduler does not answer.
    """
    with ExitStack() as stack:
        if backend == "dask":
            distributed = require("distributed", "The backend dask")
            stack.enter_context(distributed.Client(scheduler) if scheduler else distributed.Client())
        elif backend == "ray":
            ray = require("ray", "The backend ray")
            require("ray.util.joblib", "The backend ray").register_ray()
            ray.init(address=scheduler)
            stack.callback(ray.shutdown)
        stack.enter_context(joblib.parallel_config(backend))
        yield


def run_all(units: Sequence[Unit], out: Path, jobs: int, backend: Backend) -> list[dict[str, Any]]:
    """The outcomes of ``run_unit`` for all units, in their order.

    Args:
        units: what to run.
        out: the study's directory.
        jobs: processes on this machine; 1 is this process. A cluster uses all its workers.
        backend: as in ``connected``, whose context must be open.

    Raises:
        WorkersDied: when a worker was killed and the backend gave up.
    """
    calls = [joblib.delayed(run_unit)(unit, unit.directory(out)) for unit in units]
    workers = jobs if backend == "loky" else -1
    try:
        return list(joblib.Parallel(n_jobs=workers, batch_size=1, pre_dispatch="all")(calls))
    except Exception as error:
        if type(error).__name__ in ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker"):
            raise WorkersDied(f"{error}") from error
        raise
