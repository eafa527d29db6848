"""The live optimizers and schedulers of a module that steps them by hand: a measured step must not move them."""

from __future__ import annotations

from typing import Any, TypedDict


class LiveOptimizers(TypedDict):
    """Keyword arguments of ``undisturbed``."""

    optimizers: list[Any]
    schedulers: list[Any]


def live_optimizers(pl_module: Any) -> LiveOptimizers:
    """Keyword arguments ``optimizers`` and ``schedulers`` for ``undisturbed``; empty under automatic optimization."""
    if getattr(pl_module, "automatic_optimization", True):
        return {"optimizers": [], "schedulers": []}
    wrapped = _as_list(pl_module.optimizers())
    bare = [optimizer.optimizer for optimizer in wrapped if hasattr(optimizer, "optimizer")]
    return {"optimizers": wrapped + bare, "schedulers": _as_list(pl_module.lr_schedulers())}


def _as_list(found: Any) -> list[Any]:
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]
