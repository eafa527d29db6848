"""Packages that may be missing, and what to say then."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXTRAS = {
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "gymnasium": "'gymnasium[mujoco]'",
    "mujoco": "'gymnasium[mujoco]'",
    "plotly": "plotly",
    "shtab": "shtab",
}


def require(module: str, purpose: str) -> ModuleType:
    """Import a module, e.g. ``require("matplotlib.figure", "figures of spectra")``.

    Raises:
        ModuleNotFoundError: naming the purpose and the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = EXTRAS.get(module.partition(".")[0], module)
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed; run: pip install {package}"
        ) from error


def if_installed(module: str) -> ModuleType | None:
    """Import a module; None where it is missing, or broken in this environment."""
    try:
        return import_module(module)
    except Exception:
        return None
