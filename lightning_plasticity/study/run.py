"""A whole study: what is still to do, doing it, and the table, figures and text at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_plasticity.report import offer_report
from lightning_plasticity.study.backends import Backend, WorkersDied, connected, run_all
from lightning_plasticity.study.build import importable, makers
from lightning_plasticity.study.compare import comparison_text
from lightning_plasticity.study.config import Study, StudyError, Unit
from lightning_plasticity.study.display import Display
from lightning_plasticity.study.files import locked, read_json, write_json, write_text
from lightning_plasticity.study.measure import monitor_makers
from lightning_plasticity.study.plots import figure_of, file_name, overview, plottable
from lightning_plasticity.study.table import TableRow, tidy, write_table
from lightning_plasticity.study.unit import ERROR, PROGRESS, RESULT, SETTINGS

DEATHS = 2  # of a unit's process at the same task, after which the unit counts as failed


@dataclass
class Outcome:
    """What a study came to.

    Attributes:
        rows: the tidy table of all finished units.
        failures: why a unit failed, by its name.
        finished: how many units are finished.
    """

    rows: list[TableRow]
    failures: dict[str, str] = field(default_factory=dict)
    finished: int = 0


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    backend: Backend = "loky",
    scheduler: str | None = None,
    rerun_changed: bool = False,
    reference: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run what is not finished, then write ``results.csv``, ``results.jsonl``, ``comparison.txt`` and ``plots/``.

    Where plotly is installed there is a ``report.html`` of all of it too.

    Args:
        study: from ``load_study``.
        out: its directory; made when missing. On a cluster it should be on a disk that all machines share.
        jobs: processes on this machine.
        backend: ``"loky"``, ``"dask"`` or ``"ray"``.
        scheduler: address of the cluster; None for a new local one.
        rerun_changed: run units again whose settings are no longer those of the file, instead of refusing.
        reference: the method that others are compared with; None for the first.
        console: where to tell; None for standard output.

    Returns:
        The table, and which units failed and why.

    Raises:
        StudyError: for a file that cannot be run, or that has changed since units were run.
        BlockingIOError: when another process runs a study in this directory.
    """
    console = Console(soft_wrap=True, highlight=False) if console is None else console
    reference = next(iter(study.methods)) if reference is None else reference
    if reference not in study.methods:
        raise StudyError(f"--reference is {reference!r}; the study has: {', '.join(study.methods)}.")
    check(study)
    with locked(out, wait=False):
        units = study.units()
        _settle_changes(units, out, rerun_changed)
        todo = [unit for unit in units if not (unit.directory(out) / RESULT).exists()]
        _tell_what_is_ahead(units, todo, out, console)
        failures = {}
        if todo:
            with Display(units, out, console, study.metric):
                failures = _run(todo, out, jobs, backend, scheduler)
        outcome = gather(study, out)
        outcome.failures = failures
        write_reports(outcome.rows, out, study.metric, reference)
    _tell_outcome(outcome, len(units), out, console)
    if outcome.rows:
        offer_report(out, lambda line: console.print(line, markup=False))
    return outcome


def check(study: Study) -> None:
    """Refuse what cannot be made, before anything runs; also in methods that are left out this time."""
    with importable(study.search):
        for method, settings in {**study.methods, **study.others}.items():
            makers(settings, f"methods.{method}: ")
        monitor_makers(next(iter(study.methods.values()))["measure"])


def gather(study: Study, out: Path) -> Outcome:
    """The table of the units that are finished."""
    results = [read_json(unit.directory(out) / RESULT) for unit in sorted(study.units(), key=_by_method(study))]
    finished = [result for result in results if result is not None]
    return Outcome(tidy(finished), finished=len(finished))


def write_reports(rows: list[TableRow], out: Path, metric: str, reference: str) -> None:
    """The table, the comparison and the figures; nothing where there are no rows."""
    if not rows:
        return
    write_table(rows, out)
    write_text(out / "comparison.txt", comparison_text(rows, metric, reference))
    write_figures(rows, out, metric)


def write_figures(rows: list[TableRow], out: Path, metric: str) -> None:
    """``overview.png``, and ``plots/`` with a picture for each measure."""
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    overview(rows, metric).savefig(out / "overview.png", dpi=110)
    for key in plottable(rows):
        figure_of(rows, key).savefig(plots / file_name(key), dpi=80)


def _by_method(study: Study) -> Any:
    order = {method: k for k, method in enumerate(study.methods)}
    return lambda unit: (order[unit.method], unit.seed)


