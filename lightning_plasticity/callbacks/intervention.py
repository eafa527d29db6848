"""What all interventions share: they say when, act on demand, and log what they did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plasticity.callbacks.live import FewHooks, live_optimizers
from lightning_plasticity.callbacks.processes import describe, several
from lightning_plasticity.callbacks.regularization import muted
from lightning_plasticity.callbacks.sharding import refuse_sharded_interventions
from lightning_plasticity.callbacks.task_tracker import TaskTracker
from lightning_plasticity.callbacks.warn_once import WarnOnce
from lightning_plasticity.curvature import LossClosure
from lightning_plasticity.loggers import log_scalars
from lightning_plasticity.nn import Wiring, find_wiring, told_wiring, undisturbed

_JOINED: WeakKeyDictionary[Any, WeakSet[Any]] = WeakKeyDictionary()  # by Trainer: what its alerts brought along


class Intervention(FewHooks):
    """Base of the callbacks that change weights; ``intervene`` acts now, in any hook of a fit.

    Attributes:
        label: the part of the logged keys that names it.
        on_demand: whether it acts in ``intervene`` only, not by its own schedule.
    """

    updates_weights = True  # comes before the task tracker: a task ends after its last change
    label = ""
    on_demand = False
    _tracker: TaskTracker | None = None
    _resuming = True

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act now, whatever the schedule says."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the Trainer's task tracker; refuse strategies that split weights over processes."""
        self.on_demand = self in _JOINED.get(trainer, ())
        self._tracker = TaskTracker.attach(trainer, self._tracker)
        if stage == "fit":
            refuse_sharded_interventions(trainer, type(self).__name__)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only a fit resumes; an evaluation from a checkpoint must not turn the state back."""
        self._resuming = trainer.state.fn == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was made."""
        if self._resuming and state_dict:
            self.restore(state_dict)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""

    @property
    def log_prefix(self) -> str:
        """What its logged keys begin with."""
        return f"plasticity/interventions/{self.label}"

    def log_counts(
        self, trainer: Trainer, quantity: str, counts: Mapping[str, float], total: float | None = None
    ) -> None:
        """Log a total, by default the sum, and the part of each layer."""
        key = f"{self.log_prefix}/{quantity}"
        values = {f"{key}/{re.sub('[^A-Za-z0-9_.]', '_', name)}": float(n) for name, n in counts.items() if name}
        total = sum(counts.values()) if total is None else total
        step = trainer.global_step if self._tracker is None else self._tracker.step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            log_scalars(logger, {key: float(total), **values}, step)


def join(trainer: Any, pl_module: LightningModule, stage: str, intervention: Any) -> None:
    """Give the Trainer an intervention that another callback will call, to act on demand only.

    One that the user has listed keeps its schedule.
    """
    if not isinstance(intervention, Intervention) or intervention in trainer.callbacks:
        return
    same = [type(c).__name__ for c in trainer.callbacks if getattr(c, "state_key", None) == intervention.state_key]
    if same:
        raise ValueError(
            f"Two callbacks {same[0]} with equal settings, one of them called by another callback, could not be told "
            "apart in a checkpoint. Pass one object to both places, or give them another threshold, layers or when=."
        )
    _JOINED.setdefault(trainer, WeakSet()).add(intervention)
    trainer.callbacks = [*trainer.callbacks, intervention]  # Lightning may be iterating over the present list
    intervention.setup(trainer, pl_module, stage)


