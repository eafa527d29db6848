"""The navigation, added to the pages when they are read: in the repository a toctree would show as a block of code."""

from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from sphinx.application import Sphinx

# Under each caption the pages in the order to read them; a pattern takes those that are left. A page that nothing here
# takes fails the strict build.
NAVIGATION = {
    "docs/index": {
        "Getting started": ["docs/getting_started", "docs/how-to/plain_module", "examples/README", "docs/comparison"],
        "Concepts": ["docs/concepts/spectrum", "docs/concepts/epsilon_rank", "docs/concepts/*"],
        "How to": ["docs/how-to/trainer", "docs/how-to/reading_*", "docs/how-to/*"],
        "Reference": ["docs/reference/index", "docs/reference/callbacks", "docs/reference/*"],
        "Studies": ["docs/studies/demo", "docs/studies/methods", "docs/studies/*", "benchmarks/README"],
        "Project": ["CHANGELOG", "docs/project/*", "SUPPORT", "SECURITY", "CONTRIBUTING"],
    },
    "benchmarks/README": {"Results": ["benchmarks/results/*"]},
}


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the toctrees of a page; give a table without a heading its file's name."""
    if not source[0].lstrip().startswith("#") and docname.startswith("benchmarks/results/"):
        source[0] = f"# {PurePosixPath(docname).name}\n\n{source[0]}"
    taken: set[str] = set()
    for caption, patterns in NAVIGATION.get(docname, {}).items():
        pages = []
        for pattern in patterns:
            pages += sorted(page for page in app.env.found_docs - taken if fnmatchcase(page, pattern))
            taken.update(pages)
        entries = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
