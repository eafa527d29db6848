"""Sparse training: exchange a few active entries of masked weights for others, with what optimizers know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.interventions.initial import fresh_rows
from lightning_plasticity.interventions.optimizer_state import FLAT, StepCounts, fill, forget
from lightning_plasticity.nn import is_measuring
from lightning_plasticity.nn.masked_layers import masks_of, stored
from lightning_plasticity.nn.wiring import unit_count
from lightning_plasticity.sparsity.rules import Method, exchanged, fraction_at

Reduce = Callable[[Tensor], Tensor]
GrownInit = Literal["zero", "default"]
GROWN_INITS = ("zero", "default")


class SparseTopologyEngine:
    """SET and RigL for a training loop of one's own: ``begin`` before the forward pass, ``step`` after the optimizer's.

    ``exchanged`` has the rules. The dense gradient that RigL ranks by is that of the loss for the weight that the layer
    uses, summed over the passes since ``begin`` (which under gradient accumulation is called before each, and adds up),
    and over processes. The paper skips the optimizer's step at an update; here it is taken first.

    Dropped entries are set to zero, grown ones to zero or a new draw, and optimizers forget both.

    Args:
        layers: masked layers by name, see ``sparsify``.
        optimizers: of their parameters.
        method: ``"static"`` never updates.
        every_n_steps: period in optimizer steps; None updates only when told to.
        drop_fraction: share of each layer's active entries to exchange, in [0, 1].
        end_step: no updates from this optimizer step on; None for no end.
        init: of grown entries: ``"zero"``, or ``"default"``, the layer's own initial distribution.
        restart_steps: step counts of their own for grown entries under Adam.
        seed: of the draws.

    Attributes:
        num_steps: optimizer steps so far.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        optimizers: Iterable[Optimizer] = (),
        *,
        method: Method = "rigl",
        every_n_steps: int | None = 100,
        drop_fraction: float = 0.3,
        end_step: int | None = None,
        init: GrownInit = "zero",
        restart_steps: bool = True,
        seed: int = 0,
    ) -> None:
        self.layers = dict(layers)
        if plain := [name for name, layer in self.layers.items() if "weight" not in masks_of(layer)]:
            raise ValueError(f"{', '.join(plain)} have no masks, expected masked layers; call sparsify first.")
        self.optimizers = list(optimizers)
        self.method, self.every_n_steps = method, every_n_steps
        self.drop_fraction, self.end_step, self.init = drop_fraction, end_step, init
        self.generator = Generator().manual_seed(seed)
        self.num_steps = 0
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._counts: StepCounts | None = None
        if restart_steps and method != "static":
            self._counts = StepCounts({name: stored(layer) for name, layer in self.layers.items()})
            self._counts.attach(self.optimizers)

    @property
    def due(self) -> bool:
        """Whether the next step is one to update after."""
        return self.every_n_steps is not None and (self.num_steps + 1) % self.every_n_steps == 0

    def begin(self, update: bool | None = None) -> None:
        """Record dense gradients of the passes from here on, where an update is to follow and needs them.

        Args:
            update: whether one follows; None goes by the period.
        """
        wanted = self.due if update is None else update
        if self.method == "rigl" and wanted and self._fraction() > 0 and not self._handles:
            self._handles = [
                masks_of(layer)["weight"].register_forward_hook(partial(self._tap, name))
                for name, layer in self.layers.items()
            ]

    def pause(self) -> None:
        """Do not record until ``begin``; what has been recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self, reduce: Reduce | None = None, update: bool | None = None) -> dict[str, int]:
        """Count an optimizer step, and update the masks if it is time.

        Args:
            reduce: sums a tensor over processes.
            update: whether it is; None goes by the period.

        Returns:
            Number of exchanged entries by layer; empty where it was not the time.
        """
        wanted = self.due if update is None else update
        self.pause()
        self.num_steps += 1
        done = self.exchange(reduce) if wanted and self.method != "static" else {}
        self._gradients.clear()
        return done

    @torch.no_grad()
    def exchange(self, reduce: Reduce | None = None) -> dict[str, int]:
        """Update the masks now; under RigL by the gradients recorded since ``begin``.

        Returns:
            Number of exchanged entries by layer.
        """
        fraction = self._fraction()
        if not fraction:
            return {}
        return {name: self._exchange(name, layer, fraction, reduce) for name, layer in self.layers.items()}

    def close(self) -> None:
        """Remove all hooks."""
        self.pause()
        if self._counts is not None:
            self._counts.detach()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _fraction(self) -> float:
        return fraction_at(self.num_steps, self.drop_fraction, self.end_step, self.method)

    def _exchange(self, name: str, layer: nn.Module, fraction: float, reduce: Reduce | None) -> int:
        weight, mask = stored(layer), masks_of(layer)["weight"].mask
        gradient = None
        if self.method == "rigl":
            gradient = self._gradients.pop(name, None)
            gradient = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if gradient is None else gradient
            gradient = gradient if reduce is None else reduce(gradient)
        dropped, grown = exchanged(weight, mask, fraction, gradient, self.generator)
        if not len(grown):
            return 0
        fill(mask, FLAT, dropped, False)
        fill(mask, FLAT, grown, True)
        fill(weight, FLAT, dropped, 0.0)
        if self.init == "zero":
            fill(weight, FLAT, grown, 0.0)
        else:
            fresh = fresh_rows(layer, torch.arange(unit_count(layer)), self.generator)
            weight[torch.unravel_index(grown, weight.shape)] = fresh.flatten()[grown]
        forget(self.optimizers, weight, FLAT, torch.cat([dropped, grown]))
        if self._counts is not None:
            self._counts.release(weight, dropped)
            self._counts.restart(self.optimizers, weight, FLAT, grown)
        return len(grown)

    def _tap(self, name: str, mask: nn.Module, args: Any, weight: Tensor) -> None:
        if weight.requires_grad and not is_measuring():
            weight.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]

    def _add(self, name: str, gradient: Tensor) -> None:
        before = self._gradients.get(name)
        gradient = gradient.detach().to(_wide(gradient.dtype))
        self._gradients[name] = gradient.clone() if before is None else before + gradient

    def state_dict(self) -> dict[str, Any]:
        """The generator and all counts; masks are in the module's own."""
        counts = {} if self._counts is None else self._counts.state_dict()
        return {"generator": self.generator.get_state(), "num_steps": self.num_steps, "steps": counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.generator.set_state(state["generator"].cpu())
        self.num_steps = int(state["num_steps"])
        if self._counts is not None:
            self._counts.load_state_dict(state["steps"])
            self._counts.attach(self.optimizers)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
