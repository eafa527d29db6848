"""How fast a report opens in a browser: until it can be read, and until the figures are there.

Made-up runs with what the monitors write by default (GGN, Hessian, features of three layers, start and end of each
task). Each opening is a new headless Chromium with an empty profile, so nothing is cached but the file itself. Times
are the page's own, from the start of navigation, by its clock; Chromium is driven through its DevTools pipe.

Run: python benchmarks/report_opening.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_plasticity import Spectrum
from lightning_plasticity.linalg import Estimate
from lightning_plasticity.records import TaskRecord, append_record
from lightning_plasticity.report import write_report

RESULT = Path(__file__).parent / "results" / "report_opening.md"
NUM_PARAMS, SAMPLES, LAYERS = 27_710, 150, ("net.1", "net.3", "net.5")
SUMMARIES = ("effective_rank", "trace", "lambda_max", "lambda_min", "num_samples")
RANKS = ("effective_rank", "stable_rank", "srank", "approximate_rank", "feature_rank", "max_rank")
UNITS = ("dead_units", "dormant_units_0.025", "dormant_units_0.1")
EPS = ("eps_rank_0.001", "eps_rank_0.01", "eps_rank_0.1", "relative_eps_rank_0.001", "relative_eps_rank_0.01")
WINDOW = "1280,900"
# Runs before the page's own scripts, and looks at every frame; a frame that was asked for has the last one painted.
WATCH = """(() => {
  window.onScreen = (one) => {
    const box = one.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };
  const seen = window.opening = {};
  const note = (name, now) => { seen[name] ??= now; };
  const look = (now) => {
    const figures = [...document.querySelectorAll(".figure")];
    const drawn = (one) => one.querySelector(".trace, .heatmaplayer image");
    const painted = performance.getEntriesByName("first-contentful-paint").length;
    if (painted && document.getElementById("provenance")) note("readable", now);
    if (document.readyState === "complete" && figures.length) {
      if (figures.filter(onScreen).every(drawn)) note("visible", now);
      if (figures.every(drawn)) note("all", now);
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})()"""
READ = """JSON.stringify({
  ...window.opening, paint: performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
  shown: [...document.querySelectorAll(".figure")].filter(onScreen).length,
})"""


class Chromium:
    """A headless Chromium of its own, one page, asked through the DevTools protocol."""

    def __init__(self, *options: str, window: str = WINDOW) -> None:
        self.profile = tempfile.mkdtemp(prefix="chromium")
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None:
            raise SystemExit("No Chromium on this machine; install it (Debian: apt-get install chromium).")
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--disable-dev-shm-usage", f"--user-data-dir={self.profile}", f"--window-size={window}", *options]
        # Chromium reads from descriptor 3 and writes to 4.
        shell = f'exec "$0" "$@" 3<&{asked} 4>&{answered}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, found, *flags, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(asked, answered),
            stderr=subprocess.DEVNULL,
        )
        os.close(asked)
        os.close(answered)
        self._number, self._rest, self._session = 0, b"", None
        pages = [x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page"]
        while not pages:
            pages = [x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self._ask)
        os.close(self._answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The result of one method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            line, end, rest = self._rest.partition(b"\0")
            if not end:
                self._rest += os.read(self._answers, 1 << 20)
                continue
            self._rest = rest
            answer = json.loads(line)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")


def opening(page: Path, anchor: str = "") -> dict[str, float]:
    """Milliseconds of one opening: ``paint``, ``readable``, ``visible`` figures and ``all`` figures drawn."""
    with Chromium() as browser:
        return wait_for(browser, page, anchor)


def wait_for(browser: Chromium, page: Path, anchor: str = "") -> dict[str, float]:
    """Open a page and wait until all its figures are drawn; what ``WATCH`` saw."""
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    browser.call("Page.navigate", url=page.resolve().as_uri() + anchor)
    found: dict[str, float] = {}
    for _ in range(300):
        time.sleep(0.1)
        found = json.loads(browser.evaluate(READ) or "{}")
        if "all" in found:
            return found
    raise RuntimeError(f"{page}: not all figures were drawn within 30 s, only {found}")


def write_run(directory: Path, num_tasks: int, seed: int) -> Path:
    """A log directory: what two monitors and an alert write at the start and the end of each task."""
    draw = np.random.default_rng(seed)
    (directory / "spectra").mkdir(parents=True)
    for task in range(num_tasks):
        for phase, before in (("start", "plasticity/"), ("end", "plasticity/end/")):
            names, values = {}, {}
            for matrix, size in (("ggn", 1350), ("hessian", 240)):
                names[matrix] = f"spectra/{matrix}_task{task:04d}_{phase}.npz"
                logs = draw.normal(-2 - 2 * task / num_tasks, 1.5, size)
                signs = np.where(draw.random(size) < (0.3 if matrix == "hessian" else 0), -1.0, 1.0)
                about = {"matrix": matrix, "num_samples": SAMPLES, "resolution": 1e-7}
                Spectrum.from_eigenvalues(torch.from_numpy(signs * 10**logs), NUM_PARAMS, **about).save(
                    directory / names[matrix]
                )
                for name in EPS + SUMMARIES:
                    middle = 100 * draw.random()
                    values[f"{before}{matrix}/{name}"] = Estimate(middle, 0.9 * middle, 1.1 * middle)
            about = {"data": "training dataset", "mode": "frozen", "dtype": "float32"}
            step = 100 * (task + (phase == "end"))
            record = TaskRecord("HessianSpectrumMonitor", task, phase, step, values, about, 3.0, spectra=names)
            append_record(directory, record)
            features = [
                f"features/{name}{layer}" for name in RANKS + UNITS for layer in ("", *(f"/{x}" for x in LAYERS))
            ]
            weights = [f"weights/norm{layer}" for layer in ("", "/net.0", "/net.2", "/net.4", "/net.6")]
            exact = {before + key: Estimate.exactly(100 * draw.random()) for key in features + weights}
            append_record(directory, TaskRecord("FeatureRankMonitor", task, phase, step, exact, about, 0.1))
        ratio = draw.uniform(0.8, 1)
        alert = {"ratio": Estimate.exactly(ratio), "active": Estimate.exactly(float(ratio < 0.85))}
        watched = {"measure": "plasticity/features/srank", "against": "best", "fraction": 0.85}
        values = {f"plasticity/alert/{key}": value for key, value in alert.items()}
        append_record(directory, TaskRecord("PlasticityAlert", task, "start", 100 * task, values, watched))
    return directory


def main(arguments: Sequence[str] | None = None) -> None:
    """Write runs, their reports, open them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--openings", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="5 tasks, 2 openings, nothing kept")
    asked = parser.parse_args(arguments)
    num_tasks, openings = (5, 2) if asked.quick else (asked.tasks, asked.openings)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        runs = [write_run(Path(directory) / name, num_tasks, seed) for seed, name in enumerate("abc")]
        for several in (runs[:1], runs):
            begin = time.perf_counter()
            page = write_report(several, Path(directory) / f"{len(several)}.html")
            seconds = time.perf_counter() - begin
            size = page.stat().st_size / 1e6
            for anchor, where in (("", "top"), ("#spectra", "heat maps")):
                load = os.getloadavg()[0]
                times = [opening(page, anchor) for _ in range(openings)]
                cells = []
                for name in ("paint", "readable", "visible", "all"):
                    found = [one[name] for one in times]
                    cells.append(f"{min(found):.0f} / {statistics.median(found):.0f} / {max(found):.0f}")
                about = [str(len(several)), f"{size:.1f} MB", f"{seconds:.1f} s", where, f"{times[0]['shown']:.0f}"]
                rows.append("| " + " | ".join([*about, *cells, f"{load:.1f}"]) + " |")
                print(rows[-1], flush=True)
    if not asked.quick:
        RESULT.write_text(table(rows, num_tasks, openings))


def table(rows: Sequence[str], num_tasks: int, openings: int) -> str:
    """The Markdown page of the results."""
    return "\n".join(
        [
            "# How fast a report opens",
            "",
            "Written by `python benchmarks/report_opening.py`: minimum / median / maximum of "
            f"{openings} openings in milliseconds from the start of navigation, each in a new headless Chromium with "
            f"an empty profile, window {WINDOW.replace(',', ' x ')}; {num_tasks} tasks, measured at start and end. "
            f"{platform.machine()}, {os.cpu_count()} cores.",
            "",
            "| runs | file | written in | opened at | figures there | first paint | readable | they are drawn "
            "| all drawn | load |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Readable: all text down to the last section is there and a frame was painted. Opened at the heat maps is "
            "the page with `#spectra` in its address. All drawn includes what is far off the screen.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
