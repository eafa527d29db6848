"""Applies a list of regularisers to a module and its optimizer; knows no Trainer.

Used the same way by the callback, by the mixin and by a training loop of one's own: run the step inside ``tapped``, add
``penalty`` to its loss, call ``add_gradients`` before and ``after_step`` after the optimizer's step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.nn import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers, undisturbed
from lightning_plasticity.nn.batches import clone_batch, is_plain, join_batches
from lightning_plasticity.regularization.base import Regularizer

Run = Callable[[Any], object]
Reduce = Callable[[Tensor], Tensor]


class RegularizationEngine:
    """Regularisers of one module, with the counters and remembered minibatches that they need.

    Args:
        regularizers: what to apply.

    Raises:
        TypeError: for something that is not a ``Regularizer``.
    """

    def __init__(self, regularizers: Sequence[Regularizer]) -> None:
        for regularizer in regularizers:
            if not isinstance(regularizer, Regularizer):
                raise TypeError(
                    f"Got {regularizer!r} among the regularizers, expected instances such as EffectiveRank(1e-2) or L2(1e-4)."
                )
        self.regularizers = list(regularizers)
        self.num_steps = 0
        self._window: list[Any] = []
        self._layers: dict[int, list[HiddenLayer]] = {}
        self._taps: FeatureTaps | None = None
        self._warned = False

    # ---- loss penalties --------------------------------------------------------------------------------------------

    @contextmanager
    def tapped(self, module: nn.Module, batch: Any, run: Run) -> Iterator[None]:
        """Record the hidden activations that penalties of this step need."""
        wanted = [r for r in self._due() if r.needs_features and not r.takes_steps]
        if not wanted:
            yield
            return
        layers = {layer.name: layer for r in wanted for layer in self._layers_of(r, module, batch, run)}
        with FeatureTaps(module, list(layers.values())) as taps:
            self._taps = taps
            try:
                yield
            finally:
                self._taps = None

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Sum of the penalties that are due, inside ``tapped``; None when there are none."""
        features = {} if self._taps is None else self._taps.features
        total: Tensor | None = None
        for regularizer in self._due():
            own = regularizer.penalty(module, self._own(regularizer, features))
            if own is not None:
                total = own if total is None else total + own
        return total

    # ---- around the optimizer's step -------------------------------------------------------------------------------

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """What goes into ``.grad`` just before the optimizer's step."""
        parameters = list(parameters)
        for regularizer in self._due():
            regularizer.add_gradient(parameters)

    def remember(self, batch: Any) -> None:
        """Keep a minibatch for the next separate step; cloned, since a training step may change it."""
        if any(regularizer.takes_steps for regularizer in self.regularizers):
            self._window.append(clone_batch(batch))

    def after_step(self, module: nn.Module, run: Run, reduce: Reduce | None = None, **context: Any) -> None:
        """Count an optimizer step, and take the separate steps that are due.

        Args:
            module: the network.
            run: runs a forward pass on one batch (``module.training_step`` or ``module``).
            reduce: averages a gradient over processes.
            context: optimizers and schedulers for ``undisturbed``.
        """
        self.num_steps += 1
        stepping = [r for r in self.regularizers if r.takes_steps]
        for regularizer in stepping:
            if self.num_steps % regularizer.every_n_steps == 0 and self._window:
                self._separate_step(regularizer, module, run, reduce, context)
        if stepping and self.num_steps % max(r.every_n_steps for r in stepping) == 0:
            self._window.clear()

    def _separate_step(
        self, regularizer: Regularizer, module: nn.Module, run: Run, reduce: Reduce | None, context: dict[str, Any]
    ) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
        gradients = self._gradients(regularizer, module, parameters, run, context)
        if reduce is not None:
            gradients = [reduce(torch.zeros_like(p) if g is None else g) for p, g in zip(parameters, gradients, strict=True)]
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        if not all(bool(torch.isfinite(g).all()) for _, g in pairs):
            self._warn_once("the effective-rank gradient is not finite (NaN or inf in features); its steps are left out.")
            return
        with torch.no_grad():
            for parameter, gradient in pairs:
                parameter.add_(gradient, alpha=regularizer.step_size)

    def _gradients(
        self,
        regularizer: Regularizer,
        module: nn.Module,
        parameters: list[nn.Parameter],
        run: Run,
        context: dict[str, Any],
    ) -> Sequence[Tensor | None]:
        layers = self._layers_of(regularizer, module, self._window[0], run)
        with undisturbed(module, mode="as_is", seed=self.num_steps, **context), FeatureTaps(module, layers) as taps:
            self._replay(run, taps)
            if not taps.features:
                self._warn_once("no hidden layer was found to regularise; name some with layers=[...].")
                return [None] * len(parameters)
            objective = regularizer.step_objective(module, taps.features)
            if objective is None or not objective.requires_grad:
                return [None] * len(parameters)
            return torch.autograd.grad(objective, parameters, allow_unused=True)

    def _replay(self, run: Run, taps: FeatureTaps) -> None:
        """Forward the remembered minibatches as one where they can be joined, else one after the other."""
        joined = join_batches(self._window)
        if joined is not None:
            try:
                run(joined)
                return
            except Exception:  # the step wants its own batch size (carried state, say)
                taps.clear()
        for batch in self._window:
            run(batch)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def check_layers(self, module: nn.Module) -> None:
        """Refuse unknown layer names before training starts.

        Raises:
            ValueError: naming those that exist.
        """
        for regularizer in self.regularizers:
            if isinstance(regularizer.layers, list):
                named_layers(module, regularizer.layers)

    def _due(self) -> list[Regularizer]:
        return [r for r in self.regularizers if r.takes_steps or self.num_steps % r.every_n_steps == 0]

    def _own(self, regularizer: Regularizer, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [layer.name for layer in self._layers.get(id(regularizer), [])]
        return {name: features[name] for name in names if name in features}

    def _layers_of(self, regularizer: Regularizer, module: nn.Module, batch: Any, run: Run) -> list[HiddenLayer]:
        """The regulariser's layers, found once."""
        if id(regularizer) not in self._layers:
            if isinstance(regularizer.layers, list):
                found = named_layers(module, regularizer.layers)
            else:
                with undisturbed(module):
                    found = find_hidden_layers(module, lambda: run(batch))
                found = found if regularizer.layers is None else found[-regularizer.layers :]
            self._layers[id(regularizer)] = found
        return self._layers[id(regularizer)]

    def _warn_once(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"Regularisation: {what}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Counters and remembered minibatches (those made of plain tensors), for an exact resume."""
        window = self._window if is_plain(self._window) else []
        return {"num_steps": self.num_steps, "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.num_steps = int(state["num_steps"])
        self._window = list(state["window"])
