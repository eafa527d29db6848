"""The notebooks in examples/: valid, shown with their outputs, and their code runs, without Jupyter."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
# Sizes of a run in the notebook, and here.
SHORT_RUN = {"num_tasks, epochs = 14, 30": "num_tasks, epochs = 2, 1", "num_steps=400": "num_steps=20"}
MOST_BYTES = 300_000


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def by_name(path: Path) -> str:
    return path.name


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_it_is_format_4_and_small(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"cells", "metadata", "nbformat", "nbformat_minor"} == notebook.keys()
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert ("outputs" in cell) == ("execution_count" in cell) == (cell["cell_type"] == "code")
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_it_is_stored_as_one_run_left_it(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    silent = [cell["execution_count"] for cell in cells if not cell["outputs"]]
    assert not silent, f"cells without a stored output: {silent}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_its_code_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    module = types.ModuleType(f"notebook_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    code = ["".join(cell["source"]) for cell in code_cells(read(path))]
    for long, short in SHORT_RUN.items():
        assert any(long in source for source in code), f"{long} is not in {path.name}: change SHORT_RUN with it"
        code = [source.replace(long, short) for source in code]
    try:
        for number, source in enumerate(code, start=1):
            exec(compile(source, f"{path.name}, code cell {number}", "exec", dont_inherit=True), module.__dict__)
    finally:
        plt.close("all")
