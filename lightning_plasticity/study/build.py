"""Objects from ``class_path`` and ``init_args``, by jsonargparse; errors say where in the file they come from."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse

from lightning_plasticity.study.config import Settings, StudyError, did_you_mean


@contextmanager
def importable(directories: Collection[str]) -> Iterator[None]:
    """Let classes be imported from these directories too."""
    added = [directory for directory in directories if directory not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for directory in added:
            if directory in sys.path:
                sys.path.remove(directory)


def find(class_path: str, where: str) -> Callable[..., Any]:
    """The class or function of that import path.

    Raises:
        StudyError: when there is none.
    """
    parts = class_path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue  # the rest of the path may be a class with attributes
            raise StudyError(f"{where}: importing {module} failed: {error}.") from error
        except Exception as error:
            raise StudyError(f"{where}: importing {module} failed: {type(error).__name__}: {error}.") from error
        for name in parts[cut:]:
            if not hasattr(found, name):
                hint = did_you_mean(name, [other for other in dir(found) if not other.startswith("_")])
                raise StudyError(f"{where}: {module} has no {'.'.join(parts[cut:])}.{hint}")
            found = getattr(found, name)
        if not callable(found):
            raise StudyError(f"{where}: {class_path} is a {type(found).__name__}, expected a class or a function.")
        return found  # type: ignore[no-any-return]
    raise StudyError(
        f"{where}: no module {parts[0]!r} to import {class_path} from; expected a package that is installed, or a file "
        "in the current directory or beside the YAML file."
    )


class Maker:
    """One entry of the file, checked: a class or function with its arguments.

    Args:
        entry: ``class_path`` and ``init_args``.
        where: its place in the file, for errors.
        given: how many leading arguments are handed over as objects, not from the file.

    Raises:
        StudyError: when the class cannot be imported, or does not take these arguments.
    """

    def __init__(self, entry: Settings, where: str, given: int = 0) -> None:
        self.entry, self.where = entry, where
        self.target = find(entry["class_path"], where)
        self._parser = jsonargparse.ArgumentParser(exit_on_error=False)
        try:
            skip: set[str | int] = set(list(inspect.signature(self.target).parameters)[:given])
            if inspect.isclass(self.target):
                added = self._parser.add_class_arguments(
                    self.target, "x", skip=skip, instantiate=False, fail_untyped=False
                )
            else:
                added = self._parser.add_function_arguments(self.target, "x", skip=skip, fail_untyped=False)
        except Exception as error:
            raise StudyError(f"{where}: the arguments of {entry['class_path']} cannot be read: {error}") from error
        self.names = tuple(name.removeprefix("x.") for name in added)
        for name in entry["init_args"]:
            if name not in self.names:
                takes = f"It takes: {', '.join(self.names)}." if self.names else "It takes no arguments."
                hint = did_you_mean(name, self.names)
                raise StudyError(f"{where}: {entry['class_path']} has no argument {name!r}.{hint} {takes}")

    def check(self, **defaults: Any) -> None:
        """Check the values' types, without making the object."""
        self._parsed(defaults)

    def __call__(self, *given: Any, **defaults: Any) -> Any:
        """Make the object; ``defaults`` serve where the file says nothing and the class takes them."""
        arguments = self.arguments(**defaults)
        try:
            return self.target(*given, **arguments)
        except Exception as error:
            raise StudyError(f"{self.where}: {self.entry['class_path']} refused: {error}") from error

    def arguments(self, **defaults: Any) -> dict[str, Any]:
        """The arguments, with the objects that are among them."""
        parsed = self._parsed(defaults)
        try:
            made = getattr(self._parser, "instantiate", self._parser.instantiate_classes)(parsed)
        except Exception as error:
            raise StudyError(f"{self.where}: {error}") from error
        return dict(vars(made.x)) if "x" in made else {}

    def _parsed(self, defaults: dict[str, Any]) -> Any:
        values = {name: value for name, value in defaults.items() if name in self.names} | self.entry["init_args"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._parser.parse_object({"x": values} if values else {})
        except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError) as error:
            text = str(error).replace('"x.', '"').replace(" x.", " ")
            raise StudyError(f"{self.where}: {self.entry['class_path']}: {text}") from error


def own_optimizer(module: Any, optimizer: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Stands in, as a ``partial``, for a module's ``configure_optimizers``: Lightning looks for a function in it."""
    return optimizer(module.parameters(), **arguments)


def makers(settings: Settings, where: str) -> dict[str, list[Maker]]:
    """What a unit's module, stream, optimizer, transforms, callbacks and regularisers are made by, all checked.

    Raises:
        StudyError: for the first that cannot be made.
    """
    found: dict[str, list[Maker]] = {}
    for key in ("module", "stream", "optimizer"):
        given = 1 if key == "optimizer" else 0
        found[key] = [Maker(settings[key], f"{where}{key}", given)] if settings[key] else []
    for key in ("transforms", "callbacks", "regularizers"):
        given = 1 if key == "transforms" else 0
        found[key] = [Maker(entry, f"{where}{key}[{k}]", given) for k, entry in enumerate(settings[key])]
    for group in found.values():
        for maker in group:
            maker.check()
    return found
