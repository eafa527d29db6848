"""Measure a curvature spectrum of anything that a ``LossClosure`` can evaluate, undisturbed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.closure import Evaluation, LossClosure, LossFunction
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram import Gram, GramRows, assemble, collect_rows, disagreements
from lightning_plasticity.curvature.hessian import MAX_ASYMMETRY, HessianOperator
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.output_loss import OutputLoss, batch_shares
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg import stochastic_lanczos_quadrature
from lightning_plasticity.nn import Mode, undisturbed
from lightning_plasticity.nn.batches import clone_batch

Method = Literal["auto", "exact", "lanczos"]
METHODS = ("auto", "exact", "lanczos")
EXACT_LIMIT = 1000  # live coordinates up to which "auto" forms the whole Hessian
MAX_ROWS = 1500  # rows of the Gram matrix that a default measurement allows: half a second to decompose
LANCZOS_STEPS = 120
MAX_BASIS_BYTES = 2**31  # what the Lanczos basis of a measurement may take; with more parameters there are fewer steps
ROUNDING_MARGIN = 10.0  # products this many times as large as rounding have to be symmetric
# Rounding of one eigenvalue relative to the largest, by the dtype of the products.
RESOLUTION = {torch.float64: 1e-13, torch.float32: 1e-6}


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
    """

    module: nn.Module
    batches: Sequence[Any]
    loss_fn: LossFunction | None = None
    params: str | Sequence[str] | None = None
    mode: Mode = "frozen"
    seed: int = 0
    optimizers: Sequence[Any] = ()
    schedulers: Sequence[Any] = ()

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that count, each once.

        Raises:
            MeasurementError: when there is none.
            ValueError: when a pattern matches none.
        """
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not named:
            raise MeasurementError(
                f"{type(self.module).__name__} has no trainable parameter; curvature needs at least one with "
                "requires_grad."
            )
        if self.params is None:
            return [parameter for _, parameter in named]
        patterns = [self.params] if isinstance(self.params, str) else list(self.params)
        unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name, _ in named)]
        if unknown or not patterns:
            raise ValueError(
                f"params={unknown} match nothing; those that exist: {', '.join(name for name, _ in named)}."
            )
        return [p for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def __post_init__(self) -> None:
        """Refuse empty probe data here, once for all measurements."""
        if not self.batches:
            raise MeasurementError("There is no probe data: the loader or the data argument gave no batch.")

    @contextmanager
    def open(self) -> Iterator[LossClosure]:
        """The closure that evaluates the loss, inside the undisturbed context."""
        context = undisturbed(
            self.module, mode=self.mode, seed=self.seed, optimizers=self.optimizers, schedulers=self.schedulers
        )
        with context as collected:
            yield LossClosure(self.module, self.loss_fn, collected)


def measure_hessian(
    measured: Measured,
    *,
    method: Method = "auto",
    num_steps: int = LANCZOS_STEPS,
    exact_limit: int = EXACT_LIMIT,
    check_symmetry: bool = True,
) -> Spectrum:
    """The Hessian's spectrum; arguments as in ``hessian_spectrum``."""
    _check_method(method)
    started = time.perf_counter()
    parameters = measured.parameters()
    generator = torch.Generator().manual_seed(measured.seed)
    with measured.open() as closure:
        evaluations = _evaluate_all(measured, closure)
        total = sum(evaluation.num_samples for evaluation in evaluations)
        shares = batch_shares(
            [evaluation.output_loss for evaluation in evaluations],
            [evaluation.num_samples for evaluation in evaluations],
        )
        operator = HessianOperator([evaluation.loss for evaluation in evaluations], shares, parameters)
        if check_symmetry:
            _check_symmetry(operator, evaluations, generator)
        live = operator.live_coordinates(generator)
        num_live = int(live.sum())
        about: dict[str, Any] = {"matrix": "hessian", "num_samples": total}
        steps = _affordable_steps(num_steps, operator)
        exact = method == "exact" or (method == "auto" and num_live <= exact_limit) or num_live == 0
        if exact:
            quadrature = None
            values = torch.linalg.eigvalsh(_finite(operator.dense(live)))
        else:
            quadrature = stochastic_lanczos_quadrature(
                operator.matvec,
                operator.num_params,
                steps,
                generator=generator,
                mask=live,
                dtype=operator.dtype,
                device=operator.device,
            )
            values = torch.tensor(quadrature.nodes)
    top = float(values.abs().max()) if len(values) else 0.0
    about |= {
        "method": "exact" if exact else "lanczos",
        "num_products": operator.num_products,
        "seconds": time.perf_counter() - started,
        "resolution": RESOLUTION.get(operator.dtype, 1e-2) * top,
        "settings": {"dtype": _name(operator.dtype), "mode": measured.mode, "live_coordinates": num_live},
    }
    if note := evaluations[0].loss_note:
        about["settings"]["note"] = note
    if quadrature is None:
        return Spectrum.from_eigenvalues(values, operator.num_params, **about)
    about["settings"]["num_steps"] = len(values)
    if steps < num_steps:
        about["settings"]["num_steps_wanted"] = num_steps  # the basis had no room for them
    return Spectrum.from_quadrature(quadrature, operator.num_params, **about)


