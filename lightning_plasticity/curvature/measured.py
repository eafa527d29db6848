"""What a curvature spectrum is measured on, and the small things that all measurements share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.loss.closure import DEFAULT_OBJECTIVE, Evaluation, LossClosure, LossFunction
from lightning_plasticity.curvature.loss.output_loss import OutputLoss
from lightning_plasticity.curvature.samples import first_samples
from lightning_plasticity.linalg.progress import announce
from lightning_plasticity.nn import Mode, undisturbed
from lightning_plasticity.nn.batches import batch_size
from lightning_plasticity.nn.masks import active_entries, plain_names

Result = TypeVar("Result")
# Rounding of one eigenvalue relative to the largest, by the dtype of the products.
RESOLUTION = {torch.float64: 1e-13, torch.float32: 1e-6}
LONG_ROWS = 2000  # from which a decomposition takes half a second and more


@dataclass(frozen=True)
class Measured:
    """What to measure on: a module, its batches and how the loss is found.

    Attributes:
        module: any module, run as it is.
        batches: the probe data, already on the module's device.
        loss_fn: ``loss_fn(outputs, targets)``, or None to use the module's own hooks or training step.
        params: names or wildcards of the parameters that count; None for all trainable ones.
        mode: what BatchNorm and dropout do, see ``undisturbed``.
        seed: of the random state during the measurement, and of the probes.
        optimizers: live optimizers of a manually optimised module.
        schedulers: their schedulers.
        objective: which of the module's own losses, see ``LossClosure``.
    """

    module: nn.Module
    batches: Sequence[Any]
    loss_fn: LossFunction | None = None
    params: str | Sequence[str] | None = None
    mode: Mode = "frozen"
    seed: int = 0
    optimizers: Sequence[Any] = ()
    schedulers: Sequence[Any] = ()
    objective: str = DEFAULT_OBJECTIVE

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that count, each once; masked weights answer to their plain names (``net.0.weight``) too.

        Raises:
            MeasurementError: when there is none.
            ValueError: when a pattern matches none.
        """
        plain = plain_names(self.module)
        named = [
            ((name, plain[p]), p)
            for name, p in self.module.named_parameters()
            if p.requires_grad and p.is_floating_point()
        ]
        if not named:
            raise MeasurementError(
                f"{type(self.module).__name__} has no trainable parameter; curvature needs at least one with "
                "requires_grad."
            )
        if self.params is None:
            return [parameter for _, parameter in named]
        patterns = [self.params] if isinstance(self.params, str) else list(self.params)
        unknown = [pattern for pattern in patterns if not any(_matches(names, [pattern]) for names, _ in named)]
        if unknown or not patterns:
            raise ValueError(
                f"params={unknown} match nothing; those that exist: {', '.join(name for (_, name), _ in named)}."
            )
        return [p for names, p in named if _matches(names, patterns)]

    def active(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """(P,) bool, the coordinates that no mask switches off; None where none of the parameters has a mask.

        Raises:
            MeasurementError: when masks leave nothing.
        """
        masks = active_entries(self.module)
        if not any(parameter in masks for parameter in parameters):
            return None
        parts = [
            masks[p].flatten() if p in masks else torch.ones(p.numel(), dtype=torch.bool, device=p.device)
            for p in parameters
        ]
        active = torch.cat(parts)
        if not bool(active.any()):
            raise MeasurementError(
                f"All {len(active)} coordinates are masked: there is no active weight to measure. Choose other params."
            )
        return active

    def with_batches(self, batches: Sequence[Any]) -> Measured:
        """The same on other data."""
        return replace(self, batches=batches)

    def first(self, limit: int) -> Measured:
        """The same on the first samples only."""
        return self.with_batches(first_samples(self.batches, limit))

    def __post_init__(self) -> None:
        """Refuse empty probe data here, once for all measurements."""
        if not self.batches:
            raise MeasurementError("There is no probe data: the loader or the data argument gave no batch.")

    @contextmanager
    def open(self) -> Iterator[LossClosure]:
        """The closure that evaluates the loss, inside the undisturbed context."""
        context = undisturbed(
            self.module,
            mode=self.mode,
            seed=self.seed,
            full_precision=True,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
        )
        with context as collected:
            yield LossClosure(self.module, self.loss_fn, collected, self.objective)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def num_active(parameters: Collection[nn.Parameter], active: Tensor | None) -> int:
    """k, the coordinates of a curvature matrix: active entries where there are masks, else all P."""
    if active is None:
        return sum(parameter.numel() for parameter in parameters)
    return int(torch.count_nonzero(active))


def about_masks(active: Tensor | None) -> dict[str, int]:
    """What a record says of masks: how many coordinates they switch off; nothing where there are none."""
    return {} if active is None else {"masked_params": len(active) - int(torch.count_nonzero(active))}


def require_outputs(evaluation: Evaluation) -> OutputLoss:
    """The loss as a function of outputs; a ``MeasurementError`` says why there is none."""
    if evaluation.output_loss is None:
        raise MeasurementError(evaluation.note)
    return evaluation.output_loss


def finite(matrix: Tensor) -> Tensor:
    """The matrix itself; a ``MeasurementError`` where it is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        raise MeasurementError("The curvature matrix holds NaN or inf; look for them in weights, data and loss.")
    return matrix


def announce_eigenvalues(num_rows: int) -> None:
    """Before a decomposition that may take long: nothing can be counted in it."""
    if num_rows >= LONG_ROWS:
        announce(f"eigenvalues of {num_rows} rows")


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` and the like."""
    return str(dtype).removeprefix("torch.")


def on_few(
    measured: Measured, sizes: Sequence[int], function: Callable[[Measured], Result]
) -> tuple[list[Result], bool]:
    """A function of the first few samples, for several such sizes; and whether that has shown that batches can be cut.

    Where it fails, it is tried once on the whole first batch, and what it raises there is raised: a step may take
    batches of its own size only, or all of the few samples be ignored by the loss.
    """
    try:
        found = [function(measured.first(size)) for size in sizes]
    except Exception:
        return [function(measured.with_batches(measured.batches[:1]))], False
    whole = set(accumulate(batch_size(batch) for batch in measured.batches))
    return found, any(size not in whole and size < max(whole) for size in sizes)
