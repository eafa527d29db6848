"""The page around the figures: headings, cards, captions, settings. All that comes from outside is escaped here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lightning_plasticity.report.health import Ends, Fact, spell
from lightning_plasticity.report.sections import ALERTS, LOGGED, SECTIONS, SPECTRA, Section

TITLE = "Plasticity report"
HEALTH, PROBLEMS, PROVENANCE = "Health at a glance", "What could not be measured", "Settings and provenance"
MAX_CARDS = 4  # more are a table
MARK = "\u25bc"
INTRO = (
    "There is no verdict here: each measure's last value is set beside the best of the same run so far. The small "
    "lines go from each measure's own lowest to its highest, so a flat course can look steep: read the ratio. A fresh "
    "network's count of eigenvalues is small, so the highest often comes late. Two ratios have thresholds, known from "
    "our studies: srank below 0.946 of its best (PlasticityAlert's default: 88 % of the falling runs found, 39 % of "
    "the healthy ones too) and online or logged training accuracy below 0.87 of its best (62 % found, 19 %). Nothing "
    "measured predicted the next task's accuracy better than the last task's accuracy did. Tasks are counted from 0, "
    "as in the records."
)


def embed(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def page(data: Mapping[str, Any], parts: Mapping[str, Any], plotly_js: str) -> str:
    """The whole file.

    Args:
        data: what the figures are drawn from.
        parts: ``heading`` (text), ``cards``, ``problems`` (texts), ``settings`` and ``sources`` (rows of text).
        plotly_js: the library, as text.
    """
    sections = {section.key: section for section in SECTIONS}
    blocks = {}
    for one in data["sections"]:
        section = sections[one["key"]]
        blocks[section.key] = (section.title, _section(section, [option["label"] for option in one["options"]]))
    if data["logged"]:
        blocks["logged"] = (LOGGED.title, _section(LOGGED, [one["label"] for one in data["logged"]]))
    if data["heat"]:
        blocks["spectra"] = (SPECTRA.title, _spectra(data["heat"]))
    if data["alerts"]:
        blocks["alerts"] = (ALERTS.title, _section(ALERTS, []))
    order = ["accuracy", "logged", "spectra", *(section.key for section in SECTIONS[1:]), "alerts"]
    shown = [(key, *blocks[key]) for key in order if key in blocks]
    links = [("health", HEALTH), *((key, title) for key, title, _ in shown)]
    links += [("problems", PROBLEMS), ("provenance", PROVENANCE)]
    assets = files("lightning_plasticity.report") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("style.css", "figures.js"))
    navigation = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in links)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{TITLE}: {escape(parts["heading"])}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{TITLE}</h1><p class="dim">{escape(parts["heading"])}</p></header>
<nav aria-label="Sections"><ul>{navigation}</ul></nav>
<main id="main">
<noscript><p class="warn">Figures and tables need JavaScript; the rest of the page does not.</p></noscript>
{_health(parts["cards"])}
{_runs(data["groups"])}
{"".join(block for _, _, block in shown)}
{_problems(parts["problems"])}
{_provenance(parts["settings"], parts["sources"])}
</main>
<footer><p class="dim">Made by lightning_plasticity {escape(parts["version"])}, {escape(parts["made"])}.</p></footer>
<script type="application/json" id="data">{embed(data)}</script>
<script type="text/plain" id="plotly">{plotly_js}</script>
<script>{script}</script>
</body>
</html>
"""


def _health(cards: Sequence[Mapping[str, Any]]) -> str:
    body = f'<div class="cards">{"".join(map(_card, cards))}</div>'
    if len(cards) > MAX_CARDS:
        body = f"{_overview(cards)}<details><summary>Each in more detail</summary>{body}</details>"
    return _titled("health", HEALTH, f"{body}<p>{INTRO}</p>")


