"""Applies a list of regularisers to a module and its optimizer; knows no Trainer.

Used the same way by the callback, by the mixin and by a training loop of one's own: run the step inside ``tapped``, add
``penalty`` to its loss, call ``add_gradients`` before and ``after_step`` after the optimizer's step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.nn import FeatureTaps, HiddenLayer, find_hidden_layers, named_layers, undisturbed
from lightning_plasticity.nn.batches import clone_batch, is_plain, join_batches
from lightning_plasticity.nn.raw_backward import noting_backward
from lightning_plasticity.regularization.base import Regularizer, check_names
from lightning_plasticity.regularization.initial_weights import InitialWeights

Run = Callable[[Any], object]
Reduce = Callable[[Tensor], Tensor]
Result = TypeVar("Result")
Live = Callable[[], Mapping[str, Any]]
Gather = Callable[[Sequence[Any]], Sequence[Any]]


class RegularizationEngine:
    """Regularisers of one module, with the counters and remembered minibatches that they need.

    Args:
        regularizers: what to apply.

    Attributes:
        num_steps: optimizer steps so far.
        initial_weights: what ``L2Init`` and ``Wasserstein`` compare with; ``clear()`` lets them start over.

    Raises:
        TypeError: for something that is not a ``Regularizer``.
    """

    def __init__(self, regularizers: Sequence[Regularizer]) -> None:
        self.regularizers = _checked(regularizers)
        self.num_steps = 0
        self._window: list[tuple[int, Any]] = []  # (optimizer steps taken before it was seen, minibatch)
        self._layers: dict[int, list[HiddenLayer]] = {}  # by position in ``regularizers``
        self._taps: FeatureTaps | None = None
        self.initial_weights = InitialWeights()
        self._warned: set[str] = set()

    # ---- loss penalties --------------------------------------------------------------------------------------------

    @contextmanager
    def tapped(self, module: nn.Module, run: Callable[[], object], live: Live = dict) -> Iterator[None]:
        """Record the hidden activations that penalties of this step need.

        Args:
            module: the network.
            run: runs the same step on copies of its arguments; called once, to find the hidden layers.
            live: gives the optimizers and schedulers that ``undisturbed`` must keep from stepping meanwhile.
        """
        wanted = [r for r in self._due() if r.needs_features]
        if not wanted:
            yield
            return
        layers = {layer.name: layer for r in wanted for layer in self._layers_of(r, module, run, live)}
        # A step that calls backward itself (an attack on its inputs) must not free the graphs that penalties need.
        with FeatureTaps(module, list(layers.values())) as taps, noting_backward([]):
            self._taps = taps
            try:
                yield
            finally:
                self._taps = None

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Sum of the penalties that are due, inside ``tapped``; None when there are none.

        Raises:
            ValueError: for a parameter whose shape is not that of its initial value.
        """
        total: Tensor | None = None
        due = [regularizer for regularizer in self._due() if regularizer.adds_to_loss]
        with _no_autocast(module) if due else nullcontext():
            for regularizer in due:
                own = self._penalty_of(regularizer, module)
                if own is not None:
                    total = own if total is None else total + own
        return total

    def _penalty_of(self, regularizer: Regularizer, module: nn.Module) -> Tensor | None:
        if regularizer.needs_references:
            return regularizer.drift(self.initial_weights.pairs(regularizer, self._key(regularizer), module))
        layers = self._layers.get(self.regularizers.index(regularizer), [])
        return regularizer.penalty(module, {} if self._taps is None else arranged(self._taps, layers))

    def hold_initial_weights(self, module: nn.Module) -> None:
        """Take the present weights as the initial ones, where none are held yet.

        Raises:
            ValueError: for a parameter whose shape is not that of its initial value.
        """
        for regularizer in self.regularizers:
            if regularizer.needs_references:
                self.initial_weights.pairs(regularizer, self._key(regularizer), module)

    def _key(self, regularizer: Regularizer) -> str:
        """The same for the regulariser that takes this one's place in the next fit."""
        alike = [other for other in self.regularizers if type(other) is type(regularizer)]
        return f"{type(regularizer).__name__}.{next(i for i, other in enumerate(alike) if other is regularizer)}"

    # ---- around the optimizer's step -------------------------------------------------------------------------------

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """What goes into ``.grad`` just before the optimizer's step."""
        parameters = list(parameters)
        for regularizer in self._due():
            regularizer.add_gradient(parameters)

    def remember(self, batch: Any) -> None:
        """Keep a minibatch for the next separate step; cloned, since a training step may change it."""
        if any(regularizer.takes_steps for regularizer in self.regularizers):
            self._window.append((self.num_steps, clone_batch(batch)))

    def after_step(
        self,
        module: nn.Module,
        run: Run,
        reduce: Reduce | None = None,
        live: Live = dict,
        gather: Gather | None = None,
    ) -> None:
        """Count an optimizer step, and take the separate steps that are due: each on the minibatches since its last.

        Args:
            module: the network.
            run: runs a forward pass on one batch (``module.training_step`` or ``module``).
            reduce: averages a gradient over processes.
            live: gives the optimizers and schedulers that ``undisturbed`` must keep from stepping meanwhile.
            gather: gives all processes' minibatches in return for one's own, the same to each.
        """
        self.num_steps += 1
        stepping = [r for r in self.regularizers if r.takes_steps]
        for regularizer in stepping:
            if self.num_steps % regularizer.every_n_steps == 0:
                seen = [batch for step, batch in self._window if step >= self.num_steps - regularizer.every_n_steps]
                self._separate_step(regularizer, module, seen if gather is None else gather(seen), run, reduce, live)
        oldest = min((self.num_steps - self.num_steps % r.every_n_steps for r in stepping), default=self.num_steps)
        self._window = [(step, batch) for step, batch in self._window if step >= oldest]

    def separate_steps(
        self, module: nn.Module, batches: Sequence[Any], run: Run, reduce: Reduce | None = None, live: Live = dict
    ) -> None:
        """Take every separate step once, now and on these minibatches; the counters and the schedule stay as they are.

        For training loops of one's own, say with the separate step before the minibatches. Arguments as in
        ``after_step``.
        """
        for regularizer in self.regularizers:
            if regularizer.takes_steps:
                self._separate_step(regularizer, module, batches, run, reduce, live)

    def _separate_step(
        self,
        regularizer: Regularizer,
        module: nn.Module,
        batches: Sequence[Any],
        run: Run,
        reduce: Reduce | None,
        live: Live,
    ) -> None:
        if not batches:
            return
        parameters = [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
        gradients = self._gradients(regularizer, module, parameters, batches, run, live)
        if reduce is not None:
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            gradients = [reduce(gradient) for gradient in filled]
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        if not all(bool(torch.isfinite(g).all()) for _, g in pairs):
            self._warn_once("the gradient of a separate step is not finite (NaN or inf in features?); it is left out.")
            return
        with torch.no_grad():
            for parameter, gradient in pairs:
                parameter.add_(gradient, alpha=regularizer.step_size)

    def _gradients(
        self,
        regularizer: Regularizer,
        module: nn.Module,
        parameters: list[nn.Parameter],
        batches: Sequence[Any],
        run: Run,
        live: Live,
    ) -> Sequence[Tensor | None]:
        layers = self._layers_of(regularizer, module, lambda: run(clone_batch(batches[0])), live)
        with (
            undisturbed(module, mode="as_is", seed=self.num_steps, draw=True, **live()),
            FeatureTaps(module, layers) as taps,
        ):
            features = replayed(batches, run, taps, layers)
            if not features:
                self._warn_once("no hidden layer was found to regularise; name some with layers=[...].")
                return [None] * len(parameters)
            objective = regularizer.step_objective(module, features)
            if objective is None or not objective.requires_grad:
                return [None] * len(parameters)
            return torch.autograd.grad(objective, parameters, allow_unused=True)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def begin_fit(self, module: nn.Module, regularizers: Sequence[Regularizer]) -> None:
        """Go on with the count of steps; the regularisers may be others now, and the layers are found anew.

        The minibatches of an earlier fit are forgotten: they may be another task's, or of another shape. The initial
        weights stay.

        Raises:
            TypeError: for something that is not a ``Regularizer``.
            ValueError: for unknown names of layers or parameters; it names those that exist.
        """
        self.regularizers = _checked(regularizers)
        self._window = []
        self._layers.clear()
        for regularizer in self.regularizers:
            if isinstance(regularizer.layers, list):
                named_layers(module, regularizer.layers)
            check_names(module, regularizer.params)

    def _due(self) -> list[Regularizer]:
        return [r for r in self.regularizers if self.num_steps % r.every_n_steps == 0]

    def _layers_of(
        self, regularizer: Regularizer, module: nn.Module, run: Callable[[], object], live: Live
    ) -> list[HiddenLayer]:
        """The regulariser's layers, found once."""
        index = self.regularizers.index(regularizer)
        if index not in self._layers:
            if isinstance(regularizer.layers, list):
                found = named_layers(module, regularizer.layers)
            else:
                found = _eagerly(lambda: _found_in(module, run, live))
                found = found if regularizer.layers is None else found[-regularizer.layers :]
            self._layers[index] = found
        return self._layers[index]

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"Regularisation: {what}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Counters, remembered minibatches and initial weights, for an exact resume."""
        window = list(self._window)
        if not is_plain(window):
            window = []
            self._warn_once(
                "a checkpoint cannot hold minibatches that are not made of tensors, tuples, lists and dicts "
                f"(here: {type(self._window[-1][1]).__name__}); a run resumed from it starts with no minibatches "
                "remembered for the next separate step."
            )
        return {"num_steps": self.num_steps, "window": window, "initial_weights": self.initial_weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off."""
        self.num_steps = int(state["num_steps"])
        self._window = list(state["window"])
        self.initial_weights.load_state_dict(state.get("initial_weights", {}))


def _found_in(module: nn.Module, run: Callable[[], object], live: Live) -> list[HiddenLayer]:
    with undisturbed(module, draw=True, **live()):
        return find_hidden_layers(module, run)


def _eagerly(function: Callable[[], Result]) -> Result:
    """Call a function outside of compiled code, where the training step that it is called from is compiled."""
    if "torch._dynamo" not in sys.modules:
        return function()
    outside: Callable[[], Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return outside()


def _checked(regularizers: Sequence[Regularizer]) -> list[Regularizer]:
    for regularizer in regularizers:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"Got {regularizer!r} among the regularizers, "
                "expected instances such as EffectiveRank(1e-2) or L2(1e-4)."
            )
    return list(regularizers)


def _no_autocast(module: nn.Module) -> torch.autocast:
    """Penalties are computed in float32 under mixed precision."""
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return torch.autocast(device, enabled=False)


def arranged(taps: FeatureTaps, layers: Sequence[HiddenLayer]) -> dict[str, Tensor]:
    """Activations by layer name, channels last."""
    features = taps.features
    return {layer.name: _channels_last(features[layer.name], layer) for layer in layers if layer.name in features}


def _channels_last(value: Tensor, layer: HiddenLayer) -> Tensor:
    default = 1 if value.ndim > 3 else -1  # as in ``as_feature_matrix``
    return value.movedim(default if layer.channel_dim is None else layer.channel_dim, -1) if value.ndim > 2 else value


def replayed(batches: Sequence[Any], run: Run, taps: FeatureTaps, layers: Sequence[HiddenLayer]) -> dict[str, Tensor]:
    """Activations on the minibatches, forwarded as one where they can be joined, else one after the other."""
    joined = join_batches(batches)
    if joined is not None:
        try:
            run(clone_batch(joined))
            return arranged(taps, layers)
        except Exception:  # the step wants its own batch size (carried state, say); what fails again below is raised
            taps.clear()
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        run(clone_batch(batch))
        for name, value in arranged(taps, layers).items():
            parts.setdefault(name, []).append(value)
        taps.clear()
    return {name: _stacked(values) for name, values in parts.items()}


def _stacked(values: list[Tensor]) -> Tensor:
    """One under the other; positions become samples where their number differs (sequences of different lengths)."""
    if len({value.shape[1:] for value in values}) > 1:
        values = [value.reshape(-1, value.shape[-1]) for value in values]
    return torch.cat(values)