def measure_gram(measured: Measured, matrix: Literal["ggn", "ntk"], *, max_rows: int | None = None) -> Spectrum:
    """The GGN's or the NTK's exact spectrum; arguments as in ``ggn_spectrum``."""
    started = time.perf_counter()
    parameters = measured.parameters()
    excluded: set[nn.Module] = set()
    while True:
        with measured.open() as closure:
            rows = _gram_rows(measured, closure, matrix, parameters, max_rows, excluded)
            if not (torn := disagreements(rows.batches)):
                gram = assemble(rows.batches)
                break
        excluded |= torn
    values = torch.linalg.eigvalsh(_finite(gram.matrix)) / (gram.num_samples if matrix == "ntk" else 1)
    num_params = sum(parameter.numel() for parameter in parameters)
    values = values.clamp_min(0.0)[-num_params:]
    top = float(values.max()) if len(values) else 0.0
    dtype = max((rows.dtype, *(parameter.dtype for parameter in parameters)), key=lambda dtype: torch.finfo(dtype).eps)
    return Spectrum.from_eigenvalues(
        values,
        num_params,
        matrix=matrix,
        method="gram",
        num_samples=gram.num_samples,
        num_products=gram.num_backward,
        seconds=time.perf_counter() - started,
        resolution=RESOLUTION.get(dtype, 1e-2) * top,
        settings=_gram_settings(gram, measured, dtype, rows.note),
    )


@dataclass(frozen=True)
class _Rows:
    batches: list[GramRows]
    dtype: torch.dtype
    note: str


def _gram_rows(
    measured: Measured,
    closure: LossClosure,
    matrix: Literal["ggn", "ntk"],
    parameters: Sequence[nn.Parameter],
    max_rows: int | None,
    excluded: set[nn.Module],
) -> _Rows:
    """Rows of the first samples that fit, those of the GGN scaled so that batches add up to the loss on all of them."""
    batches: list[GramRows] = []
    losses: list[OutputLoss] = []
    rows_each = used = 0
    dtype, note = torch.float64, ""
    for index, batch in enumerate(measured.batches):
        with LayerTaps(measured.module) as taps:
            evaluation = closure(clone_batch(batch), index)  # a step may change its batch, and this may run twice
        loss, note = _require_outputs(evaluation), evaluation.note
        rows_each = max(rows_each, _columns_per_sample(loss, matrix))
        take = _affordable_samples(max_rows, rows_each, used, loss.num_samples)
        if take == 0:
            break
        losses.append(loss.first(take))
        columns = _columns(losses[-1], matrix)
        batches.append(collect_rows(loss.outputs, columns, taps, parameters, excluded))
        used, dtype = used + take, loss.outputs.dtype
        if max_rows is not None and (used + 1) * rows_each > max_rows:
            break
    if matrix == "ggn":
        shares = batch_shares(losses, [batch.num_samples for batch in batches])
        for rows, share in zip(batches, shares, strict=True):
            rows.scale(share**0.5)
    return _Rows(batches, dtype, note)


