"""One unit of a study: one method on one seed, task after task, going on where it was stopped.

What a task leaves behind is on disk before the next one starts. A unit that was killed ends with the same bits as one
that was not: with a fit for each task because every task, after the first, starts from that file; in one fit because
the file holds the Trainer's checkpoint between two epochs and all random states.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_plasticity.callbacks import EveryFit, EveryNEpochs, Regularization, TaskTracker
from lightning_plasticity.callbacks.interrupts import ending_runs
from lightning_plasticity.study.boundary import BoundaryCheckpoint, random_states, set_random_states
from lightning_plasticity.study.build import importable, makers, own_optimizer
from lightning_plasticity.study.config import Settings, StudyError, Unit
from lightning_plasticity.study.files import locked, read_json, write_atomically, write_json, write_text
from lightning_plasticity.study.measure import Row, TaskRows, every_n_tasks, measured, monitor_makers
from lightning_plasticity.study.surroundings import one_unit

SETTINGS, RESULT, PROGRESS, STATE, ERROR = "settings.json", "result.json", "progress.json", "state.pt", "error.txt"
TRAINER_DEFAULTS = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "devices": 1,
}


@dataclass
class Parts:
    """What a unit is made of."""

    module: LightningModule
    stream: Any
    callbacks: list[Callback]
    rows: TaskRows

    @property
    def num_tasks(self) -> int:
        """Length of the stream."""
        return int(self.stream.num_tasks)


def run_unit(unit: Unit, directory: Path) -> dict[str, Any]:
    """Run a unit to its end, or return its result if it is there.

    Args:
        unit: what to run.
        directory: of this unit; made when missing.

    Returns:
        ``{"result": ...}``, or ``{"error": text}`` when anything went wrong, so that other units go on.
    """
    try:
        surroundings = one_unit(unit.settings["threads"], directory / "log.txt")
        with locked(directory), importable(unit.search), surroundings, ending_runs():
            result = read_json(directory / RESULT)
            if result is None or result["fingerprint"] != unit.fingerprint:
                result = _run(unit, directory)
            return {"result": result}
    except Exception as error:
        why = f"{error}" if isinstance(error, StudyError) else f"{type(error).__name__}: {error}"
        write_text(directory / ERROR, f"{why}\n\n{traceback.format_exc()}")
        return {"error": why}


def _run(unit: Unit, directory: Path) -> dict[str, Any]:
    (directory / ERROR).unlink(missing_ok=True)
    before = read_json(directory / SETTINGS)
    if before is not None and before["fingerprint"] != unit.fingerprint:
        (directory / STATE).unlink(missing_ok=True)
    about = {"method": unit.method, "seed": unit.seed, "fingerprint": unit.fingerprint}
    write_json(directory / SETTINGS, about | {"settings": unit.settings})
    seed_everything(unit.seed, verbose=False)
    parts = assemble(unit, directory)
    run = _fit_for_each_task if unit.settings["fits"] == "per_task" else _one_fit
    parts = run(unit, directory, parts)
    extra = measured(parts.callbacks)
    rows = [row | extra.get(task, {}) for task, row in enumerate(parts.rows.rows)]
    if len(rows) < parts.num_tasks:
        raise StudyError(
            f"training ended after {len(rows)} of {parts.num_tasks} tasks; look for early stopping or max_steps."
        )
    result = about | {"rows": rows, "weights": _fingerprint(parts.module)}
    write_json(directory / RESULT, result)
    (directory / STATE).unlink(missing_ok=True)
    return result


def assemble(unit: Unit, directory: Path) -> Parts:
    """Make all objects of a unit; the random state should have been seeded.

    Raises:
        StudyError: for what the file names and cannot be made, or a stream that cannot be run in this way.
    """
    settings = unit.settings
    made = makers(settings, f"{unit.method}: ")
    module = made["module"][0]()
    for transform in made["transforms"]:
        changed = transform(module, seed=unit.seed)
        module = changed if isinstance(changed, torch.nn.Module) else module
    for optimizer in made["optimizer"]:
        module.configure_optimizers = partial(own_optimizer, module, optimizer.target, optimizer.arguments())
    stream = made["stream"][0](seed=unit.seed)
    check_stream(stream, settings)
    schedule = EveryFit() if settings["fits"] == "per_task" else EveryNEpochs(stream.epochs_per_task)
    tracker = TaskTracker(schedule)
    monitors = [
        maker(save_dir=str(directory), every_n_tasks=every_n_tasks(tasks, stream.num_tasks))
        for maker, tasks in monitor_makers(settings["measure"])
    ]
    own = [maker(seed=unit.seed) for maker in made["callbacks"]]
    regularizers = [maker() for maker in made["regularizers"]]
    if regularizers:
        own.append(Regularization(regularizers))
    if extra := [callback for callback in own if isinstance(callback, TaskTracker)]:
        raise StudyError(f"{unit.method}: callbacks hold {len(extra)} TaskTracker; the study brings its own, drop it.")
    rows = TaskRows(settings["online_metric"], tracker)
    return Parts(module, stream, [tracker, *monitors, *own, rows], rows)


def check_stream(stream: Any, settings: Settings) -> None:
    """Refuse a stream that lacks what this kind of fits needs."""
    name = type(stream).__name__
    needed = {"num_tasks": "the number of tasks"}
    if settings["fits"] == "per_task":
        needed["task_id"] = "set to the task before each fit; train_dataloader serves that task"
    if settings["fits"] == "one" or not _bounded(settings["trainer"]):
        needed["epochs_per_task"] = "epochs of each task"
    for attribute, why in needed.items():
        if not hasattr(stream, attribute):
            raise StudyError(f"stream: {name} has no attribute {attribute!r} ({why}); see docs/how-to/study.md.")
    if settings["fits"] == "one" and _bounded(settings["trainer"]):
        raise StudyError("trainer: with fits: one the length follows from the stream; drop max_epochs and max_steps.")


def _bounded(trainer: Settings) -> bool:
    return trainer.get("max_epochs") is not None or trainer.get("max_steps", -1) != -1


# ---- a fit for each task ----------------------------------------------------------------------------------------


def _fit_for_each_task(unit: Unit, directory: Path, parts: Parts) -> Parts:
    path = directory / STATE
    done = _load(path, parts) if path.exists() else 0
    _announce(directory, parts, done)
    for task in range(done, parts.num_tasks):
        if task > done:
            _load(path, parts)  # as after an interruption
        parts.rows.tell = _teller(directory, parts)
        parts.stream.task_id = task
        arguments = TRAINER_DEFAULTS | unit.settings["trainer"]
        if not _bounded(arguments):
            arguments["max_epochs"] = parts.stream.epochs_per_task
        Trainer(**arguments, callbacks=list(parts.callbacks)).fit(parts.module, datamodule=parts.stream)
        _save(path, parts, task + 1)
    return parts


def _save(path: Path, parts: Parts, done: int) -> None:
    state = {
        "done": done,
        "objects": (parts.module, parts.callbacks, parts.rows),
        "stream": parts.stream.state_dict(),
        "random": random_states(),
    }
    try:
        write_atomically(path, lambda file: torch.save(state, file, pickle_module=cloudpickle))
    except Exception as error:
        raise StudyError(
            f"the state after task {done - 1} cannot be saved: {type(error).__name__}: {error}. Module and callbacks "
            "must be picklable; leave out open files, locks and generators, or drop them in __getstate__."
        ) from error


def _load(path: Path, parts: Parts) -> int:
    state = torch.load(path, weights_only=False)
    parts.module, parts.callbacks, parts.rows = state["objects"]
    parts.stream.load_state_dict(state["stream"])
    set_random_states(state["random"])
    return int(state["done"])


# ---- one fit ----------------------------------------------------------------------------------------------------


def _one_fit(unit: Unit, directory: Path, parts: Parts) -> Parts:
    path, epochs = directory / STATE, parts.stream.epochs_per_task
    boundary = BoundaryCheckpoint(path, epochs)
    trainer = Trainer(
        **(TRAINER_DEFAULTS | unit.settings["trainer"]),
        max_epochs=parts.num_tasks * epochs,
        reload_dataloaders_every_n_epochs=epochs,
        callbacks=[*parts.callbacks, boundary],
    )
    boundary.watch(trainer, parts.stream)
    parts.rows.tell = _teller(directory, parts)
    _announce(directory, parts, 0)
    arguments: dict[str, Any] = {}
    if path.exists():
        arguments["ckpt_path"] = str(path)
        if "weights_only" in signature(Trainer.fit).parameters:
            arguments["weights_only"] = False
    trainer.fit(parts.module, datamodule=parts.stream, **arguments)
    return parts


# ---- small things -----------------------------------------------------------------------------------------------


def _announce(directory: Path, parts: Parts, done: int, row: Row | None = None) -> None:
    about = {"done": done, "tasks": parts.num_tasks, "pid": os.getpid(), "host": socket.gethostname()}
    write_json(directory / PROGRESS, about | {"time": time.time(), "row": row})


def _teller(directory: Path, parts: Parts) -> Callable[[int, Row], None]:
    parent = os.getppid()

    def tell(task: int, row: Row) -> None:
        # A worker on this machine whose study was killed would go on unseen; the task is done again by the next run.
        if current_process().name.startswith("LokyProcess") and os.getppid() != parent:
            os._exit(1)
        _announce(directory, parts, task + 1, row)

    return tell


def _fingerprint(module: torch.nn.Module) -> str:
    """Of the final weights and buffers, to tell whether two runs ended alike."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
