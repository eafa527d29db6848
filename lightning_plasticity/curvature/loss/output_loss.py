"""A loss seen as a function of the network's outputs, and a square root of its Hessian there.

The generalised Gauss-Newton matrix is G = J^T H_out J (Schraudolph 2002) with J the Jacobian of the outputs and H_out
the Hessian of the loss in them. A root S with S S^T = H_out gives its nonzero spectrum as that of the Gram matrix
S^T J J^T S. For softmax cross-entropy S has C - 1 columns a sample and no cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_plasticity.curvature.backward import differentiated_twice
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.loss.output_root import DenseRoot, DiagonalRoot, OutputRoot, SoftmaxRoot
from lightning_plasticity.nn.batches import map_tensors

MEASURE_THE_HESSIAN = "Measure the Hessian: hessian_spectrum(...), or quantities=('hessian',) of a monitor."
MAX_BLOCK_BYTES = 2**32  # second derivatives of a loss whose root is not known


@dataclass(frozen=True)
class OutputLoss:
    """One call ``function(outputs, targets, **options)`` with a scalar result.

    Attributes:
        function: the loss function; those of ``torch.nn.functional`` listed in ``CLOSED_FORMS`` get an exact root.
        outputs: (N, ...) outputs of the network, with their graph.
        targets: what ``function`` takes second.
        options: keyword arguments of the call.
    """

    function: Callable[..., Tensor]
    outputs: Tensor
    targets: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @property
    def name(self) -> str:
        """The loss function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def normaliser(self) -> float | None:
        """What a mean divides its sum by; 0 for a sum, None for a loss that is not known here."""
        reduction = self.options.get("reduction", "mean")
        if self.function not in NORMALISERS or reduction not in ("mean", "sum"):
            return None
        return NORMALISERS[self.function](self) if reduction == "mean" else 0.0

    def first(self, num_samples: int) -> OutputLoss:
        """The same loss on the first samples only (a mean over them, where the loss is a mean)."""
        total = self.num_samples
        if num_samples >= total:
            return self
        targets = map_tensors(self.targets, lambda part: part[:num_samples] if part.shape[:1] == (total,) else part)
        options = dict(self.options)
        weight = options.get("weight")
        if isinstance(weight, Tensor) and self.function is not F.cross_entropy and weight.ndim == self.outputs.ndim:
            options["weight"] = weight[:num_samples] if weight.shape[0] == total else weight
        return replace(self, outputs=self.outputs[:num_samples], targets=targets, options=options)

    def hessian_root(self) -> OutputRoot:
        """A root of the Hessian in the outputs, as an operator.

        Raises:
            MeasurementError: when the loss is not convex in the outputs, or mixes samples.
        """
        with torch.no_grad():
            closed = CLOSED_FORMS.get(self.function)
            root = closed(self) if closed is not None else None
        return _autograd_root(self) if root is None else root

    def gradient(self) -> Tensor:
        """(N, ...) float64 derivative in the outputs."""
        return _precisely(self, lambda dtype: _first_derivative(self, dtype)[1].detach()).double()

    def detached(self) -> OutputLoss:
        """The same loss without the outputs' graph."""
        return replace(self, outputs=self.outputs.detach())

    def value(self, outputs: Tensor) -> Tensor:
        """The loss at other outputs."""
        return self.function(outputs, self.targets, **self.options)

    def in_dtype(self, dtype: torch.dtype) -> OutputLoss:
        """The same loss with floating-point targets and options of this dtype; the outputs stay."""

        def cast(part: Tensor) -> Tensor:
            return part.to(dtype) if part.is_floating_point() else part

        return replace(self, targets=map_tensors(self.targets, cast), options=map_tensors(dict(self.options), cast))


def batch_shares(losses: Sequence[OutputLoss | None], sizes: Sequence[int] = ()) -> list[float]:
    """What to multiply the batches' losses by, so that they add up to the loss on all samples at once.

    Means are weighted by what they were divided by, sums are added; losses that are not known are taken as means over
    samples, of which ``sizes`` says how many.
    """
    sizes = sizes or [0 if loss is None else loss.num_samples for loss in losses]
    found = [None if loss is None else loss.normaliser for loss in losses]
    weights = [float(size) for size in sizes] if None in found else [weight for weight in found if weight is not None]
    if not any(weights):
        return [1.0] * len(weights)
    return [weight / sum(weights) for weight in weights]


def _cross_entropy_root(loss: OutputLoss) -> OutputRoot | None:
    outputs = loss.outputs
    _check_batched(loss)
    logits = outputs.reshape(outputs.shape[0], outputs.shape[1], -1).double()  # (N, C, T)
    weights = _cross_entropy_weights(loss).reshape(outputs.shape[0], -1)
    return SoftmaxRoot.of(outputs.shape, torch.softmax(logits, dim=1), weights)


