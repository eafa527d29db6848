"""The studies of Slippery Ant: both files can be run, and a cut one ends as one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium.envs.mujoco.ant_v5")

from lightning_plasticity.rl import PPO
from lightning_plasticity.streams import SlipperyAnt
from lightning_plasticity.study import load_study, unit
from lightning_plasticity.study.unit import assemble, run_unit

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.mark.parametrize(("name", "steps"), [("slippery_ant", 51_200), ("slippery_ant_paper", 2_000_000)])
def test_files_make_what_they_name(name: str, steps: int, tmp_path: Path) -> None:
    for made in load_study(STUDIES / f"{name}.yaml").units()[:2]:
        parts = assemble(made, tmp_path)
        assert isinstance(parts.module, PPO)
        assert isinstance(parts.stream, SlipperyAnt)
        assert (parts.stream.change_every, parts.stream.seed) == (steps, made.seed)
        assert [getattr(callback, "name", None) for callback in parts.callbacks][1:4] == ["actor", "critic", None]


def test_a_cut_study_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, l2er) = load_study(STUDIES / "slippery_ant.yaml", seeds=(0,)).units()
    sizes = {"num_tasks": 2, "change_every": 128, "rollout_steps": 64, "num_envs": 2, "num_minibatches": 2, "passes": 2}
    settings: dict[str, Any] = l2er.settings | {
        "stream": l2er.settings["stream"] | {"init_args": sizes},
        "module": l2er.settings["module"] | {"init_args": l2er.settings["module"]["init_args"] | {"hidden": [8]}},
    }
    tiny = replace(l2er, settings=settings)
    whole = run_unit(tiny, tmp_path / "whole")["result"]
    assert [row["steps"] for row in whole["rows"]] == [8, 8]
    for row in whole["rows"]:
        assert -3 < row["online_reward"] < 3
        assert row["actor/ggn/num_samples"] == row["critic/ggn/num_samples"] == 64

    assembled = unit.assemble

    def cut_in_task_one(*args: Any) -> Any:
        parts = assembled(*args)
        tell = parts.stream.collect

        def collect() -> None:
            if parts.stream.task_id == 0 and parts.stream.steps == 128:
                raise KeyError("cut")
            tell()

        parts.stream.collect = collect
        return parts

    monkeypatch.setattr(unit, "assemble", cut_in_task_one)
    assert "cut" in run_unit(tiny, tmp_path / "cut")["error"]
    monkeypatch.setattr(unit, "assemble", assembled)
    resumed = run_unit(tiny, tmp_path / "cut")["result"]
    assert resumed["weights"] == whole["weights"]
    told = [[{k: v for k, v in row.items() if "seconds" not in k} for row in r["rows"]] for r in (whole, resumed)]
    assert told[0] == told[1]
