"""``.. room:: MODULE``: a table of a module's public names, then each with its docstring."""

import inspect
import re
import typing
from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util.docutils import SphinxDirective

ROOT = "lightning_plasticity"
HOOKS_OF = ("lightning", "pytorch_lightning", "torch")


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what the module itself defines; no modules."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return [name for name in names if not name.startswith("__") and not inspect.ismodule(getattr(module, name))]


@cache
def path_of(module: str, name: str) -> str:
    """The shortest path that a user can import it from."""
    root, value = import_module(ROOT), getattr(import_module(module), name)
    return f"{ROOT}.{name}" if name in root.__all__ and getattr(root, name) is value else f"{module}.{name}"


class Room(SphinxDirective):
    """The page of one module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        module = import_module(self.arguments[0])
        self.env.note_dependency(str(module.__file__))
        paths = {path_of(module.__name__, name): getattr(module, name) for name in public_names(module)}
        about = inspect.cleandoc(module.__doc__ or "").splitlines()
        # autosummary does not want to list a module's names on that module's own page: there is no current module.
        text = [f".. module:: {module.__name__}", ".. currentmodule:: None", "", *about, ""]
        text += [".. autosummary::", "   :nosignatures:", "", *(f"   ~{path}" for path in paths), ""]
        for path, value in paths.items():
            _evaluate(value)
            text += [f".. auto{_kind(value)}:: {path}", *(["   :show-inheritance:"] if outside(value) else []), ""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


def _kind(value: object) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isroutine(value) else "data"


def outside(value: object) -> list[type]:
    """The classes of other packages that a class is."""
    known = value.__mro__ if inspect.isclass(value) else ()
    ours = (ROOT, "typing")
    return [one for one in known if one.__module__.partition(".")[0] not in ours and one not in (object, tuple)]


def _evaluate(value: object) -> None:
    """Make types of annotations that are text: autodoc shows those of a class's ``__init__`` as they are written."""
    for owner in (value, getattr(value, "__init__", None)) if inspect.isclass(value) else ():
        with suppress(AttributeError, NameError, TypeError):
            owner.__annotations__ = typing.get_type_hints(owner)


def public_bases(app: Sphinx, name: str, value: type, options: Any, bases: list[Any]) -> None:
    """Name the classes of other packages that it is, in the place of those that are nobody's business."""
    theirs = outside(value)
    nearest = [base for base in theirs if not any(base is not one and issubclass(one, base) for one in theirs)]
    bases[:] = {base.__name__: base for base in reversed(nearest)}.values()  # Lightning has two packages


def shorten(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Show the types of attributes as those of arguments are shown, without their modules."""
    lines[:] = [re.sub(r"(?<![\w.])((\w+\.)+\w)", r"~\1", x) if x.startswith(":vartype") else x for x in lines]


def skip_hooks(app: Sphinx, kind: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out methods that Lightning or torch call: they have its signature and its documentation."""
    owner = getattr(inspect.getmodule(value), getattr(value, "__qualname__", "").rpartition(".")[0], None)
    if not inspect.isclass(owner):
        return None
    theirs = (base for base in owner.__mro__ if base.__module__.partition(".")[0] in HOOKS_OF)
    return True if any(name in vars(base) for base in theirs) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("room", Room)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", shorten, priority=900)  # after napoleon
    app.connect("autodoc-skip-member", skip_hooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
