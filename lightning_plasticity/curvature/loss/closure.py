"""The loss of a module on a batch: from the user's hook, a loss function, or the module's own training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.loss.output_loss import OutputLoss
from lightning_plasticity.curvature.loss.watch import LossCall, LossWatcher, explain, over_nothing
from lightning_plasticity.nn.batches import batch_size, clone_batch
from lightning_plasticity.nn.precision import match_precision
from lightning_plasticity.nn.raw_backward import noting_backward

LossFunction = Callable[[Any, Any], Tensor]
DEFAULT_OBJECTIVE = "curvature"


@dataclass(frozen=True)
class Evaluation:
    """A module's loss on one batch, with its graph.

    Attributes:
        loss: () mean loss over the batch.
        num_samples: N, size of the batch.
        output_loss: the loss as a function of the outputs, which GGN and NTK need; None when it could not be found.
        note: why it could not be found, or what it leaves out.
        loss_note: what the loss is, where that is not obvious.
    """

    loss: Tensor
    num_samples: int
    output_loss: OutputLoss | None
    note: str = ""
    loss_note: str = ""


class LossClosure:
    """Evaluates a module's loss; call it inside ``undisturbed``.

    In order of preference: the module's ``curvature_loss(batch)``; ``loss_fn`` on ``(inputs, targets)`` batches; the
    module's ``training_step``. Outputs and targets come from ``curvature_outputs(batch)`` where the module has it, else
    from watching which loss function runs.

    Args:
        module: any module.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``.
        collected: the list that ``undisturbed`` yields, where a manually optimised step leaves its losses.
        objective: which of the module's losses, for one that has several: ``<objective>_loss(batch)`` and
            ``<objective>_outputs(batch)`` take the place of ``curvature_loss`` and ``curvature_outputs``.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        collected: list[Tensor] | None = None,
        objective: str = DEFAULT_OBJECTIVE,
    ) -> None:
        self.module = module
        self.loss_fn = loss_fn
        self.objective = objective
        self._collected = [] if collected is None else collected
        self._raw: list[Tensor] = []  # what the step called backward on
        self._outputs: Any = None

    def __call__(self, batch: Any, index: int = 0) -> Evaluation:
        """Evaluate on a batch.

        Raises:
            MeasurementError: when there is no loss, or it is not finite, or does not depend on a trainable parameter.
        """
        batch = match_precision(self.module, batch)
        with LossWatcher() as watcher:
            loss = self._loss(batch, index)
        _check_loss(loss, watcher.calls)
        output_loss, note = explain(loss, watcher.calls)
        if hasattr(self.module, f"{self.objective}_outputs"):
            output_loss, note = self._named_outputs(batch, watcher)
        elif note and (plain := self._plain_outputs(batch)) is not None:
            output_loss, note = plain, ""
        num_samples = output_loss.num_samples if output_loss is not None else batch_size(batch)
        return Evaluation(loss, num_samples, output_loss, note, self._loss_note())

    def loss(self, batch: Any, index: int = 0) -> Tensor:
        """Only the loss, (), finite or not: for those who descend on it.

        Raises:
            MeasurementError: when there is no loss, or it does not depend on a trainable parameter.
        """
        loss = self._loss(match_precision(self.module, batch), index)
        _check_gradient(loss)
        return loss

    @property
    def num_losses(self) -> int:
        """How many losses the last step gave, several where ``manual_backward`` took several."""
        return max(1, len(self._collected))

    def _loss_note(self) -> str:
        if len(self._collected) < 2:
            return ""
        return (
            "The loss measured is the sum of all that the step gives to manual_backward (or calls backward on); define "
            f"curvature_loss(batch) on the module to name one ({len(self._collected)} losses)."
        )

    def run(self, batch: Any, index: int = 0) -> Any:
        """Only run the forward pass, for those who watch its activations; any loss will do, or none: what there is."""
        returned, _ = self._run(match_precision(self.module, batch), index)
        return list(self._collected) or returned

    def _loss(self, batch: Any, index: int) -> Tensor:
        returned, source = self._run(batch, index)
        if not self._collected and returned is None:
            self._collected[:] = self._raw
        self._raw.clear()
        if self._collected:
            return torch.stack([_as_loss(loss, source) for loss in self._collected]).sum()
        return _as_loss(returned, source)

    def _run(self, batch: Any, index: int) -> tuple[Any, str]:
        """What the preferred source of the loss returned, and its name."""
        batch = clone_batch(batch)  # a step may change its batch, and batches are evaluated more than once
        self._outputs = None
        self._collected.clear()
        self._raw.clear()
        name = f"{self.objective}_loss"
        own_loss: Any = getattr(self.module, name, None)
        if own_loss is not None:
            return own_loss(batch), name
        if self.objective != DEFAULT_OBJECTIVE:
            raise MeasurementError(missing_objective(self.module, self.objective))
        if self.loss_fn is not None:
            inputs, targets = as_pair(batch)
            self._outputs = call_model(self.module, inputs)
            return self.loss_fn(self._outputs, targets), "loss_fn"
        if not hasattr(self.module, "training_step"):
            raise MeasurementError(
                f"{type(self.module).__name__} has no training_step; pass loss_fn, e.g. "
                "torch.nn.functional.cross_entropy."
            )
        step: Any = self.module.training_step
        with noting_backward(self._raw):
            return step(*step_arguments(step, batch, index)), "training_step"

    def _plain_outputs(self, batch: Any) -> OutputLoss | None:
        """``loss_fn`` on the module's own outputs; None where it was not what ran, or takes no tensor."""
        if self.loss_fn is None or not isinstance(self._outputs, Tensor):
            return None
        return OutputLoss(self.loss_fn, self._outputs, as_pair(batch)[1])

    def _named_outputs(self, batch: Any, watcher: LossWatcher) -> tuple[OutputLoss | None, str]:
        name = f"{self.objective}_outputs"
        outputs, targets = getattr(self.module, name)(batch)
        if self.loss_fn is not None:
            return OutputLoss(self.loss_fn, outputs, targets), ""
        functions = {call.loss.function: call.loss for call in watcher.calls}
        if len(functions) != 1:
            found = ", ".join(loss.name for loss in functions.values()) or "none"
            return None, f"{name} names the outputs but not the loss (found: {found}); pass loss_fn too."
        known = next(iter(functions.values()))
        return OutputLoss(known.function, outputs, targets, known.options), ""


