"""Callbacks that change whole layers: shrink and perturb, and resets."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity.callbacks.arguments import choice, whole_number
from lightning_plasticity.callbacks.intervention import Intervention, check_number, traced_wiring
from lightning_plasticity.interventions import reset_layers, shrink_and_perturb
from lightning_plasticity.interventions.layer_reset import (
    LayerInit,
    last_layers,
    named_resets,
    refuse_derived,
    resettable,
)
from lightning_plasticity.interventions.optimizer_state import forget_all
from lightning_plasticity.interventions.shrink_and_perturb import chosen_parameters
from lightning_plasticity.nn.masked_layers import clear_masked

SLOWEST = 0.9  # a factor below this at every step is a mistake: it leaves nothing after some hundred


class SeededIntervention(Intervention):
    """Base of those that draw from a generator of their own: equal on all processes, kept in checkpoints."""

    resets_at_task_start = True  # the task tracker calls these first

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = whole_number("seed", seed, 0)
        self._generator = torch.Generator().manual_seed(self.seed)

    def state_dict(self) -> dict[str, Any]:
        """The generator's."""
        return {"generator": self._generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the draws."""
        self._generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(state["_generator"])
        self.__dict__.update({**state, "_generator": generator})


class ShrinkAndPerturb(SeededIntervention):
    """Pulls weights towards zero and adds noise: ``theta <- shrink * theta + N(0, noise^2)``.

    Source: Ash and Adams 2020 (arXiv 1910.08475), who do it before new data are trained on; the form that acts at every
    step is L2 with noise, as in Dohare et al. 2024 (doi 10.1038/s41586-024-07711-7).

    Logs ``plasticity/interventions/shrink_and_perturb/weights_changed`` (a count) each time it acts, except at every
    step.

    Args:
        shrink: factor, in [0, 1]. With ``when="step"`` pass something like 1 - lr * weight_decay.
        noise: standard deviation; 1e-2 at boundaries, 1e-6 to 1e-4 at every step.
        when: ``"task"``: at the start of each task but the first, before its first update; ``"step"``: after every
            optimizer step; ``"call"``: only in ``intervene``.
        parameters: names or wildcards, None for all, biases and norms included.
        reset_optimizer: drop the optimizer's state of these parameters too.
        seed: of the noise; training's random numbers are not used.

    Raises:
        ValueError: for settings out of range, or a shrink below 0.9 at every step.
    """

    label = "shrink_and_perturb"

    def __init__(
        self,
        shrink: float = 0.8,
        noise: float = 0.01,
        when: Literal["task", "step", "call"] = "task",
        parameters: list[str] | None = None,
        reset_optimizer: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        choice("when", when, ("task", "step", "call"))
        self.shrink = check_number("shrink", shrink, 0, 1)
        self.noise = check_number("noise", noise, 0)
        if when == "step" and shrink < SLOWEST:
            raise ValueError(
                f"shrink={shrink!r} at every step leaves {shrink**100:.0e} of the weights after 100 steps; "
                "pass something like 1 - lr * weight_decay, say 1 - 1e-6, and noise=1e-5; or when='task'."
            )
        if isinstance(parameters, str):
            raise ValueError(f"parameters={parameters!r} is one string, expected a list of names, or None for all.")
        self.when = when
        self.parameters = parameters
        self.reset_optimizer = reset_optimizer
        self._last_step = 0

    @property
    def state_key(self) -> str:
        """Two of other parameters or times keep their states apart."""
        return self._generate_state_key(when=self.when, parameters=self.parameters)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unknown names before training starts."""
        chosen_parameters(pl_module, self.parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count optimizer steps."""
        self._last_step = trainer.global_step

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Act at a boundary, before the monitors see the weights the task begins with."""
        if self.when == "task" and task > 0 and not self.on_demand:
            self.intervene(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act once for each batch that ended in an optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            if self.when == "step" and not self.on_demand:
                self._act(trainer, pl_module)

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shrink and perturb now."""
        changed = self._act(trainer, pl_module)
        self.log_counts(trainer, "weights_changed", {"": changed})

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> int:
        parameters = [p for p in chosen_parameters(pl_module, self.parameters) if p.requires_grad]
        shrink_and_perturb(parameters, self.shrink, self.noise, self._generator)
        for layer in pl_module.modules():
            clear_masked(layer)
        if self.reset_optimizer:
            forget_all(trainer.optimizers, parameters)
        return sum(parameter.numel() for parameter in parameters)


class LayerReset(SeededIntervention):
    """Gives whole layers new parameters at the start of each task but the first, before its first update.

    Source: Nikishin et al. 2022 (arXiv 2205.07802) for the last layers; ``"all"`` is training from scratch.

    Logs ``plasticity/interventions/layer_reset/units_reset``: output units of the layers that were reset, in total and
    with ``/<layer>``.

    Args:
        layers: ``"head"`` (weights whose outputs no other weight reads), a number of last Linear or convolution layers,
            ``"all"``, or names and wildcards. The first two are found by running the first batch once.
        when: ``"task"``: at boundaries; ``"call"``: only in ``intervene``.
        reset_optimizer: drop the optimizer's state of these parameters, step counts included.
        init: ``"default"``: the layer's own ``reset_parameters``; ``"zero"``.
        seed: of the draws; training's random numbers are not used.

    Raises:
        ValueError: for settings out of range; when the fit starts, for layers that cannot be reset.
    """

    label = "layer_reset"

    def __init__(
        self,
        layers: Literal["head", "all"] | int | list[str] = "head",
        when: Literal["task", "call"] = "task",
        reset_optimizer: bool = True,
        init: LayerInit = "default",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        choice("when", when, ("task", "call"))
        choice("init", init, ("default", "zero"))
        named = isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
        counted = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1
        if not (named or counted or layers in ("head", "all")):
            raise ValueError(f"layers={layers!r}, expected 'head', 'all', a number >= 1, or a list of names.")
        self.layers = layers
        self.when = when
        self.reset_optimizer = reset_optimizer
        self.init: LayerInit = init
        self._names: list[str] | None = None

    @property
    def state_key(self) -> str:
        """Two of other layers keep their states apart."""
        return self._generate_state_key(layers=self.layers, when=self.when)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers that need no forward pass, and refuse those that cannot be reset."""
        self._names = None
        if self.layers == "all":
            self._names = resettable(pl_module)
        elif isinstance(self.layers, list):
            self._names = named_resets(pl_module, self.layers)
        refuse_derived(pl_module, self._names or [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the other layers on the first batch."""
        if self._names is None and not isinstance(self.layers, list):
            wiring = traced_wiring(pl_module, batch)
            self._names = last_layers(wiring, self.layers if isinstance(self.layers, int) else "head")
            refuse_derived(pl_module, self._names)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        """Act at a boundary, before the monitors see the weights the task begins with."""
        if self.when == "task" and task > 0 and not self.on_demand:
            self.intervene(trainer, pl_module)

    def intervene(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the layers now.

        Raises:
            RuntimeError: outside of a fit.
        """
        if self._names is None:
            raise RuntimeError(
                "LayerReset has not seen a batch yet; put it among the Trainer's callbacks, and call intervene after "
                "the first batch has started."
            )
        optimizers = trainer.optimizers if self.reset_optimizer else []
        reset_layers(pl_module, self._names, self._generator, optimizers, self.init)
        self.log_counts(trainer, "units_reset", {name: _num_units(pl_module, name) for name in self._names})


def _num_units(module: torch.nn.Module, name: str) -> int:
    """Rows of the weights in a layer."""
    weights = [p for p in module.get_submodule(name).parameters() if p.ndim >= 2]
    return sum(weight.shape[0] for weight in weights)