def _check_batched(loss: OutputLoss) -> None:
    if loss.outputs.ndim < 2:
        raise MeasurementError(
            f"{loss.name} is called on outputs of shape {tuple(loss.outputs.shape)}, one sample without a batch "
            "dimension; add it with unsqueeze(0)."
        )


def _cross_entropy_weights(loss: OutputLoss) -> Tensor:
    """(N, ...) what multiplies diag(p) - p p^T at each position, the reduction included."""
    options, targets, num_classes = loss.options, loss.targets, loss.outputs.shape[1]
    smoothing = float(options.get("label_smoothing") or 0.0)
    class_weight = _class_weights(loss)
    if targets.is_floating_point():  # class probabilities
        probabilities = targets.double() * (1 - smoothing) + smoothing / num_classes
        omega = torch.einsum("nc...,c->n...", probabilities, class_weight)
    else:
        kept = targets != options.get("ignore_index", -100)
        omega = (1 - smoothing) * _target_weights(loss) + smoothing * class_weight.mean() * kept
    return omega / _cross_entropy_normaliser(loss) if options.get("reduction", "mean") == "mean" else omega


def _class_weights(loss: OutputLoss) -> Tensor:
    """(C,) float64."""
    weight = loss.options.get("weight")
    num_classes = loss.outputs.shape[min(1, loss.outputs.ndim - 1)]
    return torch.ones(num_classes, device=loss.outputs.device).double() if weight is None else weight.double()


def _target_weights(loss: OutputLoss) -> Tensor:
    """(N, ...) the class weight of each target, zero where it is ignored."""
    weights = _class_weights(loss)
    kept = loss.targets != loss.options.get("ignore_index", -100)
    own: Tensor = weights[loss.targets.clamp(0, len(weights) - 1)] * kept
    return own


def _cross_entropy_normaliser(loss: OutputLoss) -> float:
    if loss.targets.is_floating_point():  # class probabilities
        return float(loss.targets.numel() / len(_class_weights(loss)))
    return float(_target_weights(loss).sum())


def _num_entries(loss: OutputLoss) -> float:
    """Of outputs and targets broadcast together, as the losses do."""
    return float((loss.outputs.detach() - loss.targets).numel())


def _mse_normaliser(loss: OutputLoss) -> float:
    weight = loss.options.get("weight")
    return _num_entries(loss) if weight is None else float(weight.sum())


def _nll_root(loss: OutputLoss) -> OutputRoot | None:
    """On normalised log-probabilities the negative log-likelihood is a cross-entropy, and has the same GGN."""
    _check_batched(loss)
    total = torch.logsumexp(loss.outputs.double(), dim=1)
    if not torch.allclose(total, torch.zeros_like(total), atol=1e-3):
        raise MeasurementError(
            "nll_loss is called on values that are not log-probabilities (their exponentials do not sum to 1), so the "
            "loss has no curvature in them. Call cross_entropy on the logits, or define curvature_outputs(batch)."
        )
    return _cross_entropy_root(loss)


def _mse_root(loss: OutputLoss) -> OutputRoot | None:
    outputs = loss.outputs
    if loss.options.get("weight") is not None or outputs.shape != loss.targets.shape:
        return None
    scale = 2.0 / (outputs.numel() if loss.options.get("reduction", "mean") == "mean" else 1)
    return DiagonalRoot(
        outputs.shape, torch.full(outputs.shape, scale**0.5, dtype=torch.float64, device=outputs.device)
    )


def _bce_root(loss: OutputLoss) -> OutputRoot | None:
    outputs, options = loss.outputs, loss.options
    if outputs.shape != loss.targets.shape:
        return None
    p = torch.sigmoid(outputs.double())
    curvature = p * torch.sigmoid(-outputs.double())
    if options.get("pos_weight") is not None:
        curvature = curvature * (1 + (options["pos_weight"].double() - 1) * loss.targets.double())
    if options.get("weight") is not None:
        curvature = curvature * options["weight"].double()
    if options.get("reduction", "mean") == "mean":
        curvature = curvature / outputs.numel()
    return DiagonalRoot(outputs.shape, curvature.sqrt())


def _autograd_root(loss: OutputLoss) -> OutputRoot:
    """Any other twice differentiable loss: its block of second derivatives per sample, by double backward."""
    blocks = _precisely(loss, lambda dtype: _second_derivatives(loss, dtype))
    values, vectors = torch.linalg.eigh((0.5 * (blocks + blocks.transpose(1, 2))).double())
    slack, floor = _rounding(blocks)
    if float(values.min()) < -(slack * float(values.max()) + floor):
        raise MeasurementError(
            f"{loss.name} is not convex in the outputs (a second derivative is {float(values.min()):.3g}), so its GGN "
            f"is not positive semidefinite and has no square root. {MEASURE_THE_HESSIAN}"
        )
    columns: Tensor = vectors * values.clamp_min(0.0).sqrt()[:, None, :]  # (N, O, R)
    return DenseRoot(loss.outputs.shape, columns.permute(2, 0, 1).reshape(-1, *loss.outputs.shape))