def missing_objective(module: nn.Module, objective: str) -> str:
    """What to say of a module without such a loss."""
    return (
        f"objective={objective!r} needs a method {objective}_loss(batch) on {type(module).__name__}, which has none; "
        f"define it, and {objective}_outputs(batch) -> (outputs, targets) for the GGN and the NTK."
    )


def as_pair(batch: Any) -> tuple[Any, Any]:
    """``(inputs, targets)``.

    Raises:
        MeasurementError: when the batch is not a pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise MeasurementError(
        f"loss_fn needs batches (inputs, targets), got {type(batch).__name__}"
        f"{f' of {len(batch)} items' if isinstance(batch, tuple | list) else ''}; "
        "define curvature_loss(batch) on the module instead."
    )


def call_model(module: nn.Module, inputs: Any) -> Any:
    """``module(inputs)``; a tuple is spread over positional arguments, a mapping over keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def step_arguments(step: Callable[..., Any], batch: Any, index: int) -> tuple[Any, ...]:
    """The batch, and the batch and dataloader indices where the step takes them."""
    parameters = list(inspect.signature(step).parameters.values())
    names = [parameter.name for parameter in parameters]
    if "dataloader_iter" in names:
        raise MeasurementError(
            "training_step takes a dataloader_iter, so it cannot be run on a probe batch; define curvature_loss(batch)."
        )
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return (batch, index)
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
    return (batch, index, 0)[: max(1, min(len(positional), 3))]


def _as_loss(returned: Any, source: str) -> Tensor:
    if isinstance(returned, Mapping):
        returned = returned.get("loss")
    if returned is None:
        raise MeasurementError(
            f"{source} returned no loss on the probe batch; return a tensor or a dict with 'loss', or define "
            "curvature_loss(batch)."
        )
    if not isinstance(returned, Tensor) or returned.numel() != 1:
        shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise MeasurementError(f"{source} returned {shape}, expected a scalar loss; reduce it with .mean().")
    return returned.reshape(())


def _check_loss(loss: Tensor, calls: list[LossCall]) -> None:
    if not bool(torch.isfinite(loss)):
        value = float(loss.detach())
        if why := over_nothing(calls):
            raise MeasurementError(f"The loss on the probe data is {value}: {why}")
        raise MeasurementError(f"The loss on the probe data is {value}; look for NaN or inf in weights and data.")
    _check_gradient(loss)


def _check_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise MeasurementError(
            "The loss does not depend on any trainable parameter: all are frozen, or the step computes it under "
            "no_grad, through .item() or .detach(). Unfreeze a parameter, or define curvature_loss(batch)."
        )
