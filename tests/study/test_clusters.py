"""Studies on a cluster: a local Dask cluster of two workers, one of which dies."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from study_cases import plain_study

from lightning_plasticity.study import run_study
from lightning_plasticity.study.config import parse_study
from lightning_plasticity.study.files import read_json

HERE = str(Path(__file__).parents[1])


def _cluster(pipe: Any, local: str) -> None:
    """A scheduler and two workers in processes of their own, as on two machines; until told to stop."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=local
    ) as cluster:
        pipe.send(cluster.scheduler_address)
        pipe.recv()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of distributed, on its own sockets and on this machine's speed
@pytest.mark.parametrize("fits", ["per_task", "one"])
def test_a_worker_of_a_dask_cluster_dies_and_nothing_is_lost(
    fits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("lightning_plasticity.study.run.write_figures", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, str(Path(HERE).parent)]))
    stream = {"class_path": "study_cases.Stream", "init_args": {"num_tasks": 3}}
    dies = {"class_path": "study_cases.Dies", "init_args": {"directory": str(tmp_path), "task": 2}}
    study = plain_study(fits=fits, stream=stream, seeds=[0, 1])
    expected = run_study(parse_study(study, (HERE,)), tmp_path / "here", console=Console(file=io.StringIO()))
    study["methods"]["plain"] = {"callbacks": [dies]}
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_cluster, args=(theirs, str(tmp_path / "dask")))
    process.start()
    try:
        assert ours.poll(120), "the cluster did not start"
        outcome = run_study(
            parse_study(study, (HERE,)),
            tmp_path / "there",
            backend="dask",
            scheduler=ours.recv(),
            console=Console(file=io.StringIO()),
        )
    finally:
        ours.send("stop")
        process.join(60)
        if process.is_alive():
            process.kill()
    assert (tmp_path / "died0").exists()
    assert outcome.failures == {}
    for row, reference in zip(outcome.rows, expected.rows, strict=True):
        for key in reference.keys() - {"seconds", "measuring_seconds"}:
            assert row[key] == reference[key]
    for path in (tmp_path / "here").rglob("result.json"):
        there = tmp_path / "there" / path.relative_to(tmp_path / "here")
        assert read_json(path)["weights"] == read_json(there)["weights"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of ray, on this machine
def test_a_ray_cluster_gives_what_this_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("lightning_plasticity.study.run.write_figures", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, str(Path(HERE).parent)]))
    study = plain_study(stream={"class_path": "study_cases.Stream", "init_args": {"num_tasks": 2}}, seeds=[0, 1])
    expected = run_study(parse_study(study, (HERE,)), tmp_path / "here", console=Console(file=io.StringIO()))
    outcome = run_study(
        parse_study(study, (HERE,)), tmp_path / "there", backend="ray", console=Console(file=io.StringIO())
    )
    assert outcome.failures == {}
    assert len(outcome.rows) == len(expected.rows) > 0
    for path in (tmp_path / "here").rglob("result.json"):
        there = tmp_path / "there" / path.relative_to(tmp_path / "here")
        assert read_json(path)["weights"] == read_json(there)["weights"]
