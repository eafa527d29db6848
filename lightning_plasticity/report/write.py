"""Write the report of one run or of many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_plasticity import __version__
from lightning_plasticity._optional import if_installed, require
from lightning_plasticity.records import FILE_NAME
from lightning_plasticity.report.find import ReportError, Run, find_runs
from lightning_plasticity.report.health import alerts_of, facts_of
from lightning_plasticity.report.heat import heat_maps
from lightning_plasticity.report.metrics import read_metrics, thinned
from lightning_plasticity.report.page import page
from lightning_plasticity.report.provenance import settings_rows, source_rows, thresholds
from lightning_plasticity.report.sections import sections_of
from lightning_plasticity.report.series import Line, lines_by_measure, to_json
from lightning_plasticity.report.versions import join_versions

Directory = str | os.PathLike[str]
REPORT = "report.html"
MAX_LISTED = 12  # tasks in a sentence


def write_report(directories: Directory | Sequence[Directory], out: Directory, *, metrics: Sequence[str] = ()) -> Path:
    """Write one HTML file about one run or several: spectra, ranks, units, norms, trainability, accuracy, alerts.

    Nothing is needed to read it but a browser; plotly.js is inside. Runs of one method (a study's, a demo's, or
    directories ``<method>/seed<s>``) are shown as mean and 95 % interval over seeds. Needs plotly.

    Args:
        directories: log directories (with ``plasticity.jsonl`` in or below them), or what a study or a demo wrote.
        out: the file; for a directory ``report.html`` in it. What is missing of its path is made.
        metrics: names of series that the run's loggers wrote (``metrics.csv``, TensorBoard), as logged. Without any,
            those whose names speak of accuracy, return, loss or error; of a study or a demo none, it has its own.

    Returns:
        The file.

    Raises:
        ReportError: where there are no records to report on, or a metric is asked for that no run logged.
        ModuleNotFoundError: without plotly.
    """
    single = isinstance(directories, str | os.PathLike)
    paths = [Path(directories)] if single else [Path(x) for x in directories]  # type: ignore[arg-type,union-attr]
    if not paths:
        raise ReportError("No directories; pass at least one run's log directory, such as lightning_logs/version_0.")
    plotly_js: str = require("plotly.offline", "The HTML report").get_plotlyjs()
    runs = find_runs(paths)
    for run in runs:
        if metrics or not run.rows:
            run.logged, run.others, unread = read_metrics(run.directory, run.records, metrics)
            run.problems += unread
    names = _names(runs)
    for name in metrics:
        if not any(name in run.logged for run in runs):
            raise ReportError(
                f"No run logged {name!r}; expected a column of metrics.csv or a scalar of TensorBoard beside "
                f"{FILE_NAME}. {f'There are, among others: {names}' if names else 'No such file was found.'}"
            )
    runs = join_versions(runs)
    measures = lines_by_measure(runs)
    heat, problems = heat_maps(runs)
    alerts = [alert for run in runs for alert in alerts_of(run)]
    for alert in alerts:
        alert["ratio"] = [to_json(x) for x in alert["ratio"]]
    groups = _groups(runs)
    data = {
        "groups": [{"name": name, "runs": len(members)} for name, members in groups.items()],
        "sections": sections_of(measures),
        "logged": _logged(runs),
        "heat": heat,
        "alerts": alerts,
        "eps": thresholds(runs),
    }
    parts = {
        "heading": ", ".join(str(path) for path in paths),
        "cards": [_card(name, members, measures, alerts) for name, members in groups.items()],
        "problems": [*(text for run in runs for text in _problems(run)), *problems],
        "settings": settings_rows(runs),
        "sources": source_rows(runs),
        "version": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    file = Path(out)
    file = file / REPORT if file.is_dir() else file
    file.parent.mkdir(parents=True, exist_ok=True)
    # Names that are no text in this locale hold halves of characters, which no file can.
    file.write_text(page(data, parts, plotly_js), encoding="utf-8", errors="replace")
    return file


def offer_report(directory: Path, tell: Callable[[str], object]) -> None:
    """Write ``report.html`` into a finished run's directory and say where it is; never fails.

    Args:
        directory: of a study or a demo.
        tell: called with one line of text.
    """
    if if_installed("plotly.offline") is None:
        tell("For an HTML report of all this: pip install plotly")
        return
    try:
        tell(f"Report: {write_report(directory, directory / REPORT)}")
    except Exception as error:
        tell(f"No HTML report: {type(error).__name__}: {error}")


def _logged(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By series, for JSON: a line for each run, and the steps at which tasks begin."""
    starts: dict[int, int] = {}
    for record in next((run.records for run in runs if run.logged), []):
        starts[record.task] = min(record.step, starts.get(record.task, record.step))
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.logged):
        lines = []
        for run in (run for run in runs if name in run.logged):
            steps, values = thinned(run.logged[name])
            lines.append({"group": run.group, "variant": "", "run": run.name, "steps": steps, "value": values})
        found.append({"label": name, "lines": lines, "starts": [starts[task] for task in sorted(starts)]})
    return found


