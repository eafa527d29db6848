"""Slippery Ant, scaled to minutes: plain PPO and PPO with L2-ER over changes of friction, next to a random policy.

    python benchmarks/slippery_ant.py --seeds 3

One process, one thread. Writes benchmarks/results/slippery_ant.{json,md} and docs/images/slippery_ant.png; runs that
are in the JSON already are not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, Regularization
from lightning_plasticity.rl import PPO, policy_nll
from lightning_plasticity.streams import SlipperyAnt

ROOT = Path(__file__).parents[1]
# Against the paper: larger steps and minibatches, 16 ants, lambda 0.9, less noise, normalised observations.
STREAM = {"num_tasks": 5, "change_every": 51_200, "rollout_steps": 2048, "num_envs": 16, "num_minibatches": 16}
MODULE = {"lr": 3e-4, "gae_lambda": 0.9, "initial_std": 0.4, "normalize_observations": True}
CLIP_NORM = 0.5
METHODS: dict[str, Any] = {
    "plain": None,
    "l2er": {"rank_strength": 1e-3, "rank_every_n_steps": 16, "l2_strength": 1e-3},
}
MEASURES = {
    "actor features": "features/effective_rank/actor.net.1",
    "critic features": "features/effective_rank/critic.1",
    "actor dead": "features/dead_units/actor.net.1",
    "critic dead": "features/dead_units/critic.1",
    "actor GGN, eps 0.1": "actor/ggn/eps_rank_0.1",
    "critic GGN, eps 0.1": "critic/ggn/eps_rank_0.1",
    "actor GGN, relative eps 0.01": "actor/ggn/relative_eps_rank_0.01",
    "critic GGN, relative eps 0.01": "critic/ggn/relative_eps_rank_0.01",
    "weights": "weights/norm",
}


def train(method: str, seed: int, out: Path, **sizes: Any) -> dict[str, Any]:
    """Episodes and measures of one run."""
    L.seed_everything(seed, verbose=False)
    stream = SlipperyAnt(**(STREAM | {"seed": seed} | sizes))
    # No bound on seconds: what is measured must not depend on how busy the machine is.
    common: Any = {"quantities": ("ggn",), "probe_samples": 192, "when": "start", "save_dir": str(out)}
    common |= {"max_seconds": None, "max_memory": 2**30}
    monitors = [
        HessianSpectrumMonitor(name="actor", objective="actor", params="actor.*", loss_fn=policy_nll, **common),
        HessianSpectrumMonitor(name="critic", objective="critic", params="critic.*", **common),
        FeatureRankMonitor(when="start", save_dir=str(out)),
    ]
    regularizers = [Regularization.l2er(**METHODS[method])] if METHODS[method] else []
    started = time.perf_counter()
    L.Trainer(
        max_epochs=stream.num_tasks * stream.epochs_per_task,
        accelerator="cpu",
        gradient_clip_val=CLIP_NORM,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*monitors, *regularizers],
    ).fit(PPO(**MODULE), datamodule=stream)
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for task in range(stream.num_tasks):
        found = {k: v for monitor in monitors for r in monitor.records if r.task == task for k, v in r.values.items()}
        for name, key in MEASURES.items():
            estimate = found.get(f"plasticity/{key}")
            values[name].append(math.nan if estimate is None else float(estimate.value))
    return {
        "method": method,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "frictions": [stream.friction_of(task) for task in range(stream.num_tasks)],
        "episodes": [[round(value, 3) for value in row] for row in stream.episodes],
        "measures": values,
    }


class Uniform:
    """Actions drawn uniformly within the limits, in place of a policy."""

    device = torch.device("cpu")
    gamma, gae_lambda = 0.99, 0.9

    def normalized(self, observations: torch.Tensor) -> torch.Tensor:
        return observations.float()

    def act(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.erf(noise / math.sqrt(2)), torch.zeros(len(noise))  # the normal's distribution, from 0..1 to -1..1

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        return torch.zeros(observations.shape[:-1])

    def after_rollout(self, observations: torch.Tensor) -> None: ...


class Still(Uniform):
    """No torque at all."""

    def act(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(noise), torch.zeros(len(noise))


def untrained(policy: Any, seed: int) -> dict[str, Any]:
    """Episodes of a policy that does not learn, in the same worlds; each ant can reach the time limit."""
    stream = SlipperyAnt(**(STREAM | {"seed": seed, "num_envs": 4, "change_every": 4096}))
    stream.trainer = argparse.Namespace(lightning_module=policy)  # type: ignore[assignment]
    for _ in range(stream.num_tasks * stream.epochs_per_task):
        stream.collect()
    return {"method": type(policy).__name__.lower(), "seed": seed, "episodes": stream.episodes}


# ---- report ---------------------------------------------------------------------------------------------------------


def by_task(run: dict[str, Any], column: int, half: bool = True) -> list[float]:
    """Mean of a column over each task's episodes; of those that end in its second half, of trained policies."""
    rows = np.array(run["episodes"])
    means = []
    for task in range(STREAM["num_tasks"]):
        own = rows[rows[:, 0] == task]
        late = own[:, 1] > (task + 0.5) * STREAM["change_every"]
        own = own[late] if half and late.any() else own
        means.append(float(own[:, column].mean()) if len(own) else math.nan)
    return means


