"""Effective rank of features: the penalty and its gradient, and the streamed metric, next to plain svdvals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.timing import interleaved
from lightning_plasticity.linalg import effective_rank
from lightning_plasticity.metrics import EffectiveRank

BATCH = 250


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


def penalty(size: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """Each variant's seconds, and its value and gradient against svdvals in float64."""
    features = _features(size)

    def gradient(function: Callable[[Tensor], Tensor], matrix: Tensor) -> tuple[Tensor, Tensor]:
        leaf = matrix.clone().requires_grad_()
        value = function(leaf)
        (found,) = torch.autograd.grad(value, leaf)
        return value.detach(), found

    truth, direction = gradient(PENALTIES["svdvals(F) and autograd"], features.double())
    rows = {}
    for name, function in PENALTIES.items():
        value, found = gradient(function, features)
        error = float((found.double() - direction).norm() / direction.norm())
        rows[name] = {"check": {"effective rank": float(value)}, "note": f"gradient off by {error:.0e}"}
    variants = {name: lambda f=function: gradient(f, features) for name, function in PENALTIES.items()}
    for name, seconds in interleaved(variants, rounds, min_seconds).items():
        rows[name]["seconds"] = seconds
    return {"rows": rows, "truth": float(truth)}


def streaming(size: str, rounds: int, min_seconds: float) -> dict[str, Any]:
    """The metric against joining all batches; what each keeps in memory is known without measuring."""
    features = _features(size)
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
    return {"rows": rows, "truth": float(from_sigma(torch.linalg.svdvals(features.double())))}


def _features(size: str) -> Tensor:
    n, d = (int(part) for part in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(d, d, generator=generator) / d**0.5
    return torch.relu(torch.randn(n, d, generator=generator) @ weights)
