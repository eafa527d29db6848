"""Which methods differ from a reference, paired over the seeds that both have: a seed gives both the same stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_plasticity.study.table import TableRow, per_run

LEVEL = 0.05
POWER = 0.8
EXACT_UP_TO = 14  # seeds, of which all signs are tried


@dataclass(frozen=True)
class Difference:
    """A method against the reference on one outcome.

    Attributes:
        outcome: what is compared.
        method: the method.
        reference: what it is compared with.
        n: seeds that both have.
        mean: of the differences, method minus reference.
        lower: lower end of the 95 % interval of Student's t over seeds.
        upper: upper end of it.
        p: of the paired t test, two-sided.
        p_holm: the same after Holm's correction over the methods.
        p_signs: of the exact sign-flip permutation test, two-sided; it cannot be less than 2 / 2^n.
        detectable: the difference that n seeds of this spread find in 80 % of studies, at level 0.05 uncorrected.
    """

    outcome: str
    method: str
    reference: str
    n: int
    mean: float
    lower: float
    upper: float
    p: float
    p_holm: float
    p_signs: float
    detectable: float


def outcomes(rows: Sequence[TableRow], metric: str) -> dict[str, dict[str, dict[int, float]]]:
    """The numbers that methods are judged by, by outcome, method and seed."""
    online, end = per_run(rows, f"online_{metric}"), per_run(rows, f"end_{metric}")

    def of(table: dict[str, dict[int, list[float]]], task: int | None) -> dict[str, dict[int, float]]:
        return {
            method: {seed: float(np.mean(series)) if task is None else series[task] for seed, series in runs.items()}
            for method, runs in table.items()
        }

    return {
        f"online {metric}, mean over tasks": of(online, None),
        f"online {metric}, last task": of(online, -1),
        f"end {metric}, last task": of(end, -1),
    }


def compare(outcome: str, values: dict[str, dict[int, float]], reference: str) -> list[Difference]:
    """Every other method against the reference, on the seeds where both are known; at least two are needed.

    Args:
        outcome: name of what is compared.
        values: by method and seed.
        reference: name of the method to compare with.
    """
    found = []
    base = {seed: value for seed, value in values.get(reference, {}).items() if math.isfinite(value)}
    for method, runs in values.items():
        seeds = [seed for seed in sorted(base) if math.isfinite(runs.get(seed, math.nan))]
        if method == reference or len(seeds) < 2:
            continue
        differences = np.array([runs[seed] - base[seed] for seed in seeds])
        found.append((method, differences, *_paired(differences)))
    holm = _holm([p for _, _, _, _, p in found])
    return [
        Difference(
            outcome,
            method,
            reference,
            len(differences),
            float(differences.mean()),
            lower,
            upper,
            p,
            corrected,
            sign_flip(differences),
            detectable(float(differences.std(ddof=1)), len(differences)),
        )
        for (method, differences, lower, upper, p), corrected in zip(found, holm, strict=True)
    ]


def _paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Ends of the 95 % interval and p; without any spread t is infinite or undefined."""
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean) or error == 0.0:
        return mean, mean, 0.0 if mean else 1.0
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1))


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the sign-flip test of the mean: all 2^n signs up to 14 differences, else 10,000 random ones."""
    exact = len(differences) <= EXACT_UP_TO
    result = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else 9999,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def detectable(deviation: float, n: int) -> float:
    """The mean of n paired differences of that deviation which a t test at 0.05 finds with a chance of 80 %."""
    critical = stats.t.ppf(1 - LEVEL / 2, n - 1)

    def power(shift: float) -> float:
        return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))

    low, high = 0.0, 1.0
    while power(high) < POWER and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high * deviation / math.sqrt(n)


def _holm(p: Sequence[float]) -> list[float]:
    """Holm 1979: the smallest times m, the next times m - 1, ..., never falling."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, k in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[k]))
        corrected[k] = largest
    return corrected


def comparison_text(rows: Sequence[TableRow], metric: str, reference: str) -> str:
    """What differs from the reference, with its uncertainty, and what so many seeds can tell at all."""
    lines: list[str] = []
    for outcome, values in outcomes(rows, metric).items():
        found = compare(outcome, values, reference)
        if found:
            lines += ["", f"{outcome}, against {reference} ({_mean(values[reference].values())})", *map(_line, found)]
    if not lines:
        return f"Nothing to compare: it takes another method than {reference}, and two seeds that both have.\n"
    counts = {
        len({row["seed"] for row in rows if row["method"] == method}) for method in {row["method"] for row in rows}
    }
    n = min(counts)
    head = (
        f"Differences are paired by seed: mean, 95 % interval (Student's t), p of the paired t test after Holm's\n"
        f"correction over methods, p of the exact sign-flip test (at {n} seeds never below {2 / 2**n:.2g}), and the\n"
        "difference that these seeds would find in 80 % of such studies (before the correction)."
    )
    if 2 / 2**n > LEVEL:
        head += (
            f"\nWith {n} seeds the sign-flip test cannot reach 0.05, whatever the difference: the verdicts rest on\n"
            "the t test, which takes the differences to be about normal. Six seeds or more do without."
        )
    return "\n".join([head, *lines]) + "\n"


def _line(d: Difference) -> str:
    verdict = ("higher" if d.mean > 0 else "lower") if d.p_holm < LEVEL else "no difference shown"
    return (
        f"  {d.method:<20} {verdict:<20} {d.mean:+.3f} [{d.lower:+.3f}, {d.upper:+.3f}]  n {d.n}  "
        f"p {d.p_holm:.2g}  signs {d.p_signs:.2g}  finds {d.detectable:.3f}"
    )


def _mean(values: Iterable[float]) -> str:
    return f"mean {np.mean(list(values)):.3f}"
