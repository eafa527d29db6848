"""Find out which loss function a training step calls, and on what, by watching it run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.loss.output_loss import OutputLoss

# Losses whose first argument is what the network puts out, before any squashing.
WATCHED: tuple[Callable[..., Any], ...] = (
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.binary_cross_entropy_with_logits,
    F.smooth_l1_loss,
    F.huber_loss,
    F.poisson_nll_loss,
)


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function and its result."""

    loss: OutputLoss
    result: Tensor


class LossWatcher(TorchFunctionMode):
    """Context that records every call of a known loss function on differentiable outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call; remember it when it is a loss."""
        result = func(*args, **(kwargs or {}))
        if func in WATCHED:
            self._record(func, inspect.signature(func).bind(*args, **(kwargs or {})), result)
        return result

    def _record(self, func: Callable[..., Any], bound: inspect.BoundArguments, result: Any) -> None:
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        outputs, targets = arguments.pop("input"), arguments.pop("target")
        legacy = [arguments.pop(name, None) for name in ("size_average", "reduce")]
        if any(value is not None for value in legacy) or not isinstance(outputs, Tensor) or not outputs.requires_grad:
            return
        self.calls.append(LossCall(OutputLoss(func, outputs, targets, arguments), result))


def explain(loss: Tensor, calls: list[LossCall]) -> tuple[OutputLoss | None, str]:
    """Which of the watched calls is ``loss``; a note when none is, when it is only a part, or when several fit."""
    own = [call for call in calls if _matches(loss, call)]
    same = {(call.loss.function, id(call.loss.outputs), id(call.loss.targets)) for call in own}
    if len(same) == 1:
        return _with_reduction(loss, own[0]), ""
    names = ", ".join(call.loss.name for call in calls)
    how = "Define curvature_outputs(batch) -> (outputs, targets) on the module, or pass loss_fn."
    if not calls:
        known = ", ".join(sorted(function.__name__ for function in WATCHED))
        return None, f"The training step calls no loss function that is known here ({known}). {how}"
    if len(own) > 1 or len(calls) > 1:
        return None, f"The training step calls several loss functions ({names}); which one to take is unclear. {how}"
    if calls[0].result.ndim:
        return None, f"The training step reduces {names} in a way that is not a mean or a sum. {how}"
    note = (
        f"The training step's loss is not just the value of its {names}: the GGN is that of the {names} alone. {how} "
        f"(loss {float(loss.detach()):.6g}, {names} {float(calls[0].result.detach()):.6g})"
    )
    return calls[0].loss, note


def over_nothing(calls: list[LossCall]) -> str:
    """Which of the watched calls takes a mean over nothing; empty when none does."""
    for call in (call.loss for call in calls):
        if call.outputs.numel() == 0:
            return (
                f"{call.name} is called on no values: outputs of shape {tuple(call.outputs.shape)}. Give probe data "
                "that the step keeps some samples of, with data=, or return None where there are none."
            )
        ignored = call.options.get("ignore_index")
        if ignored is not None and isinstance(call.targets, Tensor) and bool((call.targets == ignored).all()):
            return (
                f"every target on the probe data is ignored (ignore_index={ignored}), so {call.name} is a mean over "
                "nothing. Give probe data with targets, with data=."
            )
    return ""


def _matches(loss: Tensor, call: LossCall) -> bool:
    return any(_close(loss, reduced) for reduced in _reductions(call).values())


def _reductions(call: LossCall) -> dict[str, Tensor]:
    """What the function itself makes of its reductions: its mean is a weighted one where it takes weights."""
    if call.result.ndim == 0:
        return {str(call.loss.options.get("reduction", "mean")): call.result}
    with torch.no_grad():
        return {name: _reduced(call.loss, name).value(call.loss.outputs) for name in ("mean", "sum")}


def _reduced(loss: OutputLoss, reduction: str) -> OutputLoss:
    return replace(loss, options=dict(loss.options) | {"reduction": reduction})


def _with_reduction(loss: Tensor, call: LossCall) -> OutputLoss:
    """The call as it was, or with the mean or sum that the step took by hand."""
    if call.result.ndim == 0:
        return call.loss
    reduction = next(name for name, value in _reductions(call).items() if _close(loss, value))
    return _reduced(call.loss, reduction)


def _close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left.detach().double(), right.detach().double(), rtol=1e-6, atol=0.0)