def of_seeds(values: list[float], digits: int = 0) -> str:
    """Mean and its standard error over seeds."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{fmean(values):.{digits}f} ± {error:.{digits}f}"


def report(runs: list[dict[str, Any]]) -> str:
    """Tables."""
    methods = [name for name in ("uniform", "still", *METHODS) if any(run["method"] == name for run in runs)]
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; mean ± standard error over seeds. For PPO the episodes that end in the",
        "second half of each friction's steps, for the policies that do not learn all episodes.",
        "",
        "| policy | return | of that forward | steps | return by task |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        half = method in METHODS
        table = {column: [by_task(run, column, half) for run in own] for column in (2, 3, 4)}
        cells = [of_seeds([fmean(row) for row in table[column]]) for column in (2, 4, 3)]
        tasks = " / ".join(of_seeds(list(column)) for column in zip(*table[2], strict=True))
        lines.append(f"| {method} | {' | '.join(cells)} | {tasks} |")
    lines += ["", "At the start of each task, on the new friction's first rollout:", ""]
    heads = " | ".join(f"task {task}" for task in range(STREAM["num_tasks"]))
    lines += [f"| measure | policy | {heads} |", "|---|---|" + "---|" * STREAM["num_tasks"]]
    for name in MEASURES:
        for method in (m for m in methods if m in METHODS):
            columns = zip(*(run["measures"][name] for run in runs if run["method"] == method), strict=True)
            digits = 2 if "dead" in name else 1
            lines.append(f"| {name} | {method} | {' | '.join(of_seeds(list(c), digits) for c in columns)} |")
    trained = [run for run in runs if run["method"] in METHODS]
    lines += ["", "Frictions: " + "; ".join(_frictions(run) for run in trained if run["method"] == "plain") + "."]
    return "\n".join([*lines, f"Seconds a run: {', '.join(str(round(run['seconds'])) for run in trained)}.", ""])


def _frictions(run: dict[str, Any]) -> str:
    return f"seed {run['seed']} " + ", ".join(f"{value:.3f}" for value in run["frictions"])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Returns and forward progress over environment steps, a thin line a seed, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    width = 10_240
    edges = np.arange(0, STREAM["num_tasks"] * STREAM["change_every"] + 1, width)
    for axes, column, title in zip(figure.subplots(1, 2), (2, 4), ("episode return", "of that forward"), strict=True):
        for method, colour in (
            ("uniform", "grey"),
            ("still", "tab:green"),
            ("plain", "tab:blue"),
            ("l2er", "tab:orange"),
        ):
            own = [np.array(run["episodes"]) for run in runs if run["method"] == method]
            if not own:
                continue
            if method not in METHODS:
                axes.axhline(float(np.concatenate(own)[:, column].mean()), color=colour, ls="--", label=method)
                continue
            lines = [_binned(rows[:, 1], rows[:, column], edges) for rows in own]
            middle = (edges[1:] + edges[:-1]) / 2
            for line in lines:
                axes.plot(middle, line, color=colour, lw=0.6, alpha=0.5)
            mean = [
                fmean(found) if (found := [v for v in bin_ if not math.isnan(v)]) else math.nan
                for bin_ in zip(*lines, strict=True)
            ]
            axes.plot(middle, mean, color=colour, lw=2, label=f"PPO {method}")
        for task in range(1, STREAM["num_tasks"]):
            axes.axvline(task * STREAM["change_every"], color="lightgrey", lw=1)
        axes.set(title=title, xlabel="environment steps")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _binned(steps: Any, values: Any, edges: Any) -> list[float]:
    index = np.digitize(steps, edges) - 1
    return [float(values[index == k].mean()) if (index == k).any() else math.nan for k in range(len(edges) - 1)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "slippery_ant.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = args.results / "slippery_ant.json"
    settings = {"stream": STREAM, "module": MODULE, "methods": METHODS, "clip": CLIP_NORM}
    kept = json.loads(path.read_text()) if path.exists() else {}
    runs = kept["runs"] if kept.get("settings") == settings else []
    wanted = [(name, seed) for name in ("uniform", "still", *args.methods) for seed in range(args.seeds)]
    for method, seed in wanted:
        if any((run["method"], run["seed"]) == (method, seed) for run in runs):
            continue
        if method in METHODS:
            run = train(method, seed, args.results / "slippery_ant_records" / f"{method}{seed}")
        else:
            run = untrained(Uniform() if method == "uniform" else Still(), seed)
        runs.append(run)
        print(
            f"{method}, seed {seed}: {len(run['episodes'])} episodes, return by task "
            f"{[round(value, 1) for value in by_task(run, 2, method in METHODS)]}",
            flush=True,
        )
        path.write_text(json.dumps({"settings": settings, "runs": runs}))
        (args.results / "slippery_ant.md").write_text(report(runs))
    draw(runs, args.image)
    print(report(runs))


if __name__ == "__main__":
    main()
