"""Files of torch, read so that they can come from anyone: tensors and plain values, and nothing of theirs is called."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_plasticity.cli.common import UsageError

HYPERPARAMETERS = ("hyper_parameters", "hparams", "module_arguments")  # Lightning's names for them, and its older ones
# The function that made the module, which LightningCLI notes. --module says what to make, so it is not needed.
OF_LIGHTNING = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
NOTES_OF_LIGHTNING = ("_instantiator", "_class_path")


def read_plain(path: Path, option: str, expected: str) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values.

    Args:
        path: of the file.
        option: that named it, for messages.
        expected: what the file should be, for messages.

    Raises:
        UsageError: where it cannot be read, or holds other objects: those can run code as they are loaded.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror or error}; expected {expected}.") from error
    except Exception as error:  # torch's own words are long, and advise to run what is in the file
        if objects := _objects(path):
            raise UsageError(
                f"{option} {path} holds Python objects ({', '.join(objects)}), which can run code as they are loaded; "
                f"expected {expected}. Save it again with tensors, numbers, text, lists and dictionaries only."
            ) from error
        raise UsageError(f"{option} {path} cannot be read; expected {expected}.") from error


def load_module(found: type[LightningModule], arguments: dict[str, Any], path: Path) -> LightningModule:
    """A module of this class with the checkpoint's weights, and its hyperparameters where ``arguments`` has no other.

    Lightning is given what was read here and never the file: its 2.5 would unpickle that without restrictions.

    Raises:
        UsageError: where the file is no checkpoint, names code to call, or does not fit the class.
    """
    if not path.is_file():
        raise UsageError(f"--checkpoint {path} is not a file.")
    expected = "a checkpoint of Lightning, such as Trainer.save_checkpoint writes"
    checkpoint = read_plain(path, "--checkpoint", expected)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise UsageError(f"--checkpoint {path} has no 'state_dict'; expected {expected}.")
    for key in HYPERPARAMETERS:
        if key in checkpoint:
            checkpoint[key] = _plain_hyperparameters(checkpoint[key], arguments, path)
    torch.save(checkpoint, file := io.BytesIO())
    file.seek(0)
    takes = inspect.signature(found.load_from_checkpoint).parameters
    restricted: dict[str, Any] = {"weights_only": True} if "weights_only" in takes else {}
    name = found.__name__
    try:
        return found.load_from_checkpoint(file, map_location="cpu", **restricted, **arguments)
    except TypeError as error:
        hint = "the checkpoint has no such hyperparameters; give them with --init, or call save_hyperparameters()"
        raise UsageError(f"--checkpoint {path}: {name} was not made: {error} ({hint}).") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        why = " ".join(str(error).split())
        raise UsageError(f"--checkpoint {path} does not fit {name}: {why} (--init gives other arguments).") from error


def _plain_hyperparameters(given: Any, arguments: dict[str, Any], path: Path) -> dict[str, Any]:
    """Without what LightningCLI noted beside them; what else names code to call is refused."""
    if not isinstance(given, Mapping):
        raise UsageError(f"--checkpoint {path} has hyperparameters that are a {type(given).__name__}, expected a dict.")
    if (function := given.get("_instantiator", OF_LIGHTNING[0])) not in OF_LIGHTNING:
        raise UsageError(
            f"--checkpoint {path} names a function to make the module with, {function!r}, which is not called; save it "
            "again without '_instantiator' among the hyperparameters."
        )
    for key, value in given.items():
        if isinstance(value, Mapping) and "class_path" in value and key not in arguments:
            raise UsageError(
                f"--checkpoint {path}: the hyperparameter {key!r} names a class, {value['class_path']!r}, and nothing "
                f"that a checkpoint names is called; give --init {key}=VALUE, or name a subclass with it in --module."
            )
    return {key: value for key, value in given.items() if key not in NOTES_OF_LIGHTNING}


def _objects(path: Path) -> list[str]:
    """Names of what is neither tensor nor plain value; found without loading it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []  # not of today's format, or no file of torch at all
