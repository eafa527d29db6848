"""Two real processes against one: numbers, weights, files, and that nothing waits for ever."""

from __future__ import annotations

import csv
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import CLASSES, data, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity import read_records
from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum

HERE = Path(__file__).parent
SECONDS = 150  # for all scenarios, on a busy machine; they take about 20
UNEVEN = 11
# fully_shard of torch 2.6 asks a CPU stream for an event, which it does not have.
NO_SHARDS = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot fully_shard on CPUs")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their files; launched once, also by several pytest workers."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "log").exists():
            launch(base)
    return base


def launch(base: Path, accelerator: str = "cpu") -> None:
    root = HERE.parents[1]
    paths = os.pathsep.join(map(str, (root, HERE.parent, HERE)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RANKS_ACCELERATOR": accelerator}
    with open(base / "log", "w") as log:
        command = [sys.executable, str(HERE / "worker.py"), str(base)]
        run = subprocess.Popen(
            command, cwd=base, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            run.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the ranks too
            run.wait()


@pytest.fixture(scope="module")
def found(directory: Path) -> Any:
    """What the ranks on the CPU returned."""
    return reader(directory)


def reader(directory: Path) -> Any:
    """``found(scenario)``: what each rank returned; a scenario that raised or hung fails its tests."""
    ranks = {kind: [directory / f"{kind}_{rank}.pt" for rank in range(n)] for kind, n in KINDS.items()}
    log = (directory / "log").read_text()[-2000:]
    assert all(path.exists() for paths in ranks.values() for path in paths), log
    loaded = {kind: [torch.load(path, weights_only=False) for path in paths] for kind, paths in ranks.items()}

    def get(scenario: str, kind: str = "ddp") -> list[Any]:
        results = []
        for rank, own in enumerate(loaded[kind]):
            hung = (directory / f"{kind}_{rank}.txt").read_text()
            assert scenario in own, f"{scenario} did not end on rank {rank}:\n{hung}\n{log}"
            assert not isinstance(own[scenario], str), f"{scenario} raised on rank {rank}:\n{own[scenario]}"
            results.append(own[scenario])
        return results

    get.warnings = lambda scenario: [own[f"{scenario} warnings"] for own in loaded["ddp"]]  # type: ignore[attr-defined]
    return get


KINDS = {"ddp": 2, "sharded": 2, "one": 1}


def records(result: Any, monitor: str) -> list[dict[str, Any]]:
    return [record for record in result["records"] if record["monitor"].startswith(monitor)]


def same_on_both(results: list[Any]) -> None:
    """Monitors changed nothing on any rank; weights, records and callback metrics are those of the other rank."""
    assert [result["differs"] for result in results] == [[], []]
    assert results[0]["outcome"]["weights"] == results[1]["outcome"]["weights"]
    without_files = [[{**record, "spectra": {}} for record in result["records"]] for result in results]
    assert without_files[0] == without_files[1]
    assert results[0]["metrics"] == results[1]["metrics"]


def network(state: dict[str, Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = mlp()
    if state is not None:
        net.load_state_dict(state)
    return net


def effective_rank(features: Tensor) -> float:
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def measured_as(result: Any, index: int, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """The monitors' record number ``index`` says what one process finds on this batch."""
    curvature, features = (records(result, name)[index]["values"] for name in ("Hessian", "Feature"))
    for name, spectrum in (("ggn", ggn_spectrum), ("hessian", hessian_spectrum)):
        one = spectrum(net, F.cross_entropy, batch)
        assert curvature[f"plasticity/{name}/num_samples"][0] == len(batch[0])
        assert curvature[f"plasticity/{name}/eps_rank_0.01"][0] == one.epsilon_rank(0.01).value
        for key in ("trace", "lambda_max", "lambda_min", "effective_rank"):
            expected = getattr(one, key)().value
            assert curvature[f"plasticity/{name}/{key}"][0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for layer in (1, 3):
        with torch.no_grad():
            hidden = net[: layer + 1](batch[0])
        cap, dead = min(hidden.shape), (hidden == 0).all(0).double().mean()
        key = "plasticity/features/{}/net." + str(layer)
        assert features[key.format("effective_rank")][0] == pytest.approx(effective_rank(hidden), rel=1e-5)
        assert features[key.format("max_rank")][0] == cap
        assert features[key.format("dead_units")][0] == pytest.approx(float(dead))


def first_batches() -> tuple[Tensor, Tensor]:
    """Of both ranks' streams."""
    first, second = data(10, 5), data(11, 3)
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def test_ddp_measures_one_datasets_samples_as_one_process_does(found: Any) -> None:
    results = found("map_style")
    same_on_both(results)
    start, end = network(), network(results[0]["state"])
    measured_as(results[0], 0, start, data(0, UNEVEN))
    measured_as(results[0], -1, end, data(1, UNEVEN))
    sources = {record["settings"]["data"] for record in results[0]["records"]}
    assert sources == {"training dataset"}
    assert found.warnings("map_style") == [[], []]


def test_files_and_loggers_are_written_by_rank_zero_only(found: Any, directory: Path) -> None:
    found("map_style")
    own = directory / "ddp" / "map_style"
    csv_dir = own / "csv"
    lines = (csv_dir / "plasticity.jsonl").read_text().splitlines()
    assert len(lines) == len(read_records(csv_dir)) == 8  # two monitors, two tasks, two ends
    assert len(list(csv_dir.glob("spectra/*.npz"))) == 8  # two matrices
    assert not list((own / "tb").rglob("*.npz"))
    with open(csv_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("plasticity/ggn/trace")]
    assert len(rows) == 2
    # Two fits without monitors write a file each, two with monitors too; a second rank would double them.
    assert len(list((own / "tb").rglob("events.out.*"))) == 4


def test_ranks_with_batches_of_their_own_measure_all_of_them(found: Any) -> None:
    results = found("stream")
    same_on_both(results)
    measured_as(results[0], 0, network(), first_batches())
    measured_as(results[0], -1, network(results[0]["state"]), first_batches())
    assert results[0]["outcome"]["batches"] != results[1]["outcome"]["batches"]
    assert results[0]["records"][0]["settings"]["data"] == "first batch, of 2 processes"


def test_a_run_resumed_inside_a_task_ends_it_on_all_ranks_first_batches(found: Any) -> None:
    first, second = found("resumed")
    assert first["records"] == second["records"]
    seen = [(record["phase"], record["settings"]["data"], record["failure"]) for record in first["records"]]
    assert seen == 2 * [(phase, "first batch, of 2 processes", None) for phase in ("start", "end")]
    measured_as(first, -1, network(first["state"]), first_batches())


def test_datasets_sharded_by_hand_are_measured_together_and_in_proportion(found: Any) -> None:
    results = found("pieces")
    same_on_both(results)
    measured_as(results[0], 0, network(), data(0, UNEVEN))
    few = [record for record in records(results[0], "Feature") if "few" in record["settings"]["identity"]]
    assert few[0]["settings"]["num_samples"]["net.1"] == 5  # 6 * 7 // 11 and 6 * 4 // 11
    assert few[0]["failure"] is None


def test_samples_that_a_sampler_holds_out_stay_out(found: Any) -> None:
    """Lightning wraps a user's sampler under DDP."""
    results = found("held_out")
    hidden = network()[:2](data(0, UNEVEN)[0][:6]).detach()
    for result in results:
        values = result["records"][0]["values"]
        assert values["plasticity/features/effective_rank/net.1"][0] == pytest.approx(effective_rank(hidden), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_measure_stops_nobody(found: Any, rank: int) -> None:
    results = found(f"fails on {rank}")
    same_on_both(results)
    assert len(results[0]["records"]) == 4
    failures = {record["failure"] for record in results[0]["records"]}
    why = f"rank {rank}: RuntimeError: no memory left"
    assert failures == {why, f"ggn, hessian: {why}"}
    first, second = found.warnings(f"fails on {rank}")
    assert len(first) == 2  # a monitor warns once of one cause
    assert second == []
    if rank == 1:
        measured_as(results[0], 0, network(), data(0, UNEVEN))  # rank zero's numbers are good ones
    else:
        assert all("plasticity/ggn/trace" not in record["values"] for record in results[0]["records"])


def test_probe_data_missing_on_one_rank_are_missing_on_all(found: Any) -> None:
    results = found("no_data")
    same_on_both(results)
    assert {record["failure"] for record in results[0]["records"]} == {"rank 1: OSError: disk gone"}
    assert not any(record["values"] for record in results[0]["records"])


def test_probe_data_that_differ_and_cannot_be_sent_fail_on_all_ranks(found: Any) -> None:
    results = found("unsendable")
    same_on_both(results)
    assert all("rank 1: a value cannot be sent" in record["failure"] for record in results[0]["records"])


def test_a_step_with_collectives_is_told_so_instead_of_hanging(found: Any) -> None:
    results = found("collective")
    same_on_both(results)
    for record in results[0]["records"]:
        assert "calls torch.distributed.all_gather" in record["failure"]
        assert "curvature_loss(batch)" in record["failure"]


def test_collectives_are_found_under_whatever_name(found: Any) -> None:
    for failures in found("collective_by_name"):
        assert len(failures["name"]) == len(failures["functional"]) == 2
        assert all("calls torch.distributed.ProcessGroup.allreduce" in why for why in failures["name"])
        assert all("calls torch.distributed._functional_collectives" in why for why in failures["functional"])


def test_ranks_do_as_rank_zero_plans_however_slow_they_are(found: Any) -> None:
    first, second = found("budget")
    assert first["records"] == second["records"]
    assert first["plans"] == second["plans"]
    assert len(first["plans"]["plans"]) == 1  # made once, and not all that was asked for
    assert "to stay within" in first["records"][0]["settings"]["hessian"]["budget"]


def test_early_stopping_and_checkpoints_on_our_keys_agree(found: Any) -> None:
    first, second = found("stopping")
    assert first["metrics"] == second["metrics"]
    assert first["stopped"] == second["stopped"] == 1
    assert first["best"] == second["best"]
    assert first["score"] == second["score"] == first["records"][0]["values"]["plasticity/ggn/eps_rank_0.01"][0]
    assert first["outcome"]["weights"] == second["outcome"]["weights"]


def test_labels_that_ranks_see_at_other_times_are_rank_zeros(found: Any) -> None:
    results = found("labels")
    for result in results:
        seen = [(record["task"], record["phase"], record["step"]) for record in result["records"]]
        assert seen == [(0, "start", 0), (0, "end", 2), (1, "start", 2), (1, "end", 4)]


@pytest.mark.parametrize("kind", ["mixin", "callback"])
def test_the_separate_rank_step_is_that_of_one_process_on_the_joined_minibatches(found: Any, kind: str) -> None:
    (one,) = found(kind, "one")
    first, second = found(kind)
    (plain,) = found("unregularised", "one")
    assert first["outcome"]["weights"] == second["outcome"]["weights"]
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-4, atol=1e-5)
    assert max(float((one["state"][n] - plain["state"][n]).abs().max()) for n in plain["state"]) > 1e-2


def test_minibatches_of_several_sizes_make_one_step(found: Any) -> None:
    """Without any other update, the weights are those that one process steps to on all samples."""
    (one,) = found("uneven_steps", "one")
    first, second = found("uneven_steps")
    assert first["outcome"]["weights"] == second["outcome"]["weights"]
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-4, atol=1e-6)


def test_minibatches_that_cannot_be_sent_are_stepped_on_apart_after_a_warning(found: Any) -> None:
    first, second = found("locked_steps")
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["moved"] > 1e-3
    told, silent = found.warnings("locked_steps")
    assert [text for text in told if "cannot be sent" in text] == told
    assert len(told) == 1
    assert silent == []


@pytest.mark.parametrize("remedy", ["cbp", "redo", "shrink", "reset", "rigl"])
def test_interventions_of_two_processes_are_those_of_one_on_the_joined_minibatches(found: Any, remedy: str) -> None:
    (one,) = found("remedied", "one")
    first, second = (result[remedy] for result in found("remedied"))
    one = one[remedy]
    assert first["outcome"]["weights"] == second["outcome"]["weights"]
    assert first["num_reset"] == second["num_reset"] == one["num_reset"]
    if remedy in ("cbp", "redo"):
        assert sum(one["num_reset"].values()) > 3
    for name, expected in one["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", ["l2_init", "spectral", "wasserstein"])
def test_penalties_of_two_processes_are_those_of_one_on_the_joined_minibatches(found: Any, penalty: str) -> None:
    (one,) = found("penalised", "one")
    first, second = (result[penalty] for result in found("penalised"))
    assert first["outcome"]["weights"] == second["outcome"]["weights"]
    for name, expected in one[penalty]["state"].items():
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-4, atol=1e-5)
    moved = [float((one[penalty]["state"][n] - w).abs().max()) for n, w in one["plain"]["state"].items()]
    assert max(moved) > 1e-3


def test_the_probe_of_two_processes_trains_as_that_of_one_on_all_samples(found: Any) -> None:
    """The first task's weights are the same in both; what is probed is the joined dataset."""
    (one,) = found("probing", "one")
    results = found("probing")
    same_on_both(results)
    assert one["differs"] == []
    first, expected = results[0]["records"][0], one["records"][0]
    assert [r["failure"] for r in results[0]["records"]] == [None, None]
    assert first["values"]["plasticity/trainability/num_samples"][0] == UNEVEN
    assert first["settings"]["curves"]["fresh"] != first["settings"]["curves"]["present"]
    for key in ("initial_loss", "best_loss", "area", "fresh_best_loss", "gap_to_fresh"):
        key = f"plasticity/trainability/{key}"
        assert first["values"][key] == pytest.approx(expected["values"][key], rel=1e-4), key


def test_streaming_metrics_of_two_processes_are_those_of_one(found: Any) -> None:
    (one,) = found("metrics", "one")
    assert len(one) == 12
    for result in found("metrics"):
        assert result == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("kind", [pytest.param("fully sharded", marks=NO_SHARDS), "tensor parallel"])
def test_weights_in_pieces_are_measured_whole_and_train_on_as_before(found: Any, kind: str) -> None:
    first, second = found(kind, "sharded")
    assert first["differs"] == second["differs"] == []
    assert first["pieces"]["0.weight"] == second["pieces"]["0.weight"] == (4, 16)  # of (8, 16): really cut
    assert first["records"] == second["records"]
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    measured_as(first, 0, network(), data(0, UNEVEN))
    measured_as(first, -1, network(first["state"]), data(0, UNEVEN))


@NO_SHARDS
def test_separate_steps_on_pieces_are_refused_and_penalties_act(found: Any) -> None:
    for result in found("refused", "sharded"):
        assert "EffectiveRank got ModelParallelStrategy" in result["said"]
        assert "mode='loss'" in result["said"]
        assert result["losses"] != result["plain"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_agree_as_two_processes_on_the_cpu_do(tmp_path: Path) -> None:
    launch(tmp_path, "cuda")
    found = reader(tmp_path)
    for scenario in ("map_style", "stream", "fails on 1", "no_data"):
        same_on_both(found(scenario))


def test_problem_sizes_are_what_these_tests_assume() -> None:
    assert sum(p.numel() for p in network().parameters()) < 1000  # so that the Hessian is exact
    assert CLASSES == 3
