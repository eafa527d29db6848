"""What the documentation says is true: its code runs, its commands exist, the examples finish."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [path for path in sorted((ROOT / "lightning_plasticity").rglob("*.py")) if path.name != "__main__.py"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# How long an example runs, by the name its `main` has for it.
SHORT_RUN = {"max_epochs": 1, "max_steps": 4, "num_tasks": 2}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Code blocks


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int  # of the first line of code, from 1
    skip_reason: str | None  # None: run it; "" is refused


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page. `<!-- no-run: REASON -->` on the last written line before a block marks it."""
    marker = re.compile(r"<!--\s*no-run\s*:?\s*(.*?)\s*-->")
    fence = re.compile(r"(?P<indent>[ \t]*)(?P<ticks>`{3,})(?P<language>\w*)[^`]*")
    lines = text.splitlines()
    last_written, number = "", 0
    while number < len(lines):
        opened = fence.fullmatch(lines[number])
        if opened:
            marked = marker.fullmatch(last_written.strip())
            indent, first = opened["indent"], number + 1
            number = first
            while number < len(lines) and lines[number].strip() != opened["ticks"]:
                number += 1
            assert number < len(lines), f"the block that opens on line {first} does not close"
            code = "\n".join(line.removeprefix(indent) for line in lines[first:number])
            yield Block(opened["language"].lower(), code, first + 1, marked[1] if marked else None)
        if lines[number].strip():
            last_written = lines[number]
        number += 1


# docs/how-to/alerts.md shows an alert that sounds.
# Pages that show a warning.
@pytest.mark.filterwarnings("ignore:PlasticityAlert at the start of task 3:UserWarning")
@pytest.mark.filterwarnings("ignore:HessianSpectrumMonitor could not measure ggn, hessian .* is nan:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One namespace per page, and a real module, because dataclasses and pickle look theirs up by name.
    module = types.ModuleType("page_" + re.sub(r"\W", "_", relative(page)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language != "python" or block.skip_reason:
            continue
        assert block.skip_reason is None, f"{relative(page)}:{block.line}: say why: <!-- no-run: REASON -->"
        # Empty lines in front make a traceback name the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
        exec(code, module.__dict__)


def test_readme_has_python_that_runs() -> None:
    blocks = blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(block.language == "python" and block.skip_reason is None for block in blocks)


def test_blocks_are_found() -> None:
    page = """
Text, and ```not a block``` in it.

```python
a = 1
```
<!-- no-run: needs two GPUs -->

```python title="x"
b = 2

```

- item
  ```bash
  make test
    more
  ```

<!-- no-run -->
````python
```
````
"""
    assert list(blocks_of(page)) == [
        Block("python", "a = 1", 5, None),
        Block("python", "b = 2\n", 10, "needs two GPUs"),
        Block("bash", "make test\n  more", 16, None),
        Block("python", "```", 22, ""),
    ]


# Commands


def commands_of(text: str, command: str) -> set[str]:
    """The words that follow a command in a page's shell blocks and in `inline code`."""
    shell = [block.code for block in blocks_of(text) if block.language in ("bash", "sh", "shell", "console", "")]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    pattern = re.compile(
        rf"(?:^|[\s;&|/(]){re.escape(command)}[ \t]+(?:-\S+[ \t]+)*([a-z][\w-]*)(?![\w=])", re.MULTILINE
    )
    return {word for code in (*shell, *inline) for word in pattern.findall(re.sub(r"#.*", "", code))}


COMMAND_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=relative)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    missing = commands_of(page.read_text(encoding="utf-8"), "make") - targets
    assert not missing, f"{relative(page)} names make targets that are not in the Makefile: {sorted(missing)}"


def exit_code(*arguments: str) -> object:
    from lightning_plasticity.cli import main

    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=relative)
def test_subcommands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") in (0, None)
    listed = capsys.readouterr().out
    for command in sorted(commands_of(page.read_text(encoding="utf-8"), "lightning-plasticity")):
        assert exit_code(command, "--help") in (0, None), (
            f"{relative(page)} names `lightning-plasticity {command}`, which does not exist"
        )
        assert re.search(rf"(?<![\w-]){command}(?![\w-])", listed), (
            f"`lightning-plasticity --help` does not list {command}"
        )


def test_unknown_subcommand_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("no-such-command", "--help") not in (0, None)


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"demo", "test"} <= commands_of(text, "make")
    assert "demo" in commands_of(text, "lightning-plasticity")


def test_commands_are_found() -> None:
    page = """
We make sure. Run `make demo`; `pip install lightning-plasticity`.
```bash
cd x && make -k test VENV=v # make tea
/usr/bin/make lint
```
"""
    assert commands_of(page, "make") == {"demo", "test", "lint"}
    assert commands_of(page, "lightning-plasticity") == set()


# Docstrings


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_docstring_examples(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, report=True)
    assert outcome.failed == 0


def test_there_are_docstring_examples() -> None:
    assert any(">>> " in path.read_text(encoding="utf-8") for path in MODULES)


# Examples


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_examples_are_listed() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (ROOT / "examples/README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} - {"README.md"}


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_examples_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", [str(path)])
    spec.loader.exec_module(module)
    accepted = inspect.signature(module.main).parameters
    module.main(**{name: value for name, value in SHORT_RUN.items() if name in accepted})
