"""Error at an equal number of Hessian-vector products, the time to a given error, and whether our intervals hold.

Run: python -m benchmarks.peers.accuracy            (writes benchmarks/results/accuracy.md)
     python -m benchmarks.peers.accuracy --quick    (smaller networks, few repetitions; printed and not kept)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.peers.digits_nets import NETWORKS, SAMPLES
from benchmarks.peers.estimates import INTERVALS, QUANTITIES, study
from benchmarks.peers.report import NAMES, machine
from benchmarks.peers.run import RESULTS, start
from benchmarks.peers.run_times import SETUP_STEPS
from benchmarks.peers.targets import Line, save, spread, summary

PEERS = ("pyhessian", "curvlinops", "eigenthings")
TARGET = 0.1  # error that is to be reached, and the least of them to be reached in a fifth of the time
TIMED = ("rho 0.1", "rho 0.01", "effective rank")
FASTER, HALF, COVERAGE = 5.0, 0.5, 0.93
MAX_WITHHELD = 0.05  # a setting that withholds the value more often does not count as reaching an error
Study = dict[str, Any]  # of one network, see ``estimates.study``


@dataclass(frozen=True)
class Plan:
    width: int
    seeds: int
    steps: tuple[int, ...]
    probes: tuple[int, ...]
    table: tuple[int, ...]  # products at which errors are compared
    names: tuple[str, ...]
    rounds: int
    min_seconds: float


FULL = Plan(
    width=32,
    seeds=200,
    steps=(12, 20, 24, 30, 60, 100, 120, 150, 200, 300),
    probes=(1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 80, 120),
    table=(60, 120, 300),
    names=tuple(NETWORKS),
    rounds=2,
    min_seconds=0.2,
)
QUICK = Plan(8, 6, (12, 24, 60), (1, 2, 5), (24, 60), ("fresh", "60 % dead"), 1, 0.0)


# Error at an equal number of products.


def _products(key: str) -> int:
    probes, steps = _split(key)
    return probes * steps


def _split(key: str) -> tuple[int, int]:
    probes, steps = key.split(" x ")
    return int(probes), int(steps)


def best_split(studies: Sequence[Study], rule: str, products: int, index: int) -> tuple[list[float], str]:
    """Errors on the networks with the split whose median is least."""
    keys = [key for key in studies[0][rule] if _products(key) == products]
    by_key = {key: [found[rule][key][index] for found in studies] for key in keys}
    best = min(by_key, key=lambda key: statistics.median(by_key[key]))
    return by_key[best], best


def error_lines(studies: Sequence[Study], table: Sequence[int]) -> list[Line]:
    lines = []
    for index, quantity in enumerate(QUANTITIES):
        shares = []
        for products in table:
            plain = statistics.median(best_split(studies, "plain", products, index)[0])
            shares.append(statistics.median(best_split(studies, "ours", products, index)[0]) / plain)
        what = f"error over the best plain quadrature's at {', '.join(map(str, table))} products, {quantity}"
        measured = ", ".join(f"{share:.2f}" for share in shares)
        lines.append(Line(what, f"<= {HALF:g}", measured, all(share <= HALF for share in shares)))
    return lines


def error_table(studies: Sequence[Study], table: Sequence[int]) -> str:
    lines = ["| products | rule | " + " | ".join(QUANTITIES) + " |", "|---" * (2 + len(QUANTITIES)) + "|"]
    for products in table:
        for rule in ("plain", "ours"):
            cells = []
            for index in range(len(QUANTITIES)):
                errors, split = best_split(studies, rule, products, index)
                cells.append(f"{percent(errors)}" + (f", {split}" if rule == "plain" else ""))
            lines.append(f"| {products} | {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(values: Sequence[float]) -> str:
    """Median over networks (worst)."""
    return f"{100 * statistics.median(values):.1f} ({100 * max(values):.0f})"


# Error in an equal time.


def equal_time_lines(studies: Sequence[Study], rounds: Sequence[dict[str, Any]], table: Sequence[int]) -> list[Line]:
    """In the time that the quickest of the others takes for so many products: its best setting, our longest run."""
    times = rounds[-1] if rounds else {}
    peers = [peer for peer in PEERS if peer in times]
    if not peers or "ours" not in times:
        return []
    lines = []
    for index, quantity in enumerate(QUANTITIES):
        shares = []
        for products in table:
            found = {peer: _least_error(studies, times[peer], index, products) for peer in peers}
            best = min(found, key=lambda peer: found[peer][0])
            error, seconds = found[best]
            shares.append(_our_error(studies, times["ours"], index, seconds) / error)
        what = f"error over the best other library's in its time for {', '.join(map(str, table))} products, {quantity}"
        measured = ", ".join(f"{share:.2f}" for share in shares)
        lines.append(Line(what, f"<= {HALF:g}", measured, all(share <= HALF for share in shares)))
    return lines


def _least_error(studies: Sequence[Study], times: dict[str, Any], index: int, products: int) -> tuple[float, float]:
    """Median error and median seconds of the split into probes and steps that errs least in the median."""
    costs = [peer_costs(study, times, index) for study in studies]
    keys = [key for key in costs[0] if _products(key) == products]
    both = [tuple(statistics.median(cost[key][i] for cost in costs) for i in (0, 1)) for key in keys]
    error, seconds = min(both)
    return error, seconds


def _our_error(studies: Sequence[Study], times: dict[str, Any], index: int, seconds: float) -> float:
    """Median error of the longest run that takes no longer in the median; of the shortest where all do."""
    costs = [our_costs(study, times, index, withhold=False) for study in studies]
    runs = [key for key in costs[0] if key != "exact"]
    spent = {key: statistics.median(cost[key][1] for cost in costs) for key in runs}
    within = [key for key in runs if spent[key] <= seconds] or [min(runs, key=_products)]
    longest = max(within, key=_products)
    return statistics.median(cost[longest][0] for cost in costs)


# Time to an error.


def peer_costs(found: Study, times: dict[str, Any], index: int) -> dict[str, tuple[float, float]]:
    """(error, seconds) of every setting; probes share the set-up."""
    run = times[found["name"]]["run"]
    costs = {}
    for key, errors in found["plain"].items():
        probes, steps = _split(key)
        costs[key] = errors[index], probes * run[str(steps)] - (probes - 1) * run[str(SETUP_STEPS)]
    return costs


def our_costs(found: Study, times: dict[str, Any], index: int, withhold: bool = True) -> dict[str, tuple[float, float]]:
    """The same with reading the estimate, no error reached where it is withheld; the exact spectrum is one of them."""
    about = times[found["name"]]
    costs = {"exact": (0.0, about["exact"]["seconds"])}
    rank = QUANTITIES[index] == "effective rank"
    for key, errors in found["ours"].items():
        steps = key.split(" x ")[1]
        missing = withhold and not rank and found["withheld"][key][index] > MAX_WITHHELD
        costs[key] = math.inf if missing else errors[index], about["run"][steps] + about["reading"][steps][rank]
    return costs


def cheapest(costs: dict[str, tuple[float, float]]) -> tuple[float, str]:
    """Seconds of the cheapest setting that reaches the error, and the setting."""
    reached = [(seconds, key) for key, (error, seconds) in costs.items() if error <= TARGET]
    return min(reached, default=(math.inf, "not reached"))


def on_all(costs: Sequence[dict[str, tuple[float, float]]]) -> tuple[float, str]:
    """The same with one setting for all networks, that reaches the error in the median; median seconds."""
    medians = {key: tuple(statistics.median(cost[key][i] for cost in costs) for i in (0, 1)) for key in costs[0]}
    return cheapest(medians)


def on_each(costs: Sequence[dict[str, tuple[float, float]]]) -> tuple[float, str]:
    """The same with the best setting for each network, as only one who knows the truth could choose; median seconds."""
    return statistics.median(cheapest(cost)[0] for cost in costs), "best of each"


WAYS = {"one setting": on_all, "best setting of each network": on_each}


def time_lines(studies: Sequence[Study], rounds: Sequence[dict[str, Any]]) -> list[Line]:
    lines = []
    for quantity in TIMED:
        index = QUANTITIES.index(quantity)
        for way, choose in WAYS.items():
            found, best = [], "none"
            for times in rounds:
                own = choose([our_costs(study, times["ours"], index) for study in studies])[0]
                others = {
                    peer: choose([peer_costs(study, times[peer], index) for study in studies])[0]
                    for peer in PEERS
                    if peer in times
                }
                if others:
                    best = min(others, key=lambda peer: others[peer])
                    found.append(others[best] / own)
            if found:
                measured = f"{spread(found)}x ({best})" if math.isfinite(max(found)) else "they never reach it"
                what = f"time to an error of {TARGET:.0%}, {quantity}, {way}"
                lines.append(Line(what, f">= {FASTER:g}x", measured, statistics.median(found) >= FASTER))
    return lines


def time_table(studies: Sequence[Study], times: dict[str, Any]) -> str:
    head = ["quantity", "library", "one setting for all", *(study["name"] for study in studies)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for quantity in TIMED:
        index = QUANTITIES.index(quantity)
        for peer in [peer for peer in (*PEERS, "ours") if peer in times]:
            of = our_costs if peer == "ours" else peer_costs
            costs = [of(study, times[peer], index) for study in studies]
            found = [on_all(costs), *(cheapest(cost) for cost in costs)]
            cells = [key if math.isinf(seconds) else f"{seconds:.2g} s, {key}" for seconds, key in found]
            lines.append(f"| {quantity} | {NAMES[peer]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def auto_note(times: dict[str, Any]) -> str:
    found = times.get("ours", {})
    cells = [
        f"{name}: {'exact' if about['auto']['exact'] else 'Lanczos'}, {about['auto']['seconds']:.2g} s"
        for name, about in found.items()
    ]
    return 'With its default `method="auto"` the library itself chooses, at these sizes: ' + "; ".join(cells) + "."


def measure_times(plan: Plan) -> list[dict[str, Any]]:
    """A list of rounds; the libraries take turns, each in a fresh process."""
    arguments = {"names": plan.names, "width": plan.width, "steps": plan.steps, "min_seconds": plan.min_seconds}
    rounds = []
    for _ in range(plan.rounds):
        times = {}
        for peer in ("ours", *PEERS):
            (found,) = start([{"task": "run-times", "arguments": {"peer": peer} | arguments}], timeout=600)
            if "failed" in found:
                print(f"{peer} is not timed: {found['failed']}", flush=True)
            else:
                times[peer] = found
        rounds.append(times)
    return rounds


# Intervals.


def interval_lines(studies: Sequence[Study]) -> list[Line]:
    cells = [share for found in studies for shares in found["held"].values() for share in shares]
    wanted = f">= {COVERAGE:.0%}"
    pooled, lowest = statistics.mean(cells), min(cells)
    return [
        Line("95 % intervals that hold the truth, all", wanted, f"{pooled:.1%}", pooled >= COVERAGE),
        Line("95 % intervals that hold the truth, lowest cell", wanted, f"{lowest:.1%}", lowest >= COVERAGE),
    ]


def interval_table(studies: Sequence[Study]) -> str:
    lines = ["| network | steps | " + " | ".join(INTERVALS) + " |", "|---" * (2 + len(INTERVALS)) + "|"]
    for found in studies:
        for steps, shares in found["held"].items():
            missing = found["withheld"][f"1 x {steps}"]
            cells = [f"{100 * share:.1f}" for share in shares]
            cells = [f"{c} ({100 * w:.0f})" if w else c for c, w in zip(cells, [*missing, 0.0, 0.0, 0.0], strict=True)]
            lines.append(f"| {found['name']} | {steps} | " + " | ".join(cells) + " |")
    columns = zip(*(shares for found in studies for shares in found["held"].values()), strict=True)
    cells = [f"{100 * statistics.mean(column):.1f}, lowest {100 * min(column):.1f}" for column in columns]
    return "\n".join([*lines, "| all | | " + " | ".join(cells) + " |"])


# All of it.


def measure(plan: Plan, workers: int) -> dict[str, Any]:
    """Times last and alone; nothing else depends on how busy the machine is."""
    look = partial(study, width=plan.width, seeds=plan.seeds, steps=plan.steps, probes=plan.probes, table=plan.table)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        studies = list(pool.map(look, plan.names))
    return {"studies": studies, "rounds": measure_times(plan), "machine": machine()}


def all_lines(found: dict[str, Any], plan: Plan) -> list[Line]:
    studies = found["studies"]
    equal = equal_time_lines(studies, found["rounds"], plan.table)
    return [*error_lines(studies, plan.table), *equal, *time_lines(studies, found["rounds"]), *interval_lines(studies)]


def report(found: dict[str, Any], plan: Plan) -> str:
    studies, times = found["studies"], found["rounds"][-1]
    nets = [
        f"| {s['name']} | {s['params']} | {s['live']} | " + " | ".join(f"{value:.4g}" for value in s["true"]) + " |"
        for s in studies
    ]
    clock = [
        f"- {NAMES[peer]}: " + ", ".join(f"m={m} {seconds:.2g} s" for m, seconds in of[plan.names[-1]]["run"].items())
        for peer, of in times.items()
    ]
    parts = [
        "# Accuracy of what a Lanczos run says",
        "Written by `python -m benchmarks.peers.accuracy`; raw numbers in `accuracy.json`.",
        f"{found['machine']}.",
        summary(all_lines(found, plan)),
        f"Digits MLP 64-{plan.width}-{plan.width}-10, N={SAMPLES}, cross-entropy. *rho x* is the number of eigenvalues "
        "above x times the largest in absolute value. *plain* is quadrature as the other libraries run it and *ours* "
        "what this one makes of the same products; the first lines of `estimates.py` say what is compared. None of the "
        "others computes a count or an effective rank; its user would have to, from nodes and weights.",
        "\n".join(
            ["| network | P | live | " + " | ".join(INTERVALS) + " |", "|---" * (3 + len(INTERVALS)) + "|", *nets]
        ),
        f"## Error in percent\n\nRoot mean square over {plan.seeds} repetitions (400 draws of averages over probes) "
        "over the true value; median over the networks (worst). Plain with the best split into probes x steps for each "
        "quantity. Ours before a value is withheld.",
        error_table(studies, plan.table),
        f"## CPU time to an error of {TARGET:.0%}\n\nThe cheapest of the settings measured, probes x steps, with each "
        "library's own seconds in float32 on the same network (last of the rounds), its set-up counted once. Ours "
        "includes reading the estimate with its interval, and counts only where the value is given in 95 % of the "
        "runs; the exact spectrum is one of our settings. A short run can be right by accident, and who does not know "
        "the truth cannot choose by network: *one setting* is that whose median error over the networks is within "
        f"{TARGET:.0%}.",
        time_table(studies, times),
        auto_note(times),
        "Seconds of a run on the last network:\n\n" + "\n".join(clock),
        "## Our intervals\n\nPercent of nominal 95 % intervals that hold the truth (in brackets: percent of values "
        f"withheld because the interval is all that is known), {plan.seeds} probes each.",
        interval_table(studies),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--times-only", action="store_true", help="keep errors and intervals, which no clock changes")
    parser.add_argument("--workers", type=int, default=2, help="networks looked at at once (not while times are taken)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        print(report(measure(QUICK, options.workers), QUICK))
        return
    raw = options.output / "accuracy.json"
    if options.times_only:
        found = json.loads(raw.read_text()) | {"rounds": measure_times(FULL), "machine": machine()}
    else:
        found = measure(FULL, options.workers)
    options.output.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps(found) + "\n")
    save(all_lines(found, FULL), options.output, "accuracy")
    (options.output / "accuracy.md").write_text(report(found, FULL))


if __name__ == "__main__":
    main()
