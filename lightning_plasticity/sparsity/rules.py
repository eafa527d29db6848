"""Which entries of a weight a sparse method drops and grows; indices count entries of the flattened weight."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor

Method = Literal["static", "set", "rigl"]
METHODS = ("static", "set", "rigl")


def fraction_at(step: int, drop_fraction: float, end_step: int | None, method: Method) -> float:
    """Share of the active entries that an update after this many steps exchanges; 0 from ``end_step`` on.

    RigL's falls on a half cosine, alpha / 2 (1 + cos(pi t / T_end)) (Evci et al. 2020, arXiv 1911.11134, section 3);
    SET's is constant, and so is RigL's without an end.
    """
    if end_step is None:
        return drop_fraction
    if step >= end_step:
        return 0.0
    return drop_fraction * (1 + math.cos(math.pi * step / end_step)) / 2 if method == "rigl" else drop_fraction


def exchanged(
    weight: Tensor, mask: Tensor, fraction: float, gradient: Tensor | None, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Entries to drop and entries to grow: as many of the one as of the other, and none of both.

    With a gradient RigL (Evci et al. 2020, arXiv 1911.11134, algorithm 1): drop the smallest ``|w|``, grow the
    largest ``|g|``. Without one SET (Mocanu et al. 2018, arXiv 1707.04780, algorithm 2): drop the smallest positive and
    the largest negative weights, the share of each sign, zero taken as positive; grow at random. Of equal entries the
    first are taken. Only entries that were masked before can grow, so where those are few, fewer are dropped.

    Nothing is exchanged where an active weight or the gradient is not finite, or the gradient of all masked entries is
    zero: then nothing tells which.

    Args:
        weight: of any shape.
        mask: bool, True where active.
        fraction: of the active entries, in [0, 1]; rounded down.
        gradient: of the loss for all entries of the masked weight, also for masked ones; None for SET.
        generator: on the CPU, for SET.

    Returns:
        (K,) dropped and (K,) grown.
    """
    flat, active = weight.detach().flatten(), mask.flatten().nonzero().flatten()
    masked = (~mask).flatten().nonzero().flatten()
    values, nothing = flat[active], active[:0]
    if not bool(torch.isfinite(values).all()):
        return nothing, nothing
    order = values.abs().argsort(stable=True)
    if gradient is None:
        negative = (values < 0)[order]
        few = torch.cat([_first(~negative, fraction), _first(negative, fraction)]).sort().values
        count = min(len(few), len(masked))
        places = torch.randperm(len(masked), generator=generator)[:count].to(masked.device)
        return active[order[few[:count]]], masked[places]
    size = gradient.flatten()[masked].abs()
    if not bool(torch.isfinite(gradient).all()) or not bool(size.any()):
        return nothing, nothing
    count = min(_share(len(active), fraction), len(masked))
    return active[order[:count]], masked[size.argsort(descending=True, stable=True)[:count]]


def _first(chosen: Tensor, fraction: float) -> Tensor:
    """Positions of the first so many that are True."""
    places = chosen.nonzero().flatten()
    return places[: _share(len(places), fraction)]


def _share(count: int, fraction: float) -> int:
    return math.floor(count * fraction + 1e-9)  # 0.29 * 100 is 28.999...
