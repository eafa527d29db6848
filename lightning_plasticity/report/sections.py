"""The report's figures: which measures each shows, what they mean, and when they mislead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_plasticity.report.series import Line, natural

CAP_IN_SIGHT = 10  # times the highest count; a cap above would press the counts to the ground
MATRICES = {"ggn": "GGN", "hessian": "Hessian", "ntk": "NTK"}


@dataclass(frozen=True)
class Section:
    """A figure with a choice of measures.

    Attributes:
        key: of the section, as its anchor.
        title: heading.
        measures: patterns of the measures it shows, in the order of the choice.
        means: what it shows.
        misleads: when not to believe it.
    """

    key: str
    title: str
    measures: tuple[str, ...]
    means: str
    misleads: str


SECTIONS = (
    Section(
        "accuracy",
        "Accuracy",
        (r"online_.*", r"end_(?!.*/).*", r"logged/.*"),
        "Online: mean over a task's minibatches, each before its update, so it says how well and how fast the task "
        "was learnt. End: the final weights on the task's training data. A fall over tasks of equal difficulty is "
        "what loss of plasticity means. Mean in the task: over what the run itself logged during the task.",
        "Tasks of unequal difficulty move it without any loss of plasticity. At the end of a task it can be near its "
        "ceiling while learning has become slower: look at the online value too. A mean "
        "over a task moves with the number of epochs, too.",
    ),
    Section(
        "curvature",
        "Curvature: counts and summaries",
        (
            r"ggn/eps_rank_0\.01",
            r"\w+/eps_rank_.*",
            r"\w+/relative_eps_rank_.*",
            r"(ggn|hessian|ntk)/effective_rank",
            r"(ggn|hessian|ntk)/(?!num_samples).*",
            r"(ggn|hessian|ntk)/num_samples",
        ),
        "eps-rank: the number of eigenvalues with magnitude above eps, measured on the new task's data; few of them "
        "leave gradient descent few directions. Relative eps is a multiple of the largest eigenvalue. Effective "
        "rank: exp of the entropy of the magnitudes. A vertical bar without a marker is a count of which only an "
        "interval is known. Dotted grey: what no count can exceed, where all that is shown has the same.",
        "A fresh network has small outputs and only a handful of eigenvalues above 0.01, and learns well: compare "
        "with the second task, or use relative eps. An over-confident network has a vanishing GGN while its Hessian "
        "does not. Counts depend on the number of samples: for C classes the GGN has at most N (C - 1) nonzero "
        "eigenvalues, and a count at this cap says nothing: look at a larger eps. Absolute eps changes when weights "
        "are rescaled without changing the function. In our studies "
        "accuracy fell before the count above 0.01 did on two streams of three.",
    ),
    Section(
        "features",
        "Feature ranks",
        (
            r"features/effective_rank.*",
            r"features/srank.*",
            r"features/(stable|approximate|feature)_rank.*",
            r"features/max_rank.*",
        ),
        "Rank of each hidden layer's activations on the probe samples, by several definitions, and the mean over "
        "layers. Dotted grey: max_rank, the least of samples and features, which no rank can exceed. srank: the "
        "fewest singular values that hold 99 % of their sum.",
        "Two numbers at different caps say nothing about each other. A constant unit lowers the effective rank "
        "without the loss of a direction. Ranks may fall from the first task to the second without harm; on permuted "
        "MNIST they did in every run, of healthy ones too.",
    ),
    Section(
        "units",
        "Dead and dormant units",
        (r"features/dead_units.*", r"features/dormant_units.*"),
        "Dead: the share of units that are 0 on every probe sample; they pass no gradient on. Dormant: the share "
        "with a mean activation of at most tau times the layer's (the number in the name).",
        "A unit that is silent on a few hundred samples may live on more. Networks without ReLU have dormant units "
        "but no dead ones.",
    ),
    Section(
        "weights",
        "Weight norms",
        (r"weights/.*",),
        "2-norm of each layer's weight, and of all together. In long training without a regulariser they tend to grow.",
        "The norm does not predict the next task's accuracy: in our studies its sign depended on the stream and on "
        "the method. Behind a normalisation layer the scale of a weight does not change the function.",
    ),
    Section(
        "trainability",
        "Trainability, against a fresh network",
        (
            r"trainability/gap_to_fresh",
            r"trainability/best_loss",
            r"trainability/fresh_best_loss",
            r"trainability/steps_to_target",
            r"trainability/reached",
            r"trainability/.*",
        ),
        "A few steps of training on the new task, from the present weights and from fresh ones, undone afterwards. "
        "Gap to fresh: best loss minus that of the fresh network; above 0 the present weights learn worse than fresh "
        "ones. A triangle is a target that was not reached: more steps than that.",
        "Where fresh networks learn nothing in so few steps the comparison is empty: raise num_steps. A relative "
        "target flatters an over-confident network, whose loss starts high. Means of steps are over the runs that "
        "reached the target only; read them beside reached.",
    ),
    Section(
        "other",
        "Other measures",
        (r".*",),
        "What else the records hold.",
        "These have no description here; the docstring of the monitor that wrote them has one.",
    ),
)
SPECTRA = Section(
    "spectra",
    "Spectra over tasks",
    (),
    "How many eigenvalues (colour) of each magnitude (vertical, log scale, a quarter of a decade each) there are at "
    "each task. Dotted lines are the thresholds whose counts were recorded. A collapse is mass that sinks below "
    "them. Eigenvalues that are exactly zero, or cannot be told from zero in floating point, have no place on a log "
    "axis: the line under the figure and the table give their number.",
    "Colours are counts, not shares: compare runs at equal samples only. A fresh network's spectrum lies low because "
    "its outputs are small. Of an estimate (Lanczos) the bulk is spread over few points: stripes there are the "
    "method's, not the network's.",
)
LOGGED = Section(
    "logged",
    "What the run logged, over steps",
    (),
    "From metrics.csv or TensorBoard beside the records: series named for an accuracy, return, loss or error, or those "
    "asked for by --metric. Dotted lines are the first steps of tasks. Of long series each point is a mean of "
    "neighbours; of a Trainer that counted its steps from 0 again the steps are moved to the task's.",
    "Metrics on training batches include what the batch has just taught; validation data can be another distribution. "
    "Smoothing by on_epoch=True hides how fast a task is learnt.",
)
ALERTS = Section(
    "alerts",
    "Alerts",
    (),
    "The watched measure divided by its reference, as PlasticityAlert recorded it; a dotted line is the fraction "
    "beyond which it sounds, large markers are the tasks at which it did. The same tasks are marked by triangles on "
    "top of the other figures.",
    "An alert is a hint. On three streams the default (srank below 0.946 of its best) sounded in 88 % of the runs "
    "that fell and in 39 % of the healthy ones. A measure that starts high for a reason of its own sounds for ever.",
)


def sections_of(measures: Mapping[str, Sequence[Line]]) -> list[dict[str, Any]]:
    """The sections that have something to show, for JSON: each measure goes to the first that takes it."""
    left = sorted(measures, key=natural)
    found = []
    for section in SECTIONS:
        options = []
        for pattern in section.measures:
            taken = [key for key in left if re.fullmatch(pattern, key)]
            left = [key for key in left if key not in taken]
            options += [_option(key, measures) for key in taken]
        options = [option for option in options if option["lines"]]
        if options:
            found.append({"key": section.key, "options": options})
    return found


def _option(key: str, measures: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    lines = [line.to_plain() for line in measures[key]]
    lines = [line for line in lines if any(x is not None for part in ("value", "lower") for x in line.get(part, []))]
    option: dict[str, Any] = {"measure": key, "label": label(key), "lines": lines}
    numbers = [x for line in lines for x in line["value"] if isinstance(x, int | float)]
    wide = numbers and min(numbers) > 0 and max(numbers) > 20 * min(numbers)
    if wide and re.search(r"eps_rank|trace|lambda|loss", key):
        option["log"] = True
    cap = re.sub(r"^features/\w+", "features/max_rank", key)
    if re.match(r"features/\w*rank", key) and cap != key and cap in measures:
        option["cap"] = [line.to_plain() for line in measures[cap]]
    highest = max(
        (x for line in lines for x in (*line["value"], *line.get("upper", [])) if isinstance(x, int | float)), default=0
    )
    caps = [line.caps_to_plain() for line in measures[key]]
    sizes = [x for line in caps for x in line["value"] if x is not None]
    if sizes and min(sizes) <= CAP_IN_SIGHT * highest:
        option["common_cap"] = caps
    return option


def label(measure: str) -> str:
    """A measure in words: ``ggn/eps_rank_0.01`` is "GGN: eigenvalues > 0.01"."""
    head, _, rest = measure.partition("/")
    if head == "logged":
        return f"{rest}, mean in the task"
    if head in MATRICES:
        counted = re.fullmatch(r"(relative_)?eps_rank_(.+)", rest)
        if counted:
            return f"{MATRICES[head]}: eigenvalues > {counted[2]}{' of the largest' if counted[1] else ''}"
        return f"{MATRICES[head]}: {rest.replace('_', ' ')}"
    if head == "features":
        quantity, _, layer = rest.partition("/")
        tau = re.fullmatch(r"dormant_units_(.+)", quantity)
        words = f"dormant units, tau {tau[1]}" if tau else quantity.replace("_", " ")
        return f"{words}: {layer or 'mean over layers'}"
    if head == "weights":
        quantity, _, layer = rest.partition("/")
        return f"{quantity}: {layer or 'all weights'}"
    return (rest if head == "trainability" else measure).replace("_", " ")
