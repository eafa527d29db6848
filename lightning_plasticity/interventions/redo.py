"""ReDo: re-draw dormant units every so many steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.interventions.activations import ActivationMeans, Reduce, Totals, joined
from lightning_plasticity.interventions.initial import Init
from lightning_plasticity.interventions.unit_reset import UnitResets
from lightning_plasticity.linalg.units import scores_from_means
from lightning_plasticity.nn import Wiring


class ReDoEngine:
    """ReDo for a training loop of one's own; call ``step`` after each optimizer step.

    Source: Sokar et al. 2023 (arXiv 2302.12902, algorithm 1). A unit is tau-dormant when its mean ``|h|``, relative to
    the mean over its layer, is at most tau. It gets new incoming weights, bias 0 and outgoing weights 0. Means are
    taken over the last minibatches as training saw them, at least ``samples`` samples where there are so many.

    Args:
        module: the network.
        wiring: which layers, from ``find_wiring``.
        optimizers: of its parameters.
        tau: threshold, >= 0; 0 takes only dead units.
        every_n_steps: period in optimizer steps; None acts only in ``recycle``.
        samples: over how many samples dormancy is judged, on each process.
        init: distribution of new incoming weights, ``"default"`` or ``"kaiming"``.
        gain: for ``"kaiming"``.
        restart_steps: step counts of their own for re-drawn weights under Adam.
        seed: of the draws.
    """

    def __init__(
        self,
        module: nn.Module,
        wiring: Wiring,
        optimizers: Iterable[Optimizer] = (),
        *,
        tau: float = 0.1,
        every_n_steps: int | None = 1000,
        samples: int = 256,
        init: Init = "default",
        gain: float = math.sqrt(2.0),
        restart_steps: bool = True,
        seed: int = 0,
    ) -> None:
        self.wiring = wiring
        self.tau, self.every_n_steps, self.samples = tau, every_n_steps, samples
        self.units = UnitResets(
            module, wiring, optimizers, init=init, gain=gain, seed=seed, restart_steps=restart_steps
        )
        self.activations = ActivationMeans(module, wiring)
        self.num_steps = 0
        self.num_reset = dict.fromkeys(wiring.layers, 0)
        self._window: list[Totals] = []  # of the last steps
        self._sizes: list[int] = []  # samples in each

    def step(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Remember what training's forward passes showed since the last step; every n steps re-draw dormant units.

        Args:
            reduce: sums a tensor over processes.

        Returns:
            Indices of the re-drawn units by layer; empty where there were none.
        """
        self.num_steps += 1
        self._remember(self.activations.take())
        if self.every_n_steps is None or self.num_steps % self.every_n_steps:
            return {}
        return self.recycle(reduce)

    def recycle(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Re-draw the units that are dormant on the minibatches remembered; if there were any, statistics start anew.

        Arguments and result as in ``step``.
        """
        done = {}
        for name, units in self.dormant(reduce).items():
            if len(units):
                self.units.reset(name, units)
                self.num_reset[name] += len(units)
                done[name] = units
        if done:
            self._window.clear()
            self._sizes.clear()
        return done

    def _remember(self, totals: Totals) -> None:
        """Keep the last minibatches, as few as hold ``samples`` samples."""
        self._window.append(totals)
        self._sizes.append(max((int(total[3, 0]) for total in totals.values()), default=0))
        while len(self._sizes) > 1 and sum(self._sizes[1:]) >= self.samples:
            del self._sizes[0], self._window[0]

    def dormant(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Indices of the tau-dormant units by layer, on the minibatches remembered; empty before the first step.

        With several readers a unit is dormant when it is so for all of them.
        """
        totals: Totals = {}
        for step in self._window:
            for key, own in step.items():
                totals[key] = totals[key] + own if key in totals else own
        found = joined(totals, self.wiring, reduce)
        if found is None:
            return {}
        dormant = {}
        for name, layer in self.wiring.layers.items():
            scores = [scores_from_means(own[1] / own[2]) for own in (found[name, k] for k in range(len(layer.readers)))]
            dormant[name] = torch.stack([score <= self.tau for score in scores]).all(0).nonzero().reshape(-1)
        return dormant

    def close(self) -> None:
        """Remove all hooks."""
        self.activations.close()
        self.units.close()

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs; tensors and plain Python."""
        window = [[[*key, total.clone()] for key, total in totals.items()] for totals in self._window]
        return {
            "num_steps": self.num_steps,
            "num_reset": dict(self.num_reset),
            "window": window,
            "units": self.units.state_dict(),
            "activations": self.activations.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.num_steps = state["num_steps"]
        self.num_reset |= {name: number for name, number in state["num_reset"].items() if name in self.num_reset}
        device = next((self.units.weight(name).device for name in self.wiring.layers), torch.device("cpu"))
        self._window.clear()
        self._sizes.clear()
        for step in state["window"]:
            self._remember({(name, index): total.to(device) for name, index, total in step})
        self.units.load_state_dict(state["units"])
        self.activations.load_state_dict(state["activations"], device)
