"""Which room of the package may import which, read off the syntax trees: nothing is imported to find out."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "lightning_plasticity"

# A room imports from earlier rows and from itself; never from its own row, a later row, or the package root.
ROWS: tuple[tuple[str, ...], ...] = (
    ("_optional",),  # knows which packages may be missing
    ("linalg",),  # tensors and matvecs
    ("nn",),  # modules: feature taps, hidden units, undisturbed measuring
    ("curvature",),  # operators and spectra of a loss
    ("trainability",),  # short training runs, undone afterwards
    ("records", "metrics", "regularization", "interventions"),  # plain data; module and optimizer
    ("sparsity",),  # masks; what optimizers know of changed entries is the interventions' business
    ("loggers",),  # knows about loggers
    ("callbacks",),  # knows the Trainer: when, not what
    ("rl",),  # PPO and rollouts; knows the Trainer, no callbacks
    ("streams", "report"),
    ("demo", "study"),
    ("cli",),
    ("__main__",),
)
EDGE = ("streams", "report", "demo", "study", "cli", "__main__")  # the only rooms that may also import the package root
RECORDS_MAY_IMPORT = ("records", "linalg", "curvature")
LINALG_MAY_IMPORT = ("torch", "numpy", "scipy")
# No Lightning at all, and Lightning's utilities (`rank_zero_warn`) but nothing that is, or holds, a Trainer.
NO_LIGHTNING = ("_optional", "linalg", "curvature", "trainability", "records", "metrics")
NO_TRAINER = ("nn", "regularization", "interventions", "sparsity")
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


@dataclass(frozen=True)
class Import:
    """One imported thing: `from a.b import c` is module `a.b`, name `c`; `import a.b` has no name."""

    module: str
    name: str | None
    line: int
    typing_only: bool

    @property
    def top(self) -> str:
        """The distribution's top-level module."""
        return self.module.partition(".")[0]


def imports_of(path: Path, package_dir: Path) -> Iterator[Import]:
    """Every import of a file, also inside functions, with relative ones made absolute."""
    # The package that `from . import x` means: the folder of the file, for `__init__.py` and its neighbours alike.
    here = (PACKAGE, *path.relative_to(package_dir).parent.parts)

    def walk(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, typing_only)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), False)


def room_of(path: Path, package_dir: Path) -> str:
    """The room a file belongs to: its top folder, or its own name; `""` for the package root."""
    first = path.relative_to(package_dir).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def room_named(imported: Import) -> str | None:
    """The room an import reaches into; `""` for the package root, None for other packages."""
    if imported.top != PACKAGE:
        return None
    parts = imported.module.split(".")[1:]
    if not parts and imported.name is not None:
        known = {room for row in ROWS for room in row}
        return imported.name if imported.name in known else ""
    return parts[0] if parts else ""


def row_of(room: str) -> int | None:
    """How far up the house a room is; None where nobody knows it."""
    return next((number for number, row in enumerate(ROWS) if room in row), None)


def wall_breaks(package_dir: Path) -> list[str]:
    """One line for each file in no known room and each import through a wall; empty when all is well."""
    found = []
    for path in sorted(package_dir.rglob("*.py")):
        room = room_of(path, package_dir)
        where = path.relative_to(package_dir.parent).as_posix()
        if room == "":
            continue
        if row_of(room) is None:
            found.append(
                f"{where}: room {room!r} is not known; move the file, or give the room a row in ROWS of tests/walls.py"
            )
            continue
        for imported in imports_of(path, package_dir):
            problem = _problem(room, imported)
            if problem:
                found.append(f"{where}:{imported.line}: {problem}")
    return found


def _problem(room: str, imported: Import) -> str | None:
    target = room_named(imported)
    if target is not None:
        return _problem_at_home(room, target)
    if room == "linalg" and imported.top not in (*LINALG_MAY_IMPORT, *sys.stdlib_module_names):
        return f"linalg knows {', '.join(LINALG_MAY_IMPORT)} only, not {imported.top}; pass in tensors and functions"
    if imported.top in LIGHTNING:
        if room in NO_LIGHTNING:
            return f"{room} does not know Lightning; move what needs it up to callbacks"
        utilities = "utilities" in imported.module.split(".") or imported.name == "utilities"
        if room in NO_TRAINER and not utilities and not imported.typing_only:
            return f"{room} knows modules and optimizers, no Trainer; only Lightning's utilities, or typing only"
    return None


def _problem_at_home(room: str, target: str) -> str | None:
    if target == room:
        return None
    if target == "":
        return (
            None
            if room in EDGE
            else f"{room} imports the package root, which imports everything; name the room instead"
        )
    mine, theirs = row_of(room), row_of(target)
    assert mine is not None
    if theirs is None:
        return f"imports {target!r}, which is not a known room"
    if theirs >= mine:
        return f"{room} imports {target}, which does not come before it; move what is shared down, or pass it in"
    if room == "records" and target not in RECORDS_MAY_IMPORT:
        return f"records are plain data around curvature's results, and need no {target}"
    return None


def outside_imports(package_dir: Path) -> dict[str, list[str]]:
    """Top-level modules of other distributions, with the rooms that import them when they run."""
    rooms: dict[str, set[str]] = {}
    for path in package_dir.rglob("*.py"):
        for imported in imports_of(path, package_dir):
            if imported.top not in (PACKAGE, *sys.stdlib_module_names) and not imported.typing_only:
                rooms.setdefault(imported.top, set()).add(room_of(path, package_dir))
    return {module: sorted(found) for module, found in sorted(rooms.items())}
