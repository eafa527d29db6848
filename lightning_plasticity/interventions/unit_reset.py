"""Re-draw hidden units: new incoming weights, no outgoing ones, and nothing that norms and optimizers remember."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.interventions.initial import Init, fresh_rows
from lightning_plasticity.interventions.optimizer_state import FLAT, StepCounts, fill, forget
from lightning_plasticity.nn import HiddenUnits, Link, Wiring
from lightning_plasticity.nn.masked_layers import clear_masked, masks_of, stored
from lightning_plasticity.nn.wiring import row_dim


class UnitResets:
    """Resets units of a module whose wiring is known.

    Args:
        module: the network.
        wiring: which layers, and who reads them.
        optimizers: whose state of reset elements is zeroed.
        init: distribution of new incoming weights, see ``fresh_rows``.
        gain: for ``init="kaiming"``.
        seed: of the generator that draws them; the same on all processes.
        restart_steps: give reset elements step counts of their own under Adam and AdamW, see ``StepCounts``.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        optimizers: Iterable[Optimizer] = (),
        *,
        init: Init = "default",
        gain: float = math.sqrt(2.0),
        seed: int = 0,
        restart_steps: bool = True,
    ) -> None:
        self.wiring = wiring
        self.init, self.gain = init, gain
        self.generator = Generator().manual_seed(seed)
        self.optimizers = list(optimizers)
        self._modules = {name: child for name, child in module.named_modules() if name in touched(wiring)}
        named = {
            f"{name}.{key}": parameter
            for name, child in self._modules.items()
            for key, parameter in _own_parameters(child).items()
        }
        self.steps = StepCounts(named) if restart_steps else None
        if self.steps is not None:
            self.steps.attach(self.optimizers)

    def close(self) -> None:
        """Let go of the optimizers."""
        if self.steps is not None:
            self.steps.detach()

    def weight(self, name: str) -> Tensor:
        """A layer's weight, units first: (D, ...)."""
        layer = self._modules[name]
        return _weight(layer).detach().movedim(row_dim(layer), 0)

    def outgoing(self, link: Link) -> Tensor:
        """Weights by which a reader reads the entries of a link: (K, outputs and positions)."""
        layer = self._modules[link.module]
        weight = _weight(layer).detach().movedim(1 - row_dim(layer), 0)
        return weight[link.entries.to(weight.device)].flatten(1)

    @torch.no_grad()
    def reset(self, layer: str, units: Tensor, means: Sequence[Tensor] | None = None) -> Tensor:
        """Re-draw units: weights in from the initial distribution, bias and weights out 0, norms as new.

        Args:
            layer: name of the layer.
            units: (K,) indices.
            means: mean activation of every unit, (D,), as each reader reads it; where given, the readers' biases take
                over what the units contributed on average.

        Returns:
            The new incoming weights, (K, ...); zero where masked.
        """
        hidden = self.wiring.layers[layer]
        target = self._modules[layer]
        weight = _weight(target)
        units = units.to(weight.device)
        if means is not None:
            for link, mean in zip(hidden.readers, means, strict=True):
                self._hand_over(link, units, mean)
        rows = fresh_rows(target, units.cpu(), self.generator, self.init, self.gain)
        weight.movedim(row_dim(target), 0)[units] = rows
        clear_masked(target)
        self._forget(target, "weight", row_dim(target), units)
        if target.bias is not None:
            self._fill(target, "bias", 0, units, 0.0)
        self._reset_norms(hidden, units)
        for link in hidden.readers:
            reader = self._modules[link.module]
            self._fill(reader, "weight", 1 - row_dim(reader), _owned(link, units), 0.0)
        return weight.movedim(row_dim(target), 0)[units]

    def _hand_over(self, link: Link, units: Tensor, mean: Tensor) -> None:
        reader = self._modules[link.module]
        bias: Any = reader.bias
        if bias is None:
            return
        entries = _owned(link, units)
        owner = torch.zeros(len(mean), dtype=torch.bool, device=units.device)
        owner[units] = True
        mine = owner[link.units.to(units.device)]
        weight = _weight(reader).movedim(1 - row_dim(reader), 0)[entries]
        per_output = weight.flatten(2).sum(2) if weight.ndim > 2 else weight  # (entries, outputs)
        bias += per_output.T @ mean.to(weight)[link.units.to(units.device)[mine]]

    def _reset_norms(self, hidden: HiddenUnits, units: Tensor) -> None:
        for link in hidden.norms:
            norm = self._modules[link.module]
            entries = _owned(link, units)
            for key, value in (("weight", 1.0), ("bias", 0.0)):
                if getattr(norm, key, None) is not None:
                    self._fill(norm, key, FLAT, entries, value)
            for key, value in (("running_mean", 0.0), ("running_var", 1.0)):
                buffer = getattr(norm, key, None)
                if buffer is not None:
                    fill(buffer, 0, entries, value)

    def _fill(self, module: nn.Module, key: str, dim: int, indices: Tensor, value: float) -> None:
        fill(stored(module, key), dim, indices, value)
        self._forget(module, key, dim, indices)

    def _forget(self, module: nn.Module, key: str, dim: int, indices: Tensor) -> None:
        parameter = stored(module, key)
        forget(self.optimizers, parameter, dim, indices)
        if self.steps is not None:
            self.steps.restart(self.optimizers, parameter, dim, indices)

    def state_dict(self) -> dict[str, Any]:
        """The generator and the step counts."""
        counts = {} if self.steps is None else self.steps.state_dict()
        return {"generator": self.generator.get_state(), "steps": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.generator.set_state(state["generator"].cpu())
        if self.steps is not None:
            self.steps.load_state_dict(state["steps"])
            self.steps.attach(self.optimizers)


def _weight(layer: nn.Module) -> Tensor:
    weight = stored(layer)
    assert isinstance(weight, nn.Parameter), "neither dense nor under a mask; find_wiring and told_wiring refuse it"
    return weight


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    masked = {name: stored(module, name) for name in masks_of(module)}
    return masked | dict(module.named_parameters(recurse=False))


def _owned(link: Link, units: Tensor) -> Tensor:
    """Entries of a link that belong to the units."""
    mine = torch.isin(link.units.to(units.device), units)
    return link.entries.to(units.device)[mine]


def touched(wiring: Wiring) -> set[str]:
    """Names of all modules that a reset can change."""
    links = [link for layer in wiring.layers.values() for link in (*layer.readers, *layer.norms)]
    return {*wiring.layers, *(link.module for link in links)}
