"""Mixins that give any LightningModule regularisers: ``class Net(L2ERMixin, MyModule): pass``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.callbacks.regularization import MixinRegularization, l2er, penalised
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.regularization import RegularizationEngine, Regularizer
from lightning_plasticity.regularization.effective_rank import RankMode


def _with_penalties(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(unwrap(step))  # Lightning reads the arguments off ``__wrapped__``, one level deep
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_in_regularized_step"):  # super().training_step of a subclass: the outermost call adds
            return step(self, *args, **kwargs)
        self.__dict__["_in_regularized_step"] = True
        try:
            return penalised(self.regularization_engine, self, step.__get__(self), args, kwargs)
        finally:
            del self.__dict__["_in_regularized_step"]

    return training_step


def _with_callback(configure: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(configure)
    def configure_callbacks(self: Any) -> Any:
        found = configure(self)
        callbacks = list(found) if isinstance(found, list | tuple) else [found] if found else []
        if not any(isinstance(callback, MixinRegularization) for callback in callbacks):
            callbacks.append(MixinRegularization())
        return callbacks

    return configure_callbacks


class RegularizerMixin:
    """Adds what ``configure_regularizers`` returns to the training of a LightningModule.

    Works for a class that defines its own ``training_step``, one mixed with a finished module, and subclasses of either
    that call ``super()``: a penalty is added exactly once. What happens around the optimizer's step is done by a
    callback that the mixin gives to the Trainer through ``configure_callbacks``. In manual optimization add
    ``self.regularization_loss()`` to the loss yourself.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_plasticity import L2, RegularizerMixin
        >>> class Net(RegularizerMixin, BoringModel):
        ...     def configure_regularizers(self):
        ...         return [L2(1e-3)]
        >>> [type(callback).__name__ for callback in Net().configure_callbacks()]
        ['MixinRegularization']
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the class's training step and its callbacks, its own or inherited."""
        super().__init_subclass__(**kwargs)
        for name, wrap in (("training_step", _with_penalties), ("configure_callbacks", _with_callback)):
            function = getattr(cls, name, None)
            if function is None or function.__qualname__ == "LightningModule.training_step":
                continue
            if not getattr(function, "_regularized", False):
                wrapped = wrap(function)
                wrapped._regularized = True  # type: ignore[attr-defined]
                setattr(cls, name, wrapped)

    def configure_regularizers(self) -> list[Regularizer]:
        """The regularisers of this module, e.g. ``[EffectiveRank(1e-2, every_n_steps=8), L2(1e-4)]``.

        Called again when a fit starts, so that settings changed since the last one count.
        """
        return []

    @property
    def regularization_engine(self) -> RegularizationEngine:
        """What applies the regularisers; made on first use."""
        engine = self.__dict__.get("_regularization_engine")
        if engine is None:
            engine = RegularizationEngine(self.configure_regularizers())
            self.__dict__["_regularization_engine"] = engine
        return engine

    def regularization_loss(self) -> Tensor:
        """Penalties on what the current training step has computed so far, (): for manual optimization."""
        penalty = None if is_measuring() else self.regularization_engine.penalty(self)  # type: ignore[arg-type]
        return torch.zeros(()) if penalty is None else penalty


class L2ERMixin(RegularizerMixin):
    """L2-ER on any LightningModule: raise the effective rank of hidden features, keep the weights small.

    Source: Prakash et al. 2026, "Spectral Collapse Drives Loss of Plasticity in Deep Continual Learning" (arXiv
    2509.22335). Set the class attributes to change it, or those of an instance: they are read when a fit starts.

    Attributes:
        rank_strength: learning rate of the separate effective-rank step (or weight of the penalty), >= 0.
        rank_layers: hidden layers by name or wildcard, an int for the last so many, None for all.
        rank_every_n_steps: a rank step after every so many optimizer steps, on the minibatches seen since the last.
        rank_mode: ``"separate"`` (the paper's) or ``"loss"``.
        l2_strength: coupled L2 on all parameters, >= 0.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_plasticity import L2ERMixin
        >>> class Net(L2ERMixin, BoringModel):
        ...     rank_strength = 0.1
        >>> Net().configure_regularizers()[0].strength
        0.1
    """

    rank_strength: float = 1e-2
    rank_layers: list[str] | int | None = None
    rank_every_n_steps: int = 8
    rank_mode: RankMode = "separate"
    l2_strength: float = 1e-4

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Tell of settings that look misspelt: as class attributes they would go unnoticed."""
        super().__init_subclass__(**kwargs)
        known = L2ERMixin.__annotations__
        for name in vars(cls):
            if name not in known and (meant := get_close_matches(name, known, n=1, cutoff=0.85)):
                warnings.warn(
                    f"{cls.__name__}.{name} is no setting of L2ERMixin and changes nothing. Did you mean {meant[0]}? "
                    f"The settings are: {', '.join(known)}.",
                    stacklevel=2,
                )

    def configure_regularizers(self) -> list[Regularizer]:
        """The effective-rank and L2 regularisers, with the strengths above."""
        own = l2er(self.rank_strength, self.rank_layers, self.rank_every_n_steps, self.rank_mode, self.l2_strength)
        return [*super().configure_regularizers(), *own]