def _affordable_steps(num_steps: int, operator: HessianOperator) -> int:
    """As many of the steps as the basis has room for, and at least two; the record says how many."""
    room = MAX_BASIS_BYTES // (operator.num_params * operator.dtype.itemsize)
    return min(num_steps, max(room, 2))


def _gram_settings(gram: Gram, measured: Measured, dtype: torch.dtype, note: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": _name(dtype), "mode": measured.mode, "rows": len(gram.matrix)}
    if gram.general:
        names = {parameter: name for name, parameter in measured.module.named_parameters()}
        settings["general_route"] = [names[parameter] for parameter in gram.general]
    if note:
        settings["note"] = note
    return settings


def _columns_per_sample(loss: OutputLoss, matrix: str) -> int:
    """How many Gram rows one sample costs, at most."""
    size = loss.outputs[0].numel()
    if matrix == "ggn" and loss.name in ("cross_entropy", "nll_loss") and loss.outputs.ndim >= 2:
        return size - size // loss.outputs.shape[1]
    return size


def _columns(loss: OutputLoss, matrix: str) -> Tensor:
    """(R, N, ...) output directions: of the GGN scaled by the loss's curvature, of the NTK the unit vectors."""
    if matrix == "ggn":
        return loss.hessian_factor()
    size = loss.outputs[0].numel()
    units = torch.eye(size, dtype=torch.float64, device=loss.outputs.device)[:, None, :]
    return units.expand(size, loss.num_samples, size).reshape(size, *loss.outputs.shape).clone()


def _affordable_samples(max_rows: int | None, rows_each: int, used: int, offered: int) -> int:
    """How many of the offered samples fit beside those in use.

    Raises:
        MeasurementError: when not even one does.
    """
    if max_rows is None:
        return offered
    if rows_each > max_rows and not used:
        raise MeasurementError(
            f"One sample has {rows_each} Gram rows (one for each output that counts), more than max_rows={max_rows}. "
            f"Pass max_rows={rows_each} or more, or measure the Hessian only: quantities=('hessian',)."
        )
    return max(0, min(offered, max_rows // max(1, rows_each) - used))


def _evaluate_all(measured: Measured, closure: LossClosure) -> list[Evaluation]:
    return [closure(batch, index) for index, batch in enumerate(measured.batches)]


def _require_outputs(evaluation: Evaluation) -> OutputLoss:
    if evaluation.output_loss is None:
        raise MeasurementError(evaluation.note)
    return evaluation.output_loss


def _check_symmetry(operator: HessianOperator, evaluations: Sequence[Evaluation], generator: torch.Generator) -> None:
    asymmetry, size = operator.asymmetry(generator)
    if asymmetry > MAX_ASYMMETRY and size > ROUNDING_MARGIN * _rounding(operator, evaluations):
        raise MeasurementError(
            f"The Hessian-vector product is not symmetric (relative asymmetry {asymmetry:.2g}): a layer's double "
            "backward is wrong (a custom autograd.Function with once_differentiable, say) or the step changes weights. "
            "Define curvature_loss(batch) without it."
        )


def _rounding(operator: HessianOperator, evaluations: Sequence[Evaluation]) -> float:
    """What rounding in the loss's second derivatives makes of a product: eps |J|^2 / N, from one random row of J^T.

    On an over-confident network that fits its data the Hessian is nothing else.
    """
    total = 0.0
    for evaluation in evaluations:
        if evaluation.output_loss is None:
            return 0.0
        outputs = evaluation.output_loss.outputs
        rows = torch.autograd.grad(
            outputs, operator.parameters, torch.randn_like(outputs), retain_graph=True, allow_unused=True
        )
        total += sum(float(row.square().sum()) for row in rows if row is not None)
    return torch.finfo(operator.dtype).eps * total / sum(evaluation.num_samples for evaluation in evaluations)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r}, expected one of {METHODS}.")


def _finite(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise MeasurementError("The curvature matrix holds NaN or inf; look for them in weights, data and loss.")
    return matrix


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
