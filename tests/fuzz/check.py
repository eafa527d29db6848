"""Whether anything was changed or lost, by comparison with the same run without monitors."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fuzz.cases import Case
from fuzz.faults import ERRORS, OUTSIDE, Fault
from fuzz.one_run import Run, described, run
from lightning_plasticity import Spectrum, read_records
from lightning_plasticity.callbacks.interrupts import INTERRUPTED
from lightning_plasticity.records import FILE_NAME

TOLD = re.compile(
    r"(\w+) could not measure (?:.*? )?at the (?:start|end) of task \d+: (.*?)\.? Training goes on\.", re.DOTALL
)
ALL = [(task, phase) for task in (0, 1) for phase in ("start", "end")]  # boundaries of two fits
PLAIN = {
    "precision": "32-true",
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "max_epochs": 1,
    "limit_train_batches": 1.0,
}


@dataclass
class Verdict:
    """Of one case: ``changed`` and ``lost`` say what, and are empty when all is well."""

    case: str
    row: str
    about: str
    result: str = ""  # measured, failed, ended, propagated or not reached
    changed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    error: str = ""
    measurements: int = 0
    failures: int = 0


def check(case: Case, directory: Path) -> Verdict:
    """Run the case without monitors and with them."""
    calm = replace(case.fault, place="nothing") if case.fault.in_training else case.fault
    plain = run(case, calm, directory / "calm", watched=False)
    if plain.error:  # Lightning, or the module, does not take these settings
        case = replace(case, settings={**case.settings, **PLAIN}, l2er=False)
        case.settings.pop("gradient_clip_algorithm", None)
        plain = run(case, calm, directory / "plain", watched=False)
    fault = case.fault
    watched = run(case, fault, directory / "watched", watched=True)
    if watched.fired == 0 and watched.count:  # too late a call: one that there is
        fault = replace(fault, nth=1 + fault.which % watched.count)
        watched = run(case, fault, directory / "again", watched=True)
    if fault.in_training:
        plain = run(case, fault, directory / "broken", watched=False)
    about = f"{case.kind.name}, {case.settings}, {case.schedule}, {case.monitors}, given={case.given}, l2er={case.l2er}"
    verdict = Verdict(case.number, fault.row, f"{about}, {fault}")
    verdict.changed, verdict.lost = _changed(plain, watched), _lost(case, fault, watched)
    records = [record for monitor in watched.monitors for record in monitor.records]
    verdict.error = watched.error
    verdict.measurements = len(records)
    verdict.failures = sum(record.failure is not None for record in records)
    verdict.result = _result(fault, watched, verdict.failures)
    return verdict


def _result(fault: Fault, watched: Run, failures: int) -> str:
    if watched.cut:
        return "ended"
    if watched.error:
        return "propagated"
    if fault.row != "nothing" and not watched.fired:
        return "not reached"
    if fault.place in OUTSIDE:
        return "told"
    return "failed" if failures else "measured"


def _changed(plain: Run, watched: Run) -> list[str]:
    found = [f"at a boundary: {each}" for each in dict.fromkeys(watched.differences)]
    if watched.outcome["measuring"]:
        found.append("still measuring")
    if watched.cut:
        if watched.batches != plain.batches[: len(watched.batches)]:
            found.append("batches")
        if isinstance(watched.again, str) and not isinstance(plain.again, str):
            found.append(f"module: {watched.again}")
        if not watched.error.startswith("SystemExit"):
            found.append(f"ended by {watched.error}")
        return found
    if watched.error != plain.error:
        found.append(f"error {watched.error or None}, expected {plain.error or None}")
    found += [key for key in plain.outcome if plain.outcome[key] != watched.outcome[key]]
    return found + (["weights after one more fit"] if plain.again != watched.again else [])


def _lost(case: Case, fault: Fault, watched: Run) -> list[str]:
    found = []
    reached = watched.due[:-1] if watched.cut else watched.due
    if (
        case.schedule[0] == "fits"
        and not watched.error
        and watched.due != [(t, p) for t in (0, 1) for p in ("start", "end")]
    ):
        found.append(f"boundaries {watched.due}")
    for monitor in watched.monitors:
        due = [(t, p) for t, p in reached if p in monitor.when and t % monitor.every_n_tasks == 0]
        have = [(record.task, record.phase) for record in monitor.records]
        if have != due and not (watched.cut and have == [*due, watched.due[-1]]):
            found.append(f"records of {monitor.state_key}: {have}, expected {due}")
        found += [
            f"neither numbers nor a failure in {(r.task, r.phase)} of {r.monitor}"
            for r in monitor.records
            if not r.values and r.failure is None
        ]
    return found + _untold(fault, watched) + _files(fault, watched)


def _untold(fault: Fault, watched: Run) -> list[str]:
    """Failures without their warning, warnings without their failure, and what is told again and again."""
    found = []
    told = [match.groups() for match in map(TOLD.fullmatch, watched.told) if match]
    classes = Counter(type(monitor).__name__ for monitor in watched.monitors)
    for (name, why), times in Counter((name, _normal(why)) for name, why in told).items():
        if times > classes[name]:
            found.append(f"{times} times told: {why}")
        if not any(why in _normal(r.failure or "") for m in watched.monitors for r in m.records) and not watched.cut:
            found.append(f"told, not recorded: {why}")
    by_hand = sum(f"was {INTERRUPTED}. Training goes on" in text for text in watched.told)
    if by_hand != sum(record.failure == INTERRUPTED for m in watched.monitors for record in m.records):
        found.append(f"{by_hand} interrupts told")
    for monitor in watched.monitors:
        whys = sorted({_normal(why) for name, why in told if name == type(monitor).__name__}, key=len, reverse=True)
        for record in monitor.records:
            left = _normal(record.failure or "")
            for why in whys:
                left = left.replace(why, "")
            if record.failure not in (None, INTERRUPTED) and len(left) == len(_normal(record.failure)):
                found.append(f"recorded, not told: {record.failure}")
    keeping = [text for text in watched.told if "Monitor could not " in text and not TOLD.fullmatch(text)]
    found += [f"told again: {text}" for text, n in Counter(map(_normal, keeping)).items() if n > len(watched.monitors)]
    if watched.fired and fault.place in OUTSIDE and fault.error != "interrupt":
        text = described(ERRORS[fault.error]()).rstrip(". :")
        if not any(text in each for each in keeping):
            found.append(f"{fault.place}: {text} is not told, but {keeping}")
    elif keeping:
        found.append(f"not asked for: {keeping}")
    return found


def _normal(text: str) -> str:
    return re.sub(r"\d[\d.]*(e[-+]?\d+)?", "#", text).rstrip(".")


def _files(fault: Fault, watched: Run) -> list[str]:
    """Records and spectra on disk are those in memory; one less for each that could not be written."""
    directory = watched.directory
    have = [record for monitor in watched.monitors for record in monitor.records]
    file = directory / FILE_NAME
    kept = read_records(directory) if file.exists() else []
    lost = watched.fired if fault.place == "record file" else 0
    found = [] if len(kept) == len(have) - lost or watched.cut else [f"{len(kept)} of {len(have)} records in the file"]
    plain = [json.dumps(record.to_dict()) for record in have]
    found += [f"another record in the file: {record}" for record in kept if json.dumps(record.to_dict()) not in plain]
    for record in kept:
        for name in record.spectra.values():
            Spectrum.load(directory / name)
    spectra = sum(len(record.spectra) for record in kept)
    due = sum(_matrices(record) for record in kept) - (watched.fired if fault.place == "spectrum file" else 0)
    return found if spectra == due or watched.cut else [*found, f"{spectra} spectra of {due}"]


def _matrices(record: Any) -> int:
    return sum(key.endswith("/trace") for key in record.values)