def _run(units: Sequence[Unit], out: Path, jobs: int, backend: Backend, scheduler: str | None) -> dict[str, str]:
    """Run all units, again where workers died; why those failed that did."""
    failures: dict[str, str] = {}
    deaths: dict[tuple[str, int], int] = {}  # by unit and task
    left = list(units)
    with connected(backend, scheduler):
        while left:
            for unit in left:  # what an earlier run left must not look like this one's
                (unit.directory(out) / ERROR).unlink(missing_ok=True)
                (unit.directory(out) / PROGRESS).unlink(missing_ok=True)
            try:
                outcomes = run_all(left, out, jobs, backend)
            except WorkersDied as error:
                failures |= _died(left, out, deaths, error)
                left = [unit for unit in left if unit.name not in failures and not _ended(unit, out)]
                continue
            for unit, outcome in zip(left, outcomes, strict=True):
                _keep(unit, outcome, out)
            left = []
    for unit in units:
        text = _error(unit, out)
        if text is not None and unit.name not in failures:
            failures[unit.name] = text
    return failures


def _keep(unit: Unit, outcome: dict[str, Any], out: Path) -> None:
    """A cluster without a shared disk sends results back; here they are written where they are read."""
    path = unit.directory(out) / RESULT
    if "result" in outcome and not path.exists():
        write_json(path, outcome["result"])
    if "error" in outcome and not path.with_name(ERROR).exists():
        write_text(path.with_name(ERROR), outcome["error"])


def _died(left: Sequence[Unit], out: Path, deaths: dict[tuple[str, int], int], error: Exception) -> dict[str, str]:
    """Count the deaths of units that were running; too many at the same task are a failure."""
    failures = {}
    for unit in left:
        progress = read_json(unit.directory(out) / PROGRESS)
        if progress is None or _ended(unit, out):
            continue
        task = progress["done"]
        deaths[unit.name, task] = deaths.get((unit.name, task), 0) + 1
        if deaths[unit.name, task] >= DEATHS:
            why = f"its process died {DEATHS} times in task {task} (killed, out of memory, or a crash): {error}"
            write_text(unit.directory(out) / ERROR, why)
            failures[unit.name] = why.splitlines()[0]
    return failures


def _ended(unit: Unit, out: Path) -> bool:
    return any((unit.directory(out) / name).exists() for name in (RESULT, ERROR))


def _error(unit: Unit, out: Path) -> str | None:
    directory = unit.directory(out)
    if (directory / RESULT).exists():
        return None
    if not (directory / ERROR).exists():
        return "it did not run"
    return (directory / ERROR).read_text(encoding="utf-8").split("\n\n")[0].strip()  # a traceback follows


def _settle_changes(units: Sequence[Unit], out: Path, rerun: bool) -> None:
    """Refuse units on disk with other settings than the file's, or forget them."""
    changed = []
    for unit in units:
        found = read_json(unit.directory(out) / SETTINGS)
        if found is not None and found["fingerprint"] != unit.fingerprint:
            changed.append((unit, found["settings"]))
    if changed and not rerun:
        unit, before = changed[0]
        raise StudyError(
            f"{len(changed)} unit(s) in {out} were run with other settings, the first {unit.name}: "
            f"{'; '.join(_changes(before, unit.settings))}. Use another --out, or --rerun-changed to run them again."
        )
    for unit, _ in changed:
        for path in sorted(unit.directory(out).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def _changes(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in _changes(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if before == now else [f"{where} was {json.dumps(before)}, is {json.dumps(now)}"]


def _tell_what_is_ahead(units: Sequence[Unit], todo: Sequence[Unit], out: Path, console: Console) -> None:
    methods = len({unit.method for unit in units})
    seeds = len({unit.seed for unit in units})
    console.print(
        f"{methods} method(s) x {seeds} seed(s); {len(units) - len(todo)} of {len(units)} finished before. "
        f"Results go to {out}."
    )


def _tell_outcome(outcome: Outcome, total: int, out: Path, console: Console) -> None:
    if outcome.rows:
        console.print()
        console.print((out / "comparison.txt").read_text(encoding="utf-8").rstrip(), markup=False)
        console.print(f"\nTable: {out / 'results.csv'}  pictures: {out / 'overview.png'}, {out / 'plots'}")
    logs = sorted(out.glob("units/*/*/log.txt"))
    if logs:
        console.print(f"{len(logs)} unit(s) gave warnings; the first: {logs[0]}")
    console.print(f"{outcome.finished} of {total} units finished.")
    for name, why in outcome.failures.items():
        console.print(f"FAILED {name}: {why}", markup=False)
    if outcome.failures:
        console.print("Failed units are run again by the same command; error.txt in their directories says more.")