class EngineIntervention(Intervention):
    """Base of those whose engine lives for one fit; its state goes on in the next fit of the same module."""

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._saved: dict[str, Any] = {}  # state of an engine that is not there now
        self._module: ref[Any] | None = None  # whose state that is; None for any
        self._last_step = 0

    def adopt(self, engine: Any, pl_module: LightningModule) -> None:
        """Let this engine work, and go on where the last one stopped."""
        self._engine = engine
        if self._saved:
            engine.load_state_dict(self._saved)
        self._module = ref(pl_module)

    def forget_other(self, pl_module: LightningModule) -> bool:
        """Drop the state of another module; whether there was one."""
        other = self._module is not None and self._module() is not pl_module
        if other:
            self._saved = {}
        return other

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count optimizer steps."""
        self._last_step = trainer.global_step

    def stepped(self, trainer: Trainer) -> bool:
        """Whether the batch that ends has ended in an optimizer step."""
        before, self._last_step = self._last_step, trainer.global_step
        return before != self._last_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off, where Lightning calls no teardown."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The engine's state; that of a finished fit until the next one begins."""
        return {"engine": self._saved if self._engine is None else self._engine.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep it for the engine that the next batch will bring."""
        self._stop()  # a learning-rate finder restores its own checkpoint inside a fit
        self._saved, self._module = state["engine"], None

    def __getstate__(self) -> dict[str, Any]:
        state = self.state_dict()
        return {**self.__dict__, "_engine": None, "_module": None, "_saved": state["engine"]}

    def _stop(self) -> None:
        if self._engine is not None:
            self._saved = self._engine.state_dict()
            self._engine.close()
            self._engine = None


class UnitIntervention(EngineIntervention):
    """Base of those that watch hidden units.

    The wiring is traced on the first batch of each fit, before any weight changes. Layers that cannot be acted on are
    named in one warning.
    """

    def __init__(self, layers: list[str] | None, wiring: dict[str, list[str]] | None) -> None:
        super().__init__()
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers={layers!r}, expected a list of names such as ['net.0'], or None for all.")
        if wiring is not None and not isinstance(wiring, Mapping):
            raise TypeError(f"wiring={wiring!r}, expected a dict such as {{'net.0': ['net.2']}}.")
        if layers is not None and wiring is not None:
            raise ValueError("layers and wiring exclude each other: wiring already names the layers.")
        self.layers = layers
        self.wiring = wiring
        self._logged: dict[str, int] = {}
        self._warn_once = WarnOnce(type(self).__name__)
        self._given_up: str | None = None  # why it does nothing in this fit

    def make_engine(self, pl_module: LightningModule, wiring: Wiring, optimizers: list[Any]) -> Any:
        """The engine that does the work."""
        raise NotImplementedError

    @property
    def engine(self) -> Any:
        """The engine of the present fit.

        Raises:
            RuntimeError: outside of a fit.
        """
        if self._given_up is not None:
            raise RuntimeError(f"{type(self).__name__} does nothing in this fit: {self._given_up}")
        if self._engine is None:
            raise RuntimeError(
                f"{type(self).__name__} acts only while it watches a fit; put it among the Trainer's callbacks, and "
                "call intervene after the first batch has started."
            )
        return self._engine

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a wrong wiring before training starts."""
        self._given_up = None
        if self.wiring is not None:
            told_wiring(pl_module, self.wiring)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Trace the wiring on the first batch; record activations from here to the batch's end."""
        if self._engine is None and self._given_up is None:
            self._start(trainer, pl_module, batch)
        if self._engine is not None:
            self._engine.activations.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act once for each batch that ended in an optimizer step."""
        if self._engine is None:
            return
        self._engine.activations.pause()
        if not self.stepped(trainer):
            return
        self._engine.step(summed_over_processes(trainer))
        if trainer.global_step % max(1, getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._log_new(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was not logged; the hooks stay until ``teardown``, for what the end of a task may start."""
        self._log_new(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The engine's state, and how much of it has been logged."""
        return {**super().state_dict(), "logged": dict(self._logged)}

    def restore(self, state: dict[str, Any]) -> None:
        """Keep it for the engine that the next batch will bring."""
        super().restore(state)
        self._logged = dict(state["logged"])

    def _start(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self.forget_other(pl_module):
            self._logged = {}
        try:
            wiring = self._find_wiring(pl_module, batch)
        except Exception as error:
            # Nobody has asked for it yet, and perhaps nobody will; what the user has told it has to be right.
            if not self.on_demand or self.layers is not None or self.wiring is not None:
                raise
            self._given_up = describe(error)
            rank_zero_warn(f"{type(self).__name__} cannot act when asked to: {self._given_up} Training goes on.")
            return
        self.adopt(self.make_engine(pl_module, wiring, list(trainer.optimizers)), pl_module)

    def _find_wiring(self, pl_module: LightningModule, batch: Any) -> Wiring:
        if self.wiring is not None:
            return told_wiring(pl_module, self.wiring)
        wiring = traced_wiring(pl_module, batch)
        if self.layers is not None:
            return wiring.only(self.layers)
        if not wiring.layers:
            raise ValueError(
                f"{type(self).__name__} found no hidden layer to act on:\n{wiring.describe()}\n"
                "Tell it with wiring={'layer': ['what follows it', ...]}, or remove the callback."
            )
        if wiring.unsupported:
            self._warn_once(
                f"{type(self).__name__} leaves some layers alone. What it found:\n{wiring.describe()}\n"
                "To silence this name layers=[...], or tell the wiring with wiring={'layer': ['what follows it']}."
            )
        return wiring

    def _log_new(self, trainer: Trainer) -> None:
        if self._engine is None:
            return
        totals: dict[str, int] = self._engine.num_reset
        new = {name: total - self._logged.get(name, 0) for name, total in totals.items()}
        if any(new.values()):
            self.log_counts(trainer, "units_reset", new)
        self._logged = dict(totals)


def traced_wiring(pl_module: LightningModule, batch: Any) -> Wiring:
    """The wiring as one undisturbed training step on a batch shows it."""
    with undisturbed(pl_module, **live_optimizers(pl_module)) as collected, muted(pl_module):
        closure = LossClosure(pl_module, collected=collected)
        return find_wiring(pl_module, lambda: closure.run(batch))


def summed_over_processes(trainer: Trainer) -> Any:
    """What adds a tensor up over all processes; None for a single one."""
    return partial(_sum, trainer) if several(trainer) else None


def _sum(trainer: Trainer, tensor: Tensor) -> Tensor:
    return torch.as_tensor(trainer.strategy.reduce(tensor.contiguous(), reduce_op="sum"))


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, below: bool = False) -> float:
    """A number in [low, high], or in [low, high) with ``below``.

    Raises:
        ValueError: when it is not.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or not math.isfinite(value) or (below and value == high):
        upper = "" if high == math.inf else f" and {'<' if below else '<='} {high}"
        raise ValueError(f"{name}={value!r}, expected a finite number >= {low}{upper}.")
    return float(value)