def _overview(cards: Sequence[Mapping[str, Any]]) -> str:
    """One row for each card, last values with their share of the best."""
    names = list(dict.fromkeys(fact.name for card in cards for fact in card["facts"]))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = ""
    for card in cards:
        facts = {fact.name: fact for fact in card["facts"]}
        cells = "".join(f"<td>{_last(facts.get(name))}</td>" for name in names)
        rows += f'<tr><th scope="row">{escape(card["name"])}</th>{cells}</tr>'
    return (
        "<p>Last value, and in per cent of the run's own best so far (means over runs).</p>"
        '<div class="scroll overview" tabindex="0" role="region" aria-label="Last values">'
        f'<table><thead><tr><th scope="col">method or run</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _last(fact: Fact | None) -> str:
    if fact is None:
        return "&ndash;"
    share = "" if math.isnan(fact.share) else f'<span class="note">{fact.share:.0%}</span>'
    mark = f'<span class="note warn">{MARK} {escape(fact.below)}</span>' if fact.below else ""
    note = f'<span class="note">{escape(fact.caution)}</span>' if fact.caution else ""
    return f"{_value(fact.last)}{share}{mark}{note}"


def _cell(ends: Ends, note: str = "") -> str:
    kind = "" if ends[0] == ends[1] else ' class="interval"'
    return f"<td{kind}>{_value(ends, note)}</td>"


def _value(ends: Ends, note: str = "") -> str:
    """A number with a note below it; where only an interval is known, the note says so."""
    note = ", ".join(filter(None, (note, "not resolved closer" if ends[0] != ends[1] else "")))
    return escape(spell(ends)) + (f'<span class="note">{escape(note)}</span>' if note else "")


def _card(card: Mapping[str, Any]) -> str:
    facts: Sequence[Fact] = card["facts"]
    rows = ""
    for fact in facts:
        warning = f'<span class="note warn">{MARK} {escape(fact.below)}</span>' if fact.below else ""
        warning += f'<span class="note">{escape(fact.caution)}</span>' if fact.caution else ""
        share = "" if math.isnan(fact.share) else f"{fact.share:.0%}"
        rows += (
            f'<tr><th scope="row">{escape(fact.name)}<span class="note">{escape(fact.says)}</span>{warning}</th>'
            f"<td>{sparkline(fact.course)}</td>{_cell(fact.last)}{_cell(fact.best, fact.best_is)}<td>{share}</td></tr>"
        )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("over tasks", "last", "best so far", "last / best"))
    table = (
        f'<table><thead><tr><th class="left" scope="col">measure</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in card["notes"])
    body = _standing(facts) + notes + (table if facts else "")
    return f'<article class="card"><h3>{escape(card["name"])}</h3>{body}</article>'


def _standing(facts: Sequence[Fact]) -> str:
    """One line: which of the measures that a threshold is known for are below it."""
    low = [f"{fact.name} {fact.below}" for fact in facts if fact.below]
    if low:
        return f'<p class="standing warn">{MARK} {escape("; ".join(low))}.</p>'
    judged = ", ".join(fact.name for fact in facts if fact.judged)
    text = f"Not below a known threshold: {judged}" if judged else "Measured nothing that a threshold is known for"
    return f'<p class="standing">{escape(text)}.</p>'


def sparkline(course: Mapping[int, float]) -> str:
    """A small line of the values over tasks, from its lowest to its highest; nothing to read off."""
    if len(course) < 2:
        return ""
    low, high = min(course.values()), max(course.values())
    first, last = min(course), max(course)
    points = [
        (2 + 76 * (task - first) / (last - first), 18 - 14 * ((value - low) / (high - low) if high > low else 0.5))
        for task, value in course.items()
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    end = f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2"/>'
    return f'<svg class="spark" viewBox="0 0 80 22" aria-hidden="true"><polyline points="{line}"/>{end}</svg>'


def _runs(groups: Sequence[Mapping[str, Any]]) -> str:
    if len(groups) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{escape(group["name"])}"><span class="swatch"></span>'
        f"{escape(group['name'])} ({group['runs']})</label>"
        for group in groups
    )
    return f'<fieldset id="runs"><legend>Shown in the figures and tables (number of runs)</legend>{boxes}</fieldset>'


def _section(section: Section, labels: Sequence[str]) -> str:
    return _titled(section.key, section.title, _panel(labels, "Measure") + _caption(section))


def _titled(key: str, title: str, body: str) -> str:
    return (
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}</h2>{body}</section>'
    )


def _spectra(heat: Sequence[Mapping[str, Any]]) -> str:
    labels = []
    for one in heat:
        name = f"{one['run']}: {one['matrix']}" + (f", {one['variant']}" if one["variant"] else "")
        labels += [name, f"{name}, negative only"] if "negative" in one else [name]
    groups = [one["group"] for one in heat for _ in range(2 if "negative" in one else 1)]
    second = next((k for k, group in enumerate(groups) if group != groups[0]), min(1, len(labels) - 1))
    panels = _panel(labels, "Spectra of") + (_panel(labels, "beside", second) if len(labels) > 1 else "")
    return _titled("spectra", SPECTRA.title, f'<div class="panels">{panels}</div>{_caption(SPECTRA)}')


def _panel(labels: Sequence[str], what: str, selected: int = 0) -> str:
    options = "".join(
        f"<option{' selected' if k == selected else ''}>{escape(text)}</option>" for k, text in enumerate(labels)
    )
    choice = (
        f'<label><span>{what}</span> <select autocomplete="off">{options}</select></label>' if len(labels) > 1 else ""
    )
    only = f'<p class="dim">{escape(labels[0])}</p>' if len(labels) == 1 else ""
    return (
        f'<div class="panel">{choice}{only}<div class="figure" role="img"></div><div class="legend"></div>'
        '<details><summary>The numbers</summary><div class="scroll" tabindex="0" role="region" '
        'aria-label="Table of the figure\'s numbers"></div></details></div>'
    )


def _caption(section: Section) -> str:
    return f"<p>{escape(section.means)}</p><p><strong>When it misleads.</strong> {escape(section.misleads)}</p>"


def _problems(problems: Sequence[str]) -> str:
    items = "".join(f"<li><pre>{escape(problem)}</pre></li>" for problem in problems)
    body = f"<ul>{items}</ul>" if problems else "<p>Nothing failed, and all files could be read.</p>"
    return _titled("problems", PROBLEMS, body)


def _provenance(settings: Iterable[Sequence[str]], sources: Iterable[Sequence[str]]) -> str:
    how = _table(("monitor", "setting", "value", "where"), settings)
    where = _table(("run", "records", "tasks", "last written", "directory"), sources)
    body = (
        "<p>In several runs: mean over those that have a value, with the 95 % interval of Student's t; in brackets how "
        "many. In one run: the interval of the measurement itself.</p>"
        f"<details><summary>Settings of the measurements</summary>{how}</details>"
        f"<details><summary>Runs and files</summary>{where}</details>"
    )
    return _titled("provenance", PROVENANCE, body)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th class="left" scope="col">{head}</th>' for head in heads)
    body = "".join("<tr>" + "".join(f'<td class="left">{escape(x)}</td>' for x in row) + "</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