def _precisely(loss: OutputLoss, derivative: Callable[[torch.dtype], Tensor]) -> Tensor:
    """In float64; where the loss holds tensors of its own, in the network's precision, in that."""
    with differentiated_twice(loss.name):
        try:
            return derivative(torch.float64)
        except MeasurementError:
            raise
        except RuntimeError:
            return derivative(loss.outputs.dtype)


def _first_derivative(loss: OutputLoss, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The outputs and the derivative in them, with its graph."""
    with torch.enable_grad():
        outputs = loss.outputs.detach().to(dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss.in_dtype(dtype).value(outputs), outputs, create_graph=True)
    return outputs, gradient


def _second_derivatives(loss: OutputLoss, dtype: torch.dtype) -> Tensor:
    """(N, O, O) blocks of second derivatives, computed in ``dtype``."""
    num_bytes = loss.num_samples * loss.outputs[0].numel() ** 2 * dtype.itemsize
    if num_bytes > MAX_BLOCK_BYTES:
        raise MeasurementError(
            f"The second derivatives of {loss.name} in outputs of shape {tuple(loss.outputs.shape)} take "
            f"{num_bytes / 2**30:.3g} GiB; the limit is {MAX_BLOCK_BYTES / 2**30:.3g} GiB. Pass fewer samples, or a "
            "loss whose root is known: cross_entropy, mse_loss, binary_cross_entropy_with_logits."
        )
    with torch.enable_grad():
        outputs, gradient = _first_derivative(loss, dtype)
        if not gradient.requires_grad:
            raise MeasurementError(
                f"{loss.name} is linear in the outputs, so the GGN, which holds its curvature in them alone, is zero. "
                f"{MEASURE_THE_HESSIAN}"
            )
        size = outputs[0].numel()
        rows = []
        for index in range(size):
            direction = torch.zeros(outputs.shape[0], size, dtype=dtype, device=outputs.device)
            direction[:, index] = 1.0
            (row,) = torch.autograd.grad(gradient, outputs, direction.reshape(outputs.shape), retain_graph=True)
            rows.append(row.reshape(outputs.shape[0], size))
        blocks = torch.stack(rows, dim=1)  # (N, O, O)
        _check_separable(gradient, outputs, blocks)
    return blocks


def _rounding(blocks: Tensor) -> tuple[float, float]:
    """Rounding of second derivatives: relative, and absolute (a saturated softmax is p - p^2 with p near 1, over N)."""
    eps = torch.finfo(blocks.dtype).eps
    return 1e3 * eps, 1e2 * eps / max(len(blocks), 1)


def _check_separable(gradient: Tensor, outputs: Tensor, blocks: Tensor) -> None:
    """A loss that mixes samples (contrastive, ranking) is not block diagonal: its blocks miss part of the Hessian."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(blocks.shape[:2], generator=generator, dtype=torch.float64).to(outputs.device, blocks.dtype)
    (product,) = torch.autograd.grad(gradient, outputs, direction.reshape(outputs.shape), retain_graph=True)
    expected = torch.einsum("nij,nj->ni", blocks, direction).reshape(outputs.shape)
    slack, floor = _rounding(blocks)
    if float((product - expected).abs().max()) > slack * float(product.abs().max()) + floor:
        raise MeasurementError(
            "The loss mixes samples (its second derivatives couple different rows of the outputs), so it has no "
            f"per-sample GGN. {MEASURE_THE_HESSIAN}"
        )


CLOSED_FORMS: dict[Callable[..., Any], Callable[[OutputLoss], OutputRoot | None]] = {
    F.cross_entropy: _cross_entropy_root,
    F.nll_loss: _nll_root,
    F.mse_loss: _mse_root,
    F.binary_cross_entropy_with_logits: _bce_root,
}
# What each of these divides by when it takes a mean.
NORMALISERS: dict[Callable[..., Any], Callable[[OutputLoss], float]] = {
    F.cross_entropy: _cross_entropy_normaliser,
    F.nll_loss: _cross_entropy_normaliser,
    F.mse_loss: _mse_normaliser,
    F.binary_cross_entropy_with_logits: _num_entries,
    F.huber_loss: _num_entries,
    F.smooth_l1_loss: _num_entries,
    F.poisson_nll_loss: _num_entries,
}
