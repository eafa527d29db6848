"""Effective rank of features: the penalty and its gradient, and the streamed metric, next to plain svdvals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.targets import Line
from benchmarks.peers.timing import interleaved
from lightning_plasticity.linalg import effective_rank
from lightning_plasticity.metrics import EffectiveRank

BATCH = 250
GRAM_LIMIT = 256  # up to here the penalty is to go through a float64 Gram matrix, whose gradient is far more accurate


def from_sigma(sigma: Tensor) -> Tensor:
    p = sigma / sigma.sum()
    return torch.exp(-torch.xlogy(p, p).sum())


def _through_qr(features: Tensor) -> Tensor:
    tall = features if features.shape[0] >= features.shape[1] else features.T
    return from_sigma(torch.linalg.svdvals(torch.linalg.qr(tall).R))


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "lightning_plasticity": effective_rank,
    "svdvals(F) and autograd": lambda features: from_sigma(torch.linalg.svdvals(features)),
    "svdvals(F^T) and autograd": lambda features: from_sigma(torch.linalg.svdvals(features.T)),
    "qr, svdvals(R) and autograd": _through_qr,
}


def penalty(subject: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """Each variant's seconds, and its value and gradient against svdvals in float64."""
    features = _features(subject)

    def gradient(function: Callable[[Tensor], Tensor], matrix: Tensor) -> tuple[Tensor, Tensor]:
        leaf = matrix.clone().requires_grad_()
        value = function(leaf)
        (found,) = torch.autograd.grad(value, leaf)
        return value.detach(), found

    _, direction = gradient(PENALTIES["svdvals(F) and autograd"], features.double())
    rows, errors, finite = {}, {}, {}
    for name, function in PENALTIES.items():
        value, found = gradient(function, features)
        errors[name] = float((found.double() - direction).norm() / direction.norm())
        zero = bool(gradient(function, torch.zeros_like(features))[1].isfinite().all())
        note = f"gradient off by {errors[name]:.0e}{'' if zero else ', not finite at zero features'}"
        rows[name] = {"check": {"effective rank": float(value)}, "note": note}
        finite[name] = zero
    variants = {name: lambda f=function: gradient(f, features) for name, function in PENALTIES.items()}
    for name, seconds in interleaved(variants, rounds, min_seconds).items():
        rows[name]["seconds"] = seconds
    own = errors.pop("lightning_plasticity")
    gain, small = min(errors.values()) / own, min(features.shape) <= GRAM_LIMIT
    lines = [
        Line(
            f"error of the best other gradient over ours, {subject}",
            ">= 60x" if small else "-",
            f"{gain:.0f}x",
            gain >= 60 if small else None,
        ),
        Line(
            f"gradient at zero features is finite, {subject}",
            "yes",
            str(finite["lightning_plasticity"]),
            finite["lightning_plasticity"],
        ),
    ]
    return {"rows": rows, "lines": [asdict(line) for line in lines]}


def streaming(subject: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """The metric against joining all batches; what each keeps in memory is known without measuring."""
    features = _features(subject)
    batches = features.split(BATCH)

    def streamed() -> Tensor:
        metric = EffectiveRank()
        for batch in batches:
            metric.update(batch)
        return metric.compute()

    def joined() -> Tensor:
        return from_sigma(torch.linalg.svdvals(torch.cat(batches)))

    n, d = features.shape
    variants = {"lightning_plasticity": streamed, "torch.cat, svdvals": joined}
    memory = {"lightning_plasticity": 8 * d * d, "torch.cat, svdvals": 4 * n * d}
    rows = {
        name: {"check": {"effective rank": float(function())}, "note": f"keeps {memory[name] / 1e6:.1f} MB"}
        for name, function in variants.items()
    }
    for name, seconds in interleaved(variants, rounds, min_seconds).items():
        rows[name]["seconds"] = seconds
    return {"rows": rows}


def _features(size: str) -> Tensor:
    n, d = (int(part) for part in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(d, d, generator=generator) / d**0.5
    return torch.relu(torch.randn(n, d, generator=generator) @ weights)
