"""When regularisers act: callbacks around the ``RegularizationEngine``, for any module and for the mixin's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, update_wrapper
from inspect import signature, unwrap
from typing import Any, Literal
from weakref import ref

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plasticity.callbacks.base import Callback
from lightning_plasticity.callbacks.live import live_optimizers, quiet
from lightning_plasticity.callbacks.processes import joined_batches, several
from lightning_plasticity.callbacks.sharding import refuse_sharded_regularizers
from lightning_plasticity.curvature import LossClosure, MeasurementError
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.nn.batches import clone_batch
from lightning_plasticity.nn.snapshot import shadow_method
from lightning_plasticity.regularization import L2, EffectiveRank, RegularizationEngine, Regularizer
from lightning_plasticity.regularization.effective_rank import RankMode


class EngineHooks(Callback):
    """Drives an engine from Lightning's hooks; the two callbacks below differ in where the engine comes from.

    A fit goes on with the count of steps of earlier fits of the same module, without their minibatches: its first
    separate step may see fewer than the later ones. Only a run resumed from a checkpoint goes on inside a window.
    """

    updates_weights = True  # comes before the task tracker: a task ends after its last separate step
    _engine: RegularizationEngine | None = None
    _last_step = 0
    _in_batch = False
    _resuming = True
    _told = False

    def engine(self, pl_module: Any) -> tuple[RegularizationEngine, list[Regularizer]]:
        """The engine of this module, and the regularisers it shall apply now."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the settings as they are now; refuse wrong ones and unknown layer names before training starts."""
        if stage == "fit":
            self._engine, regularizers = self.engine(pl_module)
            refuse_sharded_regularizers(trainer, regularizers)
            self._engine.begin_fit(pl_module, regularizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count optimizer steps."""
        self._last_step = trainer.global_step
        self._in_batch = False
        # A checkpoint's minibatches are on the CPU; otherwise there are none yet.
        self._running.load_state_dict(move_data_to_device(self._running.state_dict(), pl_module.device))
        self._running.hold_initial_weights(pl_module)  # not in ``setup``: a checkpoint's weights are restored only now

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the minibatch before the step can change it."""
        self._running.remember(batch)
        self._in_batch = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add to the gradients that this optimizer is about to use (already unscaled, not yet clipped)."""
        self._running.add_gradients(p for group in optimizer.param_groups for p in group["params"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the separate steps that are due, once for each batch that ended in an optimizer step."""
        self._in_batch = False
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        reduce = None if trainer.world_size == 1 else trainer.strategy.reduce
        gather = partial(self._joined, pl_module) if several(trainer) else None
        live = partial(live_optimizers, pl_module)
        self._running.after_step(pl_module, partial(run_step, pl_module), reduce, live, gather)

    def _joined(self, pl_module: LightningModule, batches: Sequence[Any]) -> Sequence[Any]:
        """All ranks' minibatches; one's own where they cannot be sent, and the gradients are averaged."""
        try:
            return joined_batches(batches, pl_module.device)
        except MeasurementError as error:  # on all ranks
            if not self._told:
                rank_zero_warn(
                    f"Regularisation: {str(error).rstrip('.')}. Each process takes the separate step's gradient on its "
                    "own minibatches, and the mean is used; let batches be tensors, tuples, lists and dicts."
                )
            self._told = True
            return batches

    def state_dict(self) -> dict[str, Any]:
        """The engine's counters, remembered minibatches and initial weights."""
        if self._engine is None:
            return {}
        state = self._engine.state_dict()
        if self._in_batch:
            state["window"] = state["window"][:-1]  # a run resumed from here sees this batch again
        return state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only a fit resumes; an evaluation from a checkpoint must not turn the count back."""
        self._resuming = trainer.state.fn == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on inside the window that the checkpoint was made in."""
        if self._resuming and state_dict:
            self._running.load_state_dict(state_dict)

    @property
    def _running(self) -> RegularizationEngine:
        assert self._engine is not None, "setup comes first"
        return self._engine


class Regularization(EngineHooks):
    """Adds regularisers to any LightningModule without touching its class.

    Used again in a later fit it goes on counting steps, with the same initial weights, if the module is the same, else
    it starts over; the minibatches of the earlier fit are forgotten in either case.

    Args:
        regularizers: what to apply, e.g. ``[EffectiveRank(1e-2), L2(1e-4)]``.

    Raises:
        TypeError: for something that is not a regulariser.
        ValueError: for an empty list; when the fit starts, for unknown layer names.

    Example:
        >>> from lightning_plasticity import Regularization
        >>> [type(r).__name__ for r in Regularization.l2er(rank_strength=0.1).regularizers]
        ['EffectiveRank', 'L2']
    """

    def __init__(self, regularizers: list[Regularizer]) -> None:
        super().__init__()
        if not regularizers:
            raise ValueError(
                "regularizers is empty; pass some, e.g. [EffectiveRank(1e-2), L2(1e-4)], or drop the callback."
            )
        self.regularizers = regularizers
        self._engine = RegularizationEngine(regularizers)
        self._module: ref[Any] | None = None  # whose steps the engine has counted
        self._undo: Callable[[], None] | None = None

    @classmethod
    def l2er(
        cls,
        rank_strength: float = 1e-2,
        rank_layers: list[str] | int | None = None,
        rank_every_n_steps: int = 8,
        rank_mode: RankMode = "separate",
        l2_strength: float = 1e-4,
    ) -> Regularization:
        """L2-ER; the arguments are the class attributes of ``L2ERMixin``."""
        return cls(l2er(rank_strength, rank_layers, rank_every_n_steps, rank_mode, l2_strength))

    def engine(self, pl_module: Any) -> tuple[RegularizationEngine, list[Regularizer]]:
        """The callback's own, also after both were pickled together; a new one for another module."""
        if self._engine is None or (self._module is not None and self._module() is not pl_module):
            self._engine = RegularizationEngine(self.regularizers)
        self._module = ref(pl_module)
        return self._engine, self.regularizers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a weak reference cannot be pickled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap this module's training step for the fit."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization and any(regularizer.adds_to_loss for regularizer in self.regularizers):
            raise ValueError(
                "In manual optimization a callback cannot add to the loss; use EffectiveRank(mode='separate') or L2, "
                "or the mixin with self.regularization_loss() in your training_step."
            )
        self._undo = shadow_method(pl_module, "training_step", RegularizedStep(self._running, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its training step back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error, where Lightning calls no teardown."""
        self._restore()

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


class MixinRegularization(EngineHooks):
    """What ``RegularizerMixin`` gives to the Trainer; a class of its own, so that it replaces nobody's callback."""

    def engine(self, pl_module: Any) -> tuple[RegularizationEngine, list[Regularizer]]:
        """The module's, and what ``configure_regularizers`` makes of the module's present settings."""
        return pl_module.regularization_engine, pl_module.configure_regularizers()


class RegularizedStep:
    """Stands in for one module's training step; a copy of that module has its own plain one instead."""

    def __init__(self, engine: RegularizationEngine, pl_module: LightningModule) -> None:
        self._engine = engine
        self._pl_module = pl_module
        self._step = pl_module.training_step
        # Lightning reads the arguments off ``__wrapped__``, one level deep.
        update_wrapper(self, unwrap(self._step))
        self.__signature__ = signature(self._step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, and the penalties that are due."""
        return penalised(self._engine, self._pl_module, self._step, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._pl_module, "training_step")


def l2er(
    rank_strength: float,
    rank_layers: list[str] | int | None,
    rank_every_n_steps: int,
    rank_mode: Literal["separate", "loss"],
    l2_strength: float,
) -> list[Regularizer]:
    """The two regularisers of L2-ER (Prakash et al. 2026, arXiv 2509.22335)."""
    return [EffectiveRank(rank_strength, rank_layers, rank_every_n_steps, rank_mode), L2(l2_strength)]


def penalised(
    engine: RegularizationEngine,
    pl_module: Any,
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a training step and add the penalties that are due to the loss it returns; a measured step is left alone."""
    if is_measuring():
        return step(*args, **kwargs)

    def run() -> object:
        with muted(pl_module):
            return step(*clone_batch(args), **clone_batch(kwargs))

    with engine.tapped(pl_module, run, partial(live_optimizers, pl_module)):
        returned = step(*args, **kwargs)
        if returned is None or not getattr(pl_module, "automatic_optimization", True):
            return returned
        penalty = engine.penalty(pl_module)
    return returned if penalty is None else with_penalty(returned, penalty)


def run_step(pl_module: LightningModule, batch: Any) -> None:
    """Run the module's training step for its activations; whether it returns a loss does not matter."""
    with muted(pl_module):
        LossClosure(pl_module).run(batch)


def muted(pl_module: Any) -> AbstractContextManager[None]:
    """Inside, what the training step writes to loggers by hand goes nowhere."""
    trainer = getattr(pl_module, "_trainer", None)
    return nullcontext() if trainer is None else quiet(trainer)


def with_penalty(returned: Any, penalty: Tensor) -> Any:
    """A training step's result with the penalty in its loss; other entries of a dict are kept."""
    if isinstance(returned, Mapping):
        if returned.get("loss") is None:
            return returned  # for Lightning to judge
        return {**returned, "loss": returned["loss"] + penalty}
    return returned + penalty
