"""How many entries of each layer are active, so that all together are a given share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

Distribution = Literal["uniform", "erk"]
DISTRIBUTIONS = ("uniform", "erk")


def active_counts(
    shapes: Mapping[str, Sequence[int]], density: float, distribution: Distribution = "erk"
) -> dict[str, int]:
    """Number of active entries by layer; together exactly ``round(density * total)``.

    ``"uniform"``: the same density everywhere. ``"erk"`` (Erdos-Renyi-Kernel; Mocanu et al. 2018, arXiv 1707.04780;
    Evci et al. 2020, arXiv 1911.11134, section 3): density of a layer proportional to the sum of its weight's
    dimensions over their product, (n_in + n_out + kh + kw) / (n_in n_out kh kw); layers that would exceed 1 are dense,
    and the scale of the others is solved for again. Fractions of entries are rounded down, and those still missing
    go to the layers that lost the largest fractions, the first ones at ties.

    Args:
        shapes: of the weights, by layer.
        density: share of all entries that is active, in (0, 1].
        distribution: ``"uniform"`` or ``"erk"``.

    Raises:
        ValueError: for a density or distribution out of range, or so low a density that a layer is left with nothing.

    Example:
        >>> from lightning_plasticity.sparsity import active_counts
        >>> active_counts({"wide": (100, 100), "narrow": (10, 100)}, 0.1)
        {'wide': 710, 'narrow': 390}
    """
    check_density(density, distribution)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = round(density * sum(sizes.values()))
    if distribution == "uniform":
        raw = {name: Fraction(1) for name in sizes}
    else:
        raw = {name: Fraction(sum(shape), sizes[name]) for name, shape in shapes.items()}
    wanted = _scaled(sizes, raw, budget)
    counts = {name: math.floor(share) for name, share in wanted.items()}
    missing = budget - sum(counts.values())
    for name in sorted(counts, key=lambda name: counts[name] - wanted[name])[:missing]:
        counts[name] += 1
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(
            f"density={density!r} leaves no active weight in {', '.join(empty)}; expected at least one in each layer. "
            "What to do: raise density, or leave small layers dense with layers=[...] naming the others."
        )
    return counts


def check_density(density: float, distribution: str) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: naming what was received and what is expected.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density={density!r}, expected a number in (0, 1]: the share of weights that stay.")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}, expected one of {DISTRIBUTIONS}.")


def _scaled(sizes: Mapping[str, int], raw: Mapping[str, Fraction], budget: int) -> dict[str, Fraction]:
    """``size * min(1, scale * raw)`` for the scale that makes the sum the budget; exact."""
    dense: set[str] = set()
    while True:
        rest = budget - sum(sizes[name] for name in dense)
        weight = sum((sizes[name] * raw[name] for name in sizes if name not in dense), Fraction(0))
        scale = rest / weight if weight else Fraction(0)
        # Capping a layer only raises the scale of the others, so whoever is above 1 now stays there.
        over = {name for name in sizes if name not in dense and scale * raw[name] > 1}
        if not over:
            return {name: Fraction(sizes[name]) * (1 if name in dense else scale * raw[name]) for name in sizes}
        dense |= over
