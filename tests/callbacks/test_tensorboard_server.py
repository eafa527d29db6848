"""What a real TensorBoard server gives to its web page after a run: asked over HTTP, as the page does."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from runs import Classifier, loader, mlp, trainer

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, Spectrum
from lightning_plasticity.curvature import measure_hessian

TASKS = 3
STEPS = [0, 3, 6]  # cumulative; each Trainer counts from 0
PATIENCE = 90  # seconds; on an idle machine it answers after three
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log directory of three tasks, a Trainer each; the GGN is exact, the Hessian an estimate."""
    directory = tmp_path_factory.mktemp("logs") / "run"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        estimate = partial(measure_hessian, method="lanczos")
        patch.setitem(HessianSpectrumMonitor._spectrum.__globals__, "measure_hessian", estimate)
        hessian = HessianSpectrumMonitor(("ggn", "hessian"), num_steps=8, probe_samples=6, on_error="raise")
        callbacks = [hessian, FeatureRankMonitor(probe_samples=8, on_error="raise")]
        logger = TensorBoardLogger(directory, name="", version="")
        module = Classifier(mlp())
        for task in range(TASKS):
            trainer(callbacks, logger=logger).fit(module, loader(task))
    logger.experiment.close()
    return directory


@pytest.fixture(scope="module")
def ask(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks a server on the loopback interface, which ends with the tests."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--port=0", f"--logdir={run.parent}"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    direct = build_opener(ProxyHandler({}))

    def answer(address: str, path: str, **query: Any) -> Any:
        with direct.open(f"{address}data/{path}?{urlencode(query)}", timeout=PATIENCE) as response:
            content = response.read()
            return json.loads(content) if "json" in response.headers["Content-Type"] else content

    try:
        deadline = time.monotonic() + PATIENCE
        address, tags = None, {}
        while "plasticity/ggn/spectra" not in tags.get("run", {}):  # the server reads the files in the background
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
            address = address or ADDRESS.search(log.read_text())
            tags = answer(address[0], "plugin/images/tags") if address else {}
        assert address
        yield partial(answer, address[0])
    finally:
        server.terminate()
        server.wait(PATIENCE)


def scalars(ask: Ask, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for _, step, value in ask("plugin/scalars/scalars", run="run", tag=tag)]


def test_scalars_are_on_the_cumulative_step_with_the_task_beside_them(ask: Ask, run: Path) -> None:
    tags = ask("plugin/scalars/tags")["run"]
    assert {"plasticity/ggn/eps_rank_0.01", "plasticity/end/ggn/eps_rank_0.01", "plasticity/weights/norm"} <= set(tags)
    ranks = dict(scalars(ask, "plasticity/ggn/eps_rank_0.01"))
    assert list(ranks) == STEPS
    for task, step in enumerate(STEPS):
        spectrum = Spectrum.load(run / f"spectra/ggn_task{task:04d}_start.npz")
        assert ranks[step] == (spectrum.counts[spectrum.eigenvalues.abs() > 0.01]).sum()
    # Where one task ends and the next starts, on the same step, TensorBoard shows what came last.
    assert scalars(ask, "plasticity/task") == [(0, 0.0), (3, 1.0), (6, 2.0), (9, 2.0)]


def test_histograms_hold_the_eigenvalues_that_can_be_told_from_zero(ask: Ask, run: Path) -> None:
    found = ask("plugin/histograms/histograms", run="run", tag="plasticity/ggn/spectrum_log10")
    assert [step for _, step, _ in found] == STEPS
    for task, (_, _, buckets) in enumerate(found):
        left, right, counts = np.array(buckets).T
        spectrum = Spectrum.load(run / f"spectra/ggn_task{task:04d}_start.npz")
        sizes = spectrum.eigenvalues.abs().numpy()
        shown = sizes > max(spectrum.resolution, sizes.max() * 1e-8)
        edges = np.append(left, right[-1])
        expected = np.histogram(np.log10(sizes[shown]), edges, weights=spectrum.counts.numpy()[shown])[0]
        assert np.allclose(right[:-1], left[1:])
        assert np.allclose(counts, expected, atol=1e-6)
        assert counts.sum() == pytest.approx(spectrum.counts.numpy()[shown].sum())  # none lies outside


def test_figures_are_there_for_every_task(ask: Ask) -> None:
    found = ask("plugin/images/images", run="run", tag="plasticity/ggn/spectra", sample=0)
    assert [image["step"] for image in found] == STEPS
    pictures = [imread(io.BytesIO(ask(f"plugin/images/individualImage?{image['query']}&"))) for image in found]
    assert all(picture.shape[:2] == (450, 700) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[-1])  # the last has more lines


def test_charts_are_in_groups_and_each_finds_its_lines(ask: Ask) -> None:
    groups = {group["title"]: group["chart"] for group in ask("plugin/custom_scalars/layout")["category"]}
    objects = ["ggn", "hessian", "features", "weights"]
    assert sorted(groups) == sorted(
        ["plasticity", *(f"plasticity/{name}" for name in objects), *(f"plasticity/end/{name}" for name in objects)]
    )
    lines: set[str] = set()
    for charts in groups.values():
        for chart in charts:
            if "margin" in chart:
                (series,) = chart["margin"]["series"]
                steps = [[step for step, _ in scalars(ask, series[part])] for part in ("value", "lower", "upper")]
                assert steps[0] == steps[1] == steps[2]  # else the page shows an error
                lines |= set(series.values())
            for expression in chart.get("multiline", {}).get("tag", ()):
                answer = ask("plugin/custom_scalars/scalars", run="run", tag=expression)
                assert answer["regex_valid"]
                assert answer["tag_to_events"]
                assert lines.isdisjoint(answer["tag_to_events"])  # a line is in one chart
                lines |= set(answer["tag_to_events"])
    ours = {tag for tag in ask("plugin/scalars/tags")["run"] if tag.startswith("plasticity/")}
    assert lines == ours
    bands = [chart["title"] for chart in groups["plasticity/hessian"] if "margin" in chart]
    assert sorted(bands) == ["effective_rank", "lambda_max", "lambda_min", "trace"]
    (layers,) = [chart for chart in groups["plasticity/weights"] if chart["title"] == "norm"]
    assert layers["multiline"]["tag"] == ["plasticity/weights/norm(/.*)?$"]