def _names(runs: Sequence[Run]) -> str:
    """Of all that the runs logged, as a list in a sentence."""
    return _some(list(dict.fromkeys(name for run in runs for name in (*run.logged, *run.others))))


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def _problems(run: Run) -> list[str]:
    """What failed in a run: equal causes once, with the tasks."""
    failed: dict[tuple[str, str], list[str]] = {}
    for record in run.records:
        if record.failure is not None:
            where = f"{record.task} ({record.phase})"
            failed.setdefault((record.monitor, record.failure), []).append(where)
    texts = [f"{run.name}: {text}" for text in run.problems]
    return texts + [
        f"{run.name}: {monitor} at {_times(len(where), 'task boundary', 'task boundaries')}, task {_some(where)}: {why}"
        for (monitor, why), where in failed.items()
    ]


def _times(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:MAX_LISTED]) + (", ..." if len(texts) > MAX_LISTED else "")


def _card(
    name: str, runs: Sequence[Run], measures: dict[str, list[Line]], alerts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    facts = facts_of(name, measures)
    tasks = [max((*run.rows, *(record.task for record in run.records)), default=-1) + 1 for run in runs]
    span = f"{tasks[0]}" if len(set(tasks)) == 1 else f"{min(tasks)} to {max(tasks)}"
    failures = sum(record.failure is not None for run in runs for record in run.records)
    records = sum(len(run.records) for run in runs)
    counts = _times(len(runs), "run", "runs"), _times(records, "measurement", "measurements")
    notes = [f"{counts[0]}, {span} task{'s' * (span != '1')}, {counts[1]}."]
    if len(runs) > 1 and facts:
        notes.append("Means over runs; best is the mean of each run's own best, last / best the mean of their ratios.")
    if not facts:
        notes.append("No measure of the main ones has a finite value.")
    if not any(run.rows or run.logged for run in runs):
        names = _names(runs)
        found = (
            f"nothing logged beside the records is named for an accuracy, return or loss ({names}); show any by "
            "--metric NAME."
            if names
            else "no metrics.csv and no TensorBoard file with scalars was found beside the records. Log it with "
            "self.log(...)."
        )
        notes.append(f"Accuracy is not known: {found}")
    if failures:
        notes.append(
            f"{_times(failures, 'measurement', 'measurements')} failed, in whole or in part; causes are below."
        )
    for alert in (alert for alert in alerts if alert["group"] == name):
        sounded = [str(task) for task, on in zip(alert["tasks"], alert["active"], strict=True) if on]
        whose = f"{alert['run']}: " if len(runs) > 1 else ""
        times = _times(len(sounded), "time", "times")
        at = f"sounded {times}, at task {_some(sounded)}" if sounded else "did not sound"
        limit = "" if alert["fraction"] is None else f" at {alert['fraction']:g} of it"
        notes.append(f"{whose}alert on {alert['measure']} against {alert['against']}{limit} {at}.")
    return {"name": name, "facts": facts, "notes": notes}
