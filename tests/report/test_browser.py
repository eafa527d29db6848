"""The report in a headless Chromium: all figures drawn, no errors, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_cases import data_of, write_run, write_study

from lightning_plasticity.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=15000",
]
# Opens all tables, waits for all figures, then tells the page around it what there is.
PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  let tries = 0;
  const timer = setInterval(() => {
    const undrawn = [...document.querySelectorAll(".figure")].filter((one) => !one.querySelector(".main-svg"));
    if (undrawn.length && tries++ < 60) return;
    clearInterval(timer);
    parent.postMessage({
      wide: document.documentElement.scrollWidth, window: innerWidth, undrawn: undrawn.length,
      rows: document.querySelectorAll(".panel td").length,
      heats: document.querySelectorAll(".heatmaplayer image").length,
      chips: document.querySelectorAll(".chip .swatch").length, injected: document.querySelectorAll("img, b, i").length,
    }, "*");
  }, 200);
});</script></body>"""
# Prints before anything was drawn: what is on paper then, and what the screen is afterwards.
PRINTER = """<script>addEventListener("load", () => {
  dispatchEvent(new Event("beforeprint"));
  const drawn = [...document.querySelectorAll(".figure")].map((one) => one.querySelector(".main-svg"));
  const paper = {
    undrawn: drawn.filter((one) => !one).length, widths: [...new Set(drawn.map((one) => one.getAttribute("width")))],
    inks: [...new Set([...document.querySelectorAll(".xtick text")].map((one) => getComputedStyle(one).fill))],
    open: document.querySelectorAll("#provenance details[open]").length,
  };
  dispatchEvent(new Event("afterprint"));
  const open = document.querySelectorAll("#provenance details[open]").length;
  parent.postMessage({ ...paper, afterwards: open }, "*");
});</script></body>"""
FRAME = """<body><iframe src="{name}" style="width:380px;height:2000px;border:0"></iframe>
<script>onmessage = (e) => {{ document.title = JSON.stringify(e.data); }}</script></body>"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


def opened(page: Path, *options: str, probe: str = PROBE) -> tuple[dict[str, Any], list[str]]:
    """What the probe saw in a window of 380 pixels, and what the console said."""
    text = page.read_text(encoding="utf-8")
    end = text.rindex("</body>")
    page.with_name("probed.html").write_text(text[:end] + probe + text[end + len("</body>") :], encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(name="probed.html"))
    profile = page.with_name("profile")
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            *QUIET,
            *options,
            f"--user-data-dir={profile}",
            "--window-size=600,2100",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shutil.rmtree(profile, ignore_errors=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stdout[:500] + done.stderr[-2000:]
    return json.loads(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_study_in_the_dark(tmp_path: Path) -> None:
    page = write_report(write_study(tmp_path, ("plain", "<b>bold")), tmp_path)
    seen, console = opened(page, "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert seen["window"] == seen["wide"] == 380
    assert seen["undrawn"] == 0
    assert seen["heats"] == 2
    assert seen["injected"] == 0
    assert seen["rows"] >= 2 * 4 * len(data_of(page)["sections"])
    assert seen["chips"] >= 2 * len(data_of(page)["sections"])


def test_paper_gets_all_figures_in_light_colours(tmp_path: Path) -> None:
    page = write_report(write_study(tmp_path), tmp_path)
    seen, console = opened(page, "--blink-settings=preferredColorScheme=0", probe=PRINTER)
    assert console == []
    assert seen == {"undrawn": 0, "widths": ["660"], "inks": ["rgb(31, 35, 40)"], "open": 2, "afterwards": 0}


def test_values_that_cannot_be_drawn(tmp_path: Path) -> None:
    write_run(tmp_path, num_tasks=1)
    with open(tmp_path / "plasticity.jsonl", "a") as file:
        for key, row in (("trainability/best_loss", '["nan", 3.0, "inf"]'), ("ntk/trace", '["nan", 1.0, 2.0]')):
            values = f'{{"plasticity/{key}": {row}}}'
            file.write(f'{{"monitor": "M{key[:3]}", "task": 1, "phase": "end", "values": {values}}}\n')
    seen, console = opened(write_report(tmp_path, tmp_path))
    assert console == []
    assert seen["undrawn"] == 0
    assert seen["window"] == seen["wide"] == 380


def test_long_names_without_a_break_fit_on_a_phone(tmp_path: Path) -> None:
    name = "Unbreakable" * 15
    run = write_run(tmp_path / name / "seed0")
    write_run(tmp_path / ("other" + name) / "seed0")
    values = {f"plasticity/{key}/{name}": [2.0, 1.0, 3.0] for key in ("features/srank", "ggn/trace", name)}
    with open(run / "plasticity.jsonl", "a") as file:
        for task, phase in ((0, "start"), (1, "end")):
            line = {"monitor": name, "task": task, "phase": phase, "values": values, "settings": {name: name}}
            file.write(json.dumps({**line, "failure": name}) + "\n")
    (run / "metrics.csv").write_text(f"step,acc/{name},{name}\n1,0.5,1\n")
    seen, console = opened(write_report(tmp_path, tmp_path))
    assert console == []
    assert seen["undrawn"] == 0
    assert seen["window"] == seen["wide"] == 380
