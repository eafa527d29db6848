"""What a module reaches through its Trainer, and a measured step must not move: optimizers, schedulers, loggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from lightning.pytorch.loggers.logger import DummyLogger

from lightning_plasticity.callbacks.base import Callback
from lightning_plasticity.nn.snapshot import Snapshot


class FewHooks(Callback):
    """A callback without the four hooks inside a training step, which Lightning skips where they cannot be called.

    Each costs some microseconds of every step; three callbacks, 2 % of a step of one millisecond. A subclass that needs
    one of them defines it, without ``super()``.
    """

    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None


class LiveOptimizers(TypedDict):
    """Keyword arguments of ``undisturbed``."""

    optimizers: list[Any]
    schedulers: list[Any]


def live_optimizers(pl_module: Any) -> LiveOptimizers:
    """Keyword arguments ``optimizers`` and ``schedulers`` for ``undisturbed``; empty without a Trainer."""
    if getattr(pl_module, "_trainer", None) is None:
        return {"optimizers": [], "schedulers": []}
    wrapped = _as_list(pl_module.optimizers())
    bare = [optimizer.optimizer for optimizer in wrapped if hasattr(optimizer, "optimizer")]
    return {"optimizers": wrapped + bare, "schedulers": _as_list(pl_module.lr_schedulers())}


@contextmanager
def quiet(trainer: Any) -> Iterator[None]:
    """Give the module loggers that write nothing: what a training step logs by hand would be there twice.

    Also puts back what a step may set on the Trainer: ``should_stop``, and the attributes of its datamodule.
    """
    loggers, should_stop = list(trainer.loggers), trainer.should_stop
    datamodule = getattr(trainer, "datamodule", None)
    snapshot = Snapshot(None, data=[] if datamodule is None else [vars(datamodule)])
    trainer.loggers = [_MutedLogger(logger) for logger in loggers]
    try:
        yield
    finally:
        snapshot.restore()
        trainer.loggers, trainer.should_stop = loggers, should_stop


class _MutedLogger(DummyLogger):
    """Takes everything, writes nothing, and knows its directories."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> str:
        """As the real one."""
        return getattr(self._logger, "name", None) or ""

    @property
    def version(self) -> Any:
        """As the real one."""
        return getattr(self._logger, "version", None)

    @property
    def save_dir(self) -> Any:
        """As the real one."""
        return getattr(self._logger, "save_dir", None)

    @property
    def log_dir(self) -> Any:
        """As the real one."""
        return getattr(self._logger, "log_dir", None)


def _as_list(found: Any) -> list[Any]:
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]
