"""Callbacks that re-draw hidden units: continual backpropagation and ReDo."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.arguments import choice, whole_number
from lightning_plasticity.callbacks.intervention import UnitIntervention, check_number, summed_over_processes
from lightning_plasticity.interventions import ContinualBackpropEngine, ReDoEngine
from lightning_plasticity.interventions.continual_backprop import UTILITIES, Utility
from lightning_plasticity.interventions.initial import INITS, Init
from lightning_plasticity.nn import Wiring


class ContinualBackprop(UnitIntervention):
    """Re-draws, step by step, a few of the least useful hidden units.

    Source: Dohare et al. 2024 (doi 10.1038/s41586-024-07711-7). ``ContinualBackpropEngine`` has the formulas. Acts once
    after each optimizer step, also under gradient accumulation, on what training's own forward passes showed; under DDP
    on the mean over all processes.

    Logs ``plasticity/interventions/continual_backprop/units_reset``, and the same with ``/<layer>``: units re-drawn
    since the last time it logged, every ``log_every_n_steps`` of the Trainer in which there were any.

    Args:
        replacement_rate: share of the mature units to re-draw at each step, in [0, 1]. 1e-4 for long runs, 1e-3 where a
            task has about a thousand steps; 0 only watches, and acts in ``intervene``.
        maturity: steps for which a new unit is safe.
        decay: of the running means, in [0, 1).
        utility: ``"contribution"``, ``"zero_contribution"`` or ``"adaptable"``.
        init: new incoming weights: ``"default"``, as the layer's ``reset_parameters``, or ``"kaiming"``, U(-b, b) with
            b = gain * sqrt(3 / fan_in).
        gain: for ``"kaiming"``.
        correct_bias: let following biases take over the mean of what a re-drawn unit contributed (in the paper; the
            released code does not).
        restart_steps: give re-drawn weights step counts of their own under Adam and AdamW.
        intervene_fraction: share of each layer's mature units that ``intervene`` re-draws.
        layers: hidden layers by name or wildcard (the Linear or convolution), None for all that can be followed.
        wiring: what follows each hidden layer, where it cannot be traced: ``{"fc1": ["norm1", "fc2"]}``.
        seed: of the draws; training's random numbers are not used.

    Raises:
        ValueError: for settings out of range; at the first batch, when no layer can be acted on.
    """

    label = "continual_backprop"

    def __init__(
        self,
        replacement_rate: float = 1e-4,
        maturity: int = 100,
        decay: float = 0.99,
        utility: Utility = "contribution",
        init: Init = "default",
        gain: float = math.sqrt(2.0),
        correct_bias: bool = True,
        restart_steps: bool = True,
        intervene_fraction: float = 0.1,
        layers: list[str] | None = None,
        wiring: dict[str, list[str]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, wiring)
        choice("utility", utility, UTILITIES)
        choice("init", init, INITS)
        self.replacement_rate = check_number("replacement_rate", replacement_rate, 0, 1)
        self.maturity = whole_number("maturity", maturity, 0)
        self.decay = check_number("decay", decay, 0, 1, below=True)
        self.utility: Utility = utility
        self.init: Init = init
        self.gain = check_number("gain", gain, 0)
        self.correct_bias = correct_bias
        self.restart_steps = restart_steps
        self.intervene_fraction = check_number("intervene_fraction", intervene_fraction, 0, 1)
        self.seed = whole_number("seed", seed, 0)

    @property
    def state_key(self) -> str:
        """Two of other layers keep their states apart."""
        return self._generate_state_key(layers=self.layers, wiring=self.wiring)

    def make_engine(self, pl_module: LightningModule, wiring: Wiring, optimizers: list[Any]) -> ContinualBackpropEngine:
        """The engine with this callback's settings."""
        return ContinualBackpropEngine(
            pl_module,
            wiring,
            optimizers,
            replacement_rate=0.0 if self.on_demand else self.replacement_rate,
            maturity=self.maturity,
            decay=self.decay,
            utility=self.utility,
            init=self.init,
            gain=self.gain,
            correct_bias=self.correct_bias,
            restart_steps=self.restart_steps,
            seed=self.seed,
        )

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-draw now the least useful ``intervene_fraction`` of each layer's mature units."""
        self.engine.replace_lowest(self.intervene_fraction)
        self._log_new(trainer)


class ReDo(UnitIntervention):
    """Re-draws dormant hidden units every so many steps.

    Source: Sokar et al. 2023 (arXiv 2302.12902). ``ReDoEngine`` has the definition. Dormancy is judged on the
    activations of the last minibatches, as training computed them; under DDP on those of all processes.

    Logs ``plasticity/interventions/redo/units_reset``, and the same with ``/<layer>``: units re-drawn since the last
    time it logged.

    Args:
        tau: units are dormant whose mean ``|h|``, relative to that of their layer, is at most this; 0 takes only
            dead ones.
        every_n_steps: period in optimizer steps; the paper's 1000, 100 where a task has about a thousand steps. None
            acts only in ``intervene``.
        samples: over how many samples dormancy is judged, at least, on each process.
        init: as in ``ContinualBackprop``.
        gain: for ``init="kaiming"``.
        restart_steps: give re-drawn weights step counts of their own under Adam and AdamW.
        layers: as in ``ContinualBackprop``.
        wiring: as in ``ContinualBackprop``.
        seed: of the draws.

    Raises:
        ValueError: for settings out of range; at the first batch, when no layer can be acted on.
    """

    label = "redo"

    def __init__(
        self,
        tau: float = 0.1,
        every_n_steps: int | None = 1000,
        samples: int = 256,
        init: Init = "default",
        gain: float = math.sqrt(2.0),
        restart_steps: bool = True,
        layers: list[str] | None = None,
        wiring: dict[str, list[str]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, wiring)
        choice("init", init, INITS)
        self.tau = check_number("tau", tau, 0)
        self.every_n_steps = None if every_n_steps is None else whole_number("every_n_steps", every_n_steps)
        self.samples = whole_number("samples", samples)
        self.init: Init = init
        self.gain = check_number("gain", gain, 0)
        self.restart_steps = restart_steps
        self.seed = whole_number("seed", seed, 0)

    @property
    def state_key(self) -> str:
        """Two of other layers or thresholds keep their states apart."""
        return self._generate_state_key(tau=self.tau, layers=self.layers, wiring=self.wiring)

    def make_engine(self, pl_module: LightningModule, wiring: Wiring, optimizers: list[Any]) -> ReDoEngine:
        """The engine with this callback's settings."""
        return ReDoEngine(
            pl_module,
            wiring,
            optimizers,
            tau=self.tau,
            every_n_steps=None if self.on_demand else self.every_n_steps,
            samples=self.samples,
            init=self.init,
            gain=self.gain,
            restart_steps=self.restart_steps,
            seed=self.seed,
        )

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-draw the units that are dormant now; every process has to call it."""
        self.engine.recycle(summed_over_processes(trainer))
        self._log_new(trainer)
