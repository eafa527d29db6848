"""Shrink and perturb: pull all weights towards zero and add noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Generator, nn


@torch.no_grad()
def shrink_and_perturb(
    parameters: Iterable[nn.Parameter], shrink: float, noise: float, generator: Generator | None = None
) -> None:
    """``theta <- shrink * theta + p`` with p ~ N(0, noise^2).

    Source: Ash and Adams 2020 (arXiv 1910.08475, section 4), who write lambda for ``shrink`` and sigma for ``noise``.

    Args:
        parameters: which; those that are frozen or not floating-point are left out.
        shrink: factor.
        noise: standard deviation.
        generator: on the CPU; the same seed gives the same noise on every device and process.
    """
    for parameter in parameters:
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        parameter.mul_(shrink)
        if noise > 0:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            draw = torch.randn(parameter.shape, dtype=dtype, generator=generator)
            parameter.add_(draw.to(parameter), alpha=noise)


def chosen_parameters(module: nn.Module, patterns: Sequence[str] | None) -> list[nn.Parameter]:
    """Parameters by name or wildcard (``"net.*.weight"``), None for all.

    Raises:
        ValueError: for a pattern that matches none; the message lists the names that exist.
    """
    named = dict(module.named_parameters())
    if patterns is None:
        return list(named.values())
    chosen: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        found = {name: parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"parameters: {pattern!r} matches none of: {', '.join(named) or 'none'}.")
        chosen |= found
    return list(chosen.values())
