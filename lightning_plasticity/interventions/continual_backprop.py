"""Continual backpropagation: keep re-drawing a few of the least useful hidden units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.interventions.activations import ActivationMeans, Key, Reduce, joined
from lightning_plasticity.interventions.initial import Init
from lightning_plasticity.interventions.unit_reset import UnitResets
from lightning_plasticity.nn import HiddenUnits, Wiring

Utility = Literal["contribution", "zero_contribution", "adaptable"]
UTILITIES = ("contribution", "zero_contribution", "adaptable")
TINY = 1e-30


@dataclass
class _Layer:
    """Running statistics of one layer's units, in float64."""

    age: Tensor  # (D,) optimizer steps since the unit was drawn
    utility: Tensor  # (D,)
    mean: Tensor  # (readers, D) activation
    accumulated: float = 0.0  # units due, the fraction included
    num_reset: int = 0

    @classmethod
    def new(cls, layer: HiddenUnits) -> _Layer:
        age, utility = torch.zeros(layer.num_units), torch.zeros(layer.num_units)
        mean = torch.zeros(len(layer.readers), layer.num_units)
        return cls(age.double(), utility.double(), mean.double())


class ContinualBackpropEngine:
    """Continual backpropagation for a training loop of one's own; call ``step`` after each optimizer step.

    Source: Dohare et al. 2024 (doi 10.1038/s41586-024-07711-7, algorithm 1). For every unit: age a, mean activation m
    and utility u, running means with the given decay, each divided by 1 - decay^a when used. The instantaneous utility
    is ``mean |h| * mean |w_out|`` (``"contribution"``), ``mean |h - m| * mean |w_out|`` (``"zero_contribution"``), or
    the latter divided by ``mean |w_in|`` (``"adaptable"``). Of the units older than ``maturity`` those of lowest
    utility are re-drawn, ``replacement_rate`` times their number at every step; fractions add up.

    With several readers, each with its ``|h|`` and its w_out, the mean is over all outgoing weights.

    Args:
        module: the network.
        wiring: which layers, from ``find_wiring``.
        optimizers: of its parameters.
        replacement_rate: share of the mature units to re-draw at each step, in [0, 1].
        maturity: steps for which a new unit is safe.
        decay: of the running means, in [0, 1).
        utility: which one.
        init: distribution of new incoming weights, ``"default"`` or ``"kaiming"``.
        gain: for ``"kaiming"``.
        correct_bias: let the biases of the readers take over the mean of what a re-drawn unit contributed, as the paper
            states; the released code clears that mean before it is used (so False reproduces its runs).
        restart_steps: step counts of their own for re-drawn weights under Adam.
        seed: of the draws.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        optimizers: Iterable[Optimizer] = (),
        *,
        replacement_rate: float = 1e-4,
        maturity: int = 100,
        decay: float = 0.99,
        utility: Utility = "contribution",
        init: Init = "default",
        gain: float = math.sqrt(2.0),
        correct_bias: bool = True,
        restart_steps: bool = True,
        seed: int = 0,
    ) -> None:
        self.wiring = wiring
        self.replacement_rate, self.maturity, self.decay = replacement_rate, maturity, decay
        self.utility, self.correct_bias = utility, correct_bias
        self.units = UnitResets(
            module, wiring, optimizers, init=init, gain=gain, seed=seed, restart_steps=restart_steps
        )
        self.activations = ActivationMeans(module, wiring, keep=utility != "contribution")
        self._layers = {name: _Layer.new(layer) for name, layer in wiring.layers.items()}

    @property
    def num_reset(self) -> dict[str, int]:
        """Units re-drawn so far, by layer."""
        return {name: layer.num_reset for name, layer in self._layers.items()}

    def step(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Take what training's forward passes showed since the last step, then re-draw the units that are due.

        Args:
            reduce: sums a tensor over processes.

        Returns:
            Indices of the re-drawn units by layer; empty where there were none.
        """
        kept = self.activations.take_kept()
        totals = joined(self.activations.take(), self.wiring, reduce)
        if totals is None:
            return {}
        chosen: dict[str, Tensor] = {}
        for name, hidden in self.wiring.layers.items():
            layer = self._layers[name]
            self._update(layer, hidden, totals, kept, reduce)
            eligible = layer.age > self.maturity
            layer.accumulated += self.replacement_rate * int(eligible.sum())
            due = int(layer.accumulated)
            layer.accumulated -= due
            chosen[name] = self._lowest(layer, eligible, due)
        return self._replace(chosen)

    def replace_lowest(self, fraction: float) -> dict[str, Tensor]:
        """Re-draw now this share of each layer's mature units, those of lowest utility; rounded up."""
        chosen = {}
        for name, layer in self._layers.items():
            eligible = layer.age > self.maturity
            chosen[name] = self._lowest(layer, eligible, math.ceil(fraction * int(eligible.sum())))
        return self._replace(chosen)

    def statistics(self, layer: str) -> dict[str, Tensor]:
        """Age, utility, bias-corrected utility and mean activation (as the first reader sees it) of a layer's units."""
        own = self._layers[layer]
        return {
            "age": own.age.clone(),
            "utility": own.utility.clone(),
            "corrected_utility": own.utility / self._correction(own),
            "mean_activation": own.mean[0].clone(),
        }

    def close(self) -> None:
        """Remove all hooks."""
        self.activations.close()
        self.units.close()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _update(
        self,
        layer: _Layer,
        hidden: HiddenUnits,
        totals: Mapping[Key, Tensor],
        kept: Mapping[Key, list[Tensor]],
        reduce: Reduce | None,
    ) -> None:
        keys = [(hidden.layer, index) for index in range(len(hidden.readers))]
        device = totals[keys[0]].device
        layer.age, layer.utility, layer.mean = (t.to(device) for t in (layer.age, layer.utility, layer.mean))
        means = torch.stack([totals[key][0] / totals[key][2] for key in keys])
        layer.age += 1
        layer.mean = self.decay * layer.mean + (1 - self.decay) * means
        corrected = layer.mean / self._correction(layer)
        weighted = torch.zeros_like(layer.utility)
        outputs = torch.zeros_like(layer.utility)
        for index, (key, link) in enumerate(zip(keys, hidden.readers, strict=True)):
            size = totals[key][1] / totals[key][2]
            if self.utility != "contribution":
                size = self._distance(kept.get(key, []), corrected[index], hidden, index, reduce) / totals[key][2]
            outgoing = self.units.outgoing(link)
            sums = outgoing.abs().sum(1, dtype=torch.float64).to(device)
            units = link.units.to(device)
            weighted += size * torch.zeros_like(weighted).index_add_(0, units, sums)
            outputs.index_add_(0, units, torch.full_like(sums, outgoing.shape[1]))
        new = weighted / outputs
        if self.utility == "adaptable":
            incoming = self.units.weight(hidden.layer).flatten(1).abs().double().mean(1).to(device)
            new = new / incoming.clamp(min=TINY)
        layer.utility = self.decay * layer.utility + (1 - self.decay) * new

    def _distance(
        self, kept: list[Tensor], mean: Tensor, hidden: HiddenUnits, index: int, reduce: Reduce | None
    ) -> Tensor:
        """Sum of ``|h - m|`` over the values of each unit, (D,)."""
        link = hidden.readers[index]
        units = link.units.to(mean.device)
        total = torch.zeros(len(units), dtype=torch.float64, device=mean.device)
        for value in kept:
            total += (value - mean[units].to(value)).abs().sum(0).double()
        by_unit = torch.zeros_like(mean).index_add_(0, units, total)
        return by_unit if reduce is None else reduce(by_unit)

    def _correction(self, layer: _Layer) -> Tensor:
        return (1.0 - self.decay**layer.age).clamp(min=TINY)

    def _lowest(self, layer: _Layer, eligible: Tensor, number: int) -> Tensor:
        """Indices of the eligible units of lowest utility; of equals the first."""
        utility = layer.utility / self._correction(layer)
        if not bool(torch.isfinite(utility).all()):
            return torch.zeros(0, dtype=torch.int64)  # the run has diverged: there is nothing to rank by
        utility = utility.where(eligible, math.inf)
        return utility.sort(stable=True).indices[: min(number, int(eligible.sum()))]

    def _replace(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        done = {name: units for name, units in chosen.items() if len(units)}
        for name, units in done.items():
            layer = self._layers[name]
            means = list(layer.mean / self._correction(layer)) if self.correct_bias else None
            self.units.reset(name, units, means)
            for tensor in (layer.age, layer.utility):
                tensor[units] = 0.0
            layer.mean[:, units] = 0.0
            layer.num_reset += len(units)
        return done

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs; tensors and plain Python."""
        layers = {
            name: {
                "age": layer.age.clone(),
                "utility": layer.utility.clone(),
                "mean": layer.mean.clone(),
                "accumulated": layer.accumulated,
                "num_reset": layer.num_reset,
            }
            for name, layer in self._layers.items()
        }
        return {"layers": layers, "units": self.units.state_dict(), "activations": self.activations.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off; layers that are no more, or of another size, start anew."""
        for name, saved in state["layers"].items():
            own = self._layers.get(name)
            if own is not None and own.mean.shape == saved["mean"].shape:
                tensors = {key: saved[key].clone() for key in ("age", "utility", "mean")}
                self._layers[name] = _Layer(**tensors, accumulated=saved["accumulated"], num_reset=saved["num_reset"])
        self.units.load_state_dict(state["units"])
        self.activations.load_state_dict(state["activations"])
