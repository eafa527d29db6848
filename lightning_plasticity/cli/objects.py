"""Modules, data and functions that are named on the command line: import paths with arguments, checkpoints, files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_plasticity.cli.checkpoints import load_module, read_plain
from lightning_plasticity.cli.common import UsageError
from lightning_plasticity.cli.trainerless import transferred
from lightning_plasticity.curvature.samples import first_samples, num_samples
from lightning_plasticity.nn.batches import batch_size
from lightning_plasticity.study import StudyError
from lightning_plasticity.study.build import Maker, find, importable

FILES = (".pt", ".pth", ".npz")
PAIRS = (("inputs", "targets"), ("x", "y"))  # names in a file


@contextmanager
def importing() -> Iterator[None]:
    """Let classes be imported from the current directory; what cannot be made is an error of usage."""
    try:
        with importable([os.getcwd()]):
            yield
    except StudyError as error:
        raise UsageError(str(error)) from error


def init_args(words: Sequence[str], option: str) -> dict[str, Any]:
    """``key=value`` words, values as in YAML, and JSON objects, as one dictionary."""
    found: dict[str, Any] = {}
    for word in words:
        if word.lstrip().startswith("{"):
            try:
                found |= json.loads(word)
            except ValueError as error:
                raise UsageError(f"{option} {word} is not valid JSON: {error}.") from error
            continue
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} has {word!r}, expected key=value or a JSON object such as '{{\"width\": 8}}'.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{option} {word}: the value is not valid YAML: {error}.") from error
    return found


def make_module(class_path: str, arguments: dict[str, Any], checkpoint: Path | None) -> nn.Module:
    """A module by import path, with the weights and hyperparameters of a checkpoint where one is given."""
    if checkpoint is None:
        made = Maker({"class_path": class_path, "init_args": arguments}, "--module")()
        if not isinstance(made, nn.Module):
            raise UsageError(f"--module {class_path} made a {type(made).__name__}, expected a module.")
        if isinstance(made, LightningModule):
            made.configure_model()
        return made
    found: Any = find(class_path, "--module")
    if not isinstance(found, type) or not issubclass(found, LightningModule):
        raise UsageError(f"--checkpoint needs a LightningModule, and --module {class_path} is none.")
    return load_module(found, arguments, checkpoint)


def make_batches(spec: str, arguments: dict[str, Any], task: int | None, samples: int, module: nn.Module) -> list[Any]:
    """The first ``samples`` samples of a file, a datamodule's or stream's training data, a dataset or a loader.

    Each batch goes through the batch transfer hooks of the datamodule or else the module, as in training.
    """
    if Path(spec).suffix in FILES:
        if arguments or task is not None:
            raise UsageError(f"--data {spec} is a file: --data-init and --task have no meaning.")
        return first_samples([transferred(_read(Path(spec)), None, module)], samples)
    datamodule: LightningDataModule | None = None
    data = Maker({"class_path": spec, "init_args": arguments}, "--data")()
    if isinstance(data, LightningDataModule):
        if task is not None:
            tasks = getattr(data, "num_tasks", None)
            if not hasattr(data, "task_id") or tasks is None:
                raise UsageError(f"--task {task}: {spec} has no tasks (no num_tasks and task_id).")
            if not 0 <= task < tasks:
                raise UsageError(f"--task {task}: {spec} has tasks 0 to {tasks - 1}.")
            data.task_id = task
        data.prepare_data()
        data.setup("fit")
        datamodule, data = data, data.train_dataloader()
    elif task is not None:
        raise UsageError(f"--task {task}: {spec} is no datamodule.")
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=min(samples, 512))
    if isinstance(data, nn.Module) or not isinstance(data, Iterable):
        raise UsageError(f"--data {spec} is a {type(data).__name__}, expected a datamodule, dataset or loader.")
    iterator = iter(data)
    batches: list[Any] = []
    while num_samples(batches) < samples:
        batch = next(iterator, None)
        if batch is None or batch_size(batch) == 0:
            break
        batches.append(transferred(batch, datamodule, module))
    if not batches:
        raise UsageError(f"--data {spec} gave no batch.")
    return first_samples(batches, samples)


def _read(path: Path) -> Any:
    """``(inputs, targets)`` of a file."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                found: Any = {name: torch.from_numpy(file[name]) for name in file.files}
        except Exception as error:
            raise UsageError(f"--data {path} cannot be read: {error}") from error
    else:
        found = read_plain(path, "--data", "a pair of tensors that torch.save wrote")
    pair = None
    if isinstance(found, dict):
        pair = next((tuple(found[name] for name in names) for names in PAIRS if set(names) <= set(found)), None)
    elif isinstance(found, tuple | list) and len(found) == 2:
        pair = tuple(found)
    if pair is None or not all(isinstance(part, torch.Tensor) and part.ndim for part in pair):
        holds = f"holds {', '.join(map(str, found))}" if isinstance(found, dict) else f"is a {type(found).__name__}"
        raise UsageError(f"--data {path} {holds}; expected arrays 'inputs' and 'targets' (or 'x' and 'y'), or a pair.")
    if len(pair[0]) != len(pair[1]) or not len(pair[0]):
        raise UsageError(
            f"--data {path} has {len(pair[0])} inputs and {len(pair[1])} targets, expected as many, not 0."
        )
    return pair
