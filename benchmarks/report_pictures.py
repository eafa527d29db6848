"""The pictures of reports in the documentation, taken in a headless Chromium.

``docs/images/alert.png`` is of the first run on docs/how-to/alerts.md, whose code is run here as it stands there;
``docs/images/report.png`` of a demo.

Run: lightning-plasticity demo --out demo_out && python -m benchmarks.report_pictures demo_out
"""

from __future__ import annotations

import argparse
import base64
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report_opening import Chromium, wait_for
from lightning_plasticity.report import write_report

DOCS = Path(__file__).parents[1] / "docs"


def picture(page: Path, out: Path, first: str, last: str, width: int) -> None:
    """From the top of one element to the bottom of another, both with a little around them."""
    with Chromium(window=f"{width},1000") as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        wait_for(browser, page)
        box = "(name) => document.querySelector(name).getBoundingClientRect()"
        top = browser.evaluate(f"({box})({first!r}).top + scrollY") - 12
        bottom = browser.evaluate(f"({box})({last!r}).bottom + scrollY") + 12
        clip = {"x": 0, "y": top, "width": width, "height": bottom - top, "scale": 1}
        shot = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    """Take both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="what a demo wrote")
    demo = parser.parse_args().demo
    found = re.search(r"```python\n(.*?)```", (DOCS / "how-to" / "alerts.md").read_text(), re.S)
    assert found
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-c", found[1]], cwd=directory, check=True)
        report = write_report(Path(directory) / "logs", Path(directory) / "report.html")
        picture(report, DOCS / "images" / "alert.png", "#health", "#accuracy .legend", 900)
        report = write_report(demo, Path(directory) / "demo.html")
        picture(report, DOCS / "images" / "report.png", "header", "#spectra .panels", 1280)


if __name__ == "__main__":
    main()
