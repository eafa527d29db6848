"""Comparison of methods and bands of figures, against scipy, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lightning_plasticity.report.series import band
from lightning_plasticity.study.compare import compare, comparison_text, detectable, outcomes, sign_flip
from lightning_plasticity.study.plots import figure_of, overview, plottable


def values(shift: float, n: int, seed: int) -> dict[str, dict[int, float]]:
    """Runs of one seed share their luck, so that pairing matters."""
    random = np.random.default_rng(seed)
    luck = random.normal(0, 5, n)
    return {
        "plain": dict(enumerate(luck + random.normal(0, 1, n))),
        "better": dict(enumerate(luck + random.normal(shift, 1, n))),
        "same": dict(enumerate(luck + random.normal(0, 1, n))),
    }


def test_paired_t_and_interval_are_scipys() -> None:
    found = {d.method: d for d in compare("x", values(2.0, 7, 0), "plain")}
    table = values(2.0, 7, 0)
    for method in ("better", "same"):
        reference = stats.ttest_rel(list(table[method].values()), list(table["plain"].values()))
        assert found[method].p == pytest.approx(reference.pvalue)
        interval = reference.confidence_interval(0.95)
        assert (found[method].lower, found[method].upper) == pytest.approx((interval.low, interval.high))
        assert found[method].n == 7


def test_holm_by_hand() -> None:
    table = values(2.0, 7, 1) | {"third": values(0.5, 7, 2)["better"]}
    found = compare("x", table, "plain")
    p = sorted(d.p for d in found)
    expected = [min(1, 3 * p[0]), 0.0, 0.0]
    expected[1] = max(expected[0], min(1, 2 * p[1]))
    expected[2] = max(expected[1], p[2])
    assert sorted(d.p_holm for d in found) == pytest.approx(expected)


def test_sign_flip_is_the_share_of_all_signs() -> None:
    differences = np.random.default_rng(3).normal(0.5, 1, 6)
    means = [abs(np.mean(differences * signs)) for signs in itertools.product((-1, 1), repeat=6)]
    share = np.mean(np.array(means) >= abs(differences.mean()) * (1 - 1e-12))
    assert sign_flip(differences) == pytest.approx(share)
    # The least that n seeds can give.
    for n in (2, 3, 5):
        assert sign_flip(np.arange(1.0, n + 1)) == pytest.approx(2 / 2**n)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_detectable_difference_is_found_in_four_of_five(n: int) -> None:
    shift = detectable(2.0, n)
    samples = np.random.default_rng(n).normal(shift, 2.0, (20_000, n))
    found = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 20_000))


def test_pairs_need_a_seed_that_both_have() -> None:
    table = {
        "plain": {0: 1.0, 1: 2.0, 2: 3.0},
        "a": {1: 2.5, 2: 3.0, 9: 7.0},
        "b": {2: 1.0},
        "c": {0: math.nan, 1: 1.0},
    }
    (found,) = compare("x", table, "plain")
    assert (found.method, found.n, found.mean) == ("a", 2, 0.25)


def test_differences_without_spread() -> None:
    same, shifted = compare("x", {"p": {0: 1.0, 1: 2.0}, "same": {0: 1.0, 1: 2.0}, "up": {0: 2.0, 1: 3.0}}, "p")
    assert (same.mean, same.p) == (0.0, 1.0)
    assert (shifted.mean, shifted.lower, shifted.upper, shifted.p) == (1.0, 1.0, 1.0, 0.0)


def rows(n: int = 5, tasks: int = 4) -> list[dict]:
    random = np.random.default_rng(0)
    return [
        {
            "method": method,
            "seed": seed,
            "task": task,
            "online_acc": base + 0.01 * task + 0.02 * random.normal(),
            "end_acc": base,
            "ggn/eps_rank_0.01": float(random.integers(1, 900)),
            "features/effective_rank": 3.0,
            "features/effective_rank/net.1": 3.0,
            **({"sometimes": 1.0} if task == 0 else {}),
        }
        for method, base in (("plain", 0.3), ("l2er", 0.8))
        for seed in range(n)
        for task in range(tasks)
    ]


def test_the_text_says_what_differs_and_what_cannot_be_told() -> None:
    text = comparison_text(rows(), "acc", "plain")
    line = next(line for line in text.splitlines() if "l2er" in line)
    assert "higher" in line
    assert "signs 0.062" in line
    assert "With 5 seeds the sign-flip test cannot reach 0.05" in text
    assert "cannot reach" not in comparison_text(rows(6), "acc", "plain")
    assert "lower" in comparison_text(rows(), "acc", "l2er")
    assert "Nothing to compare" in comparison_text(rows(1), "acc", "plain")
    means = outcomes(rows(), "acc")["online acc, mean over tasks"]["plain"]
    assert means[2] == pytest.approx(np.mean([r["online_acc"] for r in rows()[8:12]]))


def test_bands_are_t_intervals_of_what_is_there() -> None:
    random = np.random.default_rng(1)
    table = random.normal(size=(4, 3))
    runs = dict(enumerate(table.tolist()))
    runs[3] = [*runs[3][:2]]  # the last task is not there yet
    runs[2][0] = math.nan
    mean, lower, upper = band(runs)
    for task, sample in enumerate(([*table[[0, 1, 3], 0]], [*table[:, 1]], [*table[:3, 2]])):
        interval = stats.t.interval(0.95, len(sample) - 1, loc=np.mean(sample), scale=stats.sem(sample))
        assert (mean[task], lower[task], upper[task]) == pytest.approx((np.mean(sample), *interval))
    mean, lower, _ = band({0: [1.0, 2.0]})
    assert mean.tolist() == [1.0, 2.0]
    assert np.isnan(lower).all()


def test_figures_show_each_method() -> None:
    assert plottable(rows()) == ["online_acc", "end_acc", "ggn/eps_rank_0.01", "features/effective_rank", "sometimes"]
    figure = figure_of(rows(), "ggn/eps_rank_0.01")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["plain", "l2er"]
    assert axes.get_yscale() == "log"
    assert figure_of(rows(), "sometimes").axes[0].lines[0].get_xdata().tolist() == [1]
    assert not figure_of(rows(), "nowhere").axes[0].lines
    assert len([axes for axes in overview(rows(), "acc").axes if axes.lines]) == 4
