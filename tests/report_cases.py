"""Log directories as monitors write them, small and by hand, and what a report's page holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from lightning_plasticity import Spectrum
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.records import TaskRecord, append_record

NUM_PARAMS = 40


def spectrum_of(task: int, seed: int = 0) -> Spectrum:
    """Twelve eigenvalues over eight decades, some negative, the rest of the 40 zero."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    sizes = 10 ** (torch.rand(12, generator=generator, dtype=torch.float64) * 8 - 5)
    signs = torch.where(torch.rand(12, generator=generator) < 0.3, -1.0, 1.0)
    return Spectrum.from_eigenvalues(sizes * signs, NUM_PARAMS, matrix="hessian", num_samples=30, resolution=1e-4)


def values_of(task: int, seed: int = 0) -> dict[str, Estimate]:
    return {
        "plasticity/hessian/eps_rank_0.01": Estimate(20.0 - task + seed, 18.0 - task + seed, 23.0 - task + seed),
        "plasticity/features/srank": Estimate.exactly(9.0 - task),
        "plasticity/features/srank/net.1": Estimate.exactly(8.0 - task),
        "plasticity/features/max_rank/net.1": Estimate.exactly(16.0),
        "plasticity/features/dead_units": Estimate.exactly(0.1 * task),
        "plasticity/weights/norm": Estimate.exactly(3.0 + task * 1.23456789),
    }


def write_run(directory: Path, num_tasks: int = 4, seed: int = 0) -> Path:
    """A run with spectra, features and, from task 2 on, an alert."""
    (directory / "spectra").mkdir(parents=True)
    for task in range(num_tasks):
        name = f"spectra/hessian_task{task:04d}_start.npz"
        spectrum_of(task, seed).save(directory / name)
        about = {"data": "training dataset", "mode": "frozen"}
        record = TaskRecord("HessianSpectrumMonitor", task, "start", 10 * task, values_of(task, seed), about, 0.1)
        append_record(directory, TaskRecord(**{**vars(record), "spectra": {"hessian": name}}))
        if task >= 2:
            ratio = (9.0 - task) / 9.0
            alert = {
                "plasticity/alert/ratio": Estimate.exactly(ratio),
                "plasticity/alert/active": Estimate.exactly(float(ratio < 0.7)),
            }
            settings = {"measure": "plasticity/features/srank", "against": "best", "fraction": 0.7}
            append_record(directory, TaskRecord("PlasticityAlert", task, "start", 10 * task, alert, settings))
    return directory


def write_study(root: Path, methods: tuple[str, ...] = ("plain", "other"), num_seeds: int = 2) -> Path:
    rows = []
    for method in methods:
        for seed in range(num_seeds):
            directory = write_run(root / "units" / method / f"seed{seed}", seed=seed)
            own = [{"online_accuracy": 0.9 - 0.1 * task + 0.01 * seed} for task in range(4)]
            (directory / "result.json").write_text(json.dumps({"method": method, "seed": seed, "rows": own}))
            rows += [{"method": method, "seed": seed, "task": task, **row} for task, row in enumerate(own)]
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def data_of(page: Path) -> dict[str, Any]:
    """The JSON that the figures are drawn from, as a browser would find it."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S
    )
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def option_of(data: dict[str, Any], measure: str) -> dict[str, Any]:
    (found,) = [x for section in data["sections"] for x in section["options"] if x["measure"] == measure]
    return dict(found)


class Seen(HTMLParser):
    """The elements of a page and its visible text, read by the standard library's parser."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data
