"""The documentation site: it builds without a warning, knows all public names, and none of its links is dead."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import lightning_plasticity

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
INSIDE = ("cli", "demo")  # rooms whose names are not for users: commands, and what the demo command runs


class Page(HTMLParser):
    """What a page links to, and what can be linked to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {""}
        self.pictures: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.targets += [found[name] for name in ("href", "src") if name in found]
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if tag == "img":
            self.pictures.append(found["src"])


def dead_links(site: Path) -> list[str]:
    """Each link of a page to a file that is not there, or to an anchor that its page does not have."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.targets:
            target, anchor = urldefrag(link)
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            file = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            there = file.is_file() and (file not in pages or unquote(anchor) in pages[file].anchors)
            if not there:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


def inventory(path: Path) -> dict[str, tuple[str, str]]:
    """Page and anchor of each Python name: four lines of header, then compressed lines ``name domain:role 1 uri -``."""
    lines = zlib.decompress(path.read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    found = {}
    for name, role, _, uri, _ in (line.split(maxsplit=4) for line in lines if " py:" in line):
        assert role.startswith("py:")
        page, _, anchor = uri.partition("#")
        found[name] = (page, name if anchor == "$" else anchor.replace("$", name))
    return found


def public_paths() -> set[str]:
    """Every name in every public ``__all__``, with its module."""
    paths = {f"lightning_plasticity.{name}" for name in lightning_plasticity.__all__}
    for found in pkgutil.walk_packages(lightning_plasticity.__path__, "lightning_plasticity."):
        room = found.name.split(".")[1]
        if found.ispkg and room not in INSIDE:
            names = getattr(importlib.import_module(found.name), "__all__", ())
            paths.update(f"{found.name}.{name}" for name in names)
    return paths


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; the extra `docs` has them")
def test_site(tmp_path: Path) -> None:
    """One test, since the build takes half a minute and each worker would make its own."""
    site = tmp_path / "site"
    # As `make docs` does.
    command = re.search(r"-m sphinx (.*) \. build/docs", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert command
    options = command[1].replace("build/doctrees", str(tmp_path / "doctrees")).split()
    assert {"--fail-on-warning", "--nitpicky"} <= set(options)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "sphinx", "--quiet", *options, str(ROOT), str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr

    entries = inventory(site / "objects.inv")
    assert public_paths() - set(entries) == set()
    pages = {page: Page(site / page) for page in {page for page, _ in entries.values()}}
    assert [path for path in public_paths() if entries[path][1] not in pages[entries[path][0]].anchors - {""}] == []
    assert dead_links(site) == []
    assert any("demo" in picture for picture in Page(site / "docs" / "index.html").pictures)


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text('<p id="x"><a href="b/c.html#y">1</a><a href="#x">2</a><a href="https://z">3</a>')
    (tmp_path / "b" / "c.html").write_text(
        '<i id="y"><a href="../a.html">1</a><img src="../no.png"><a href="#no">2</a>'
    )
    assert dead_links(tmp_path) == ["b/c.html: ../no.png", "b/c.html: #no"]
    (tmp_path / "b" / "c.html").write_text("")
    assert dead_links(tmp_path) == ["a.html: b/c.html#y"]
