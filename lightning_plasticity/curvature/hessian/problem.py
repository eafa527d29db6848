"""The Hessian of a module on its probe data, opened: an operator, and what one product with a Gaussian vector tells."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.hessian.operator import HessianOperator
from lightning_plasticity.curvature.hessian.range_space import RangeOperator, estimated_speedup, range_operator
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.curvature.loss.closure import Evaluation, LossClosure
from lightning_plasticity.curvature.loss.output_loss import batch_shares
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.memory import forward_only
from lightning_plasticity.curvature.samples import in_parts
from lightning_plasticity.linalg.lanczos import Matvec
from lightning_plasticity.nn.batches import join_batches
from lightning_plasticity.nn.precision import measured_in

MIN_SPEEDUP = 1.1  # from which the route through the Hessian's range is taken
MOSTLY_LIVE = 0.8  # share of live coordinates above which the vectors keep the dead ones, as zeros
# Relative. In 16 bits rounding makes up to 0.007 of it on small networks, a wrong double backward 0.26 and more.
MAX_ASYMMETRY = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
ROUNDING_MARGIN = 10.0  # products this many times as large as rounding have to be symmetric
SAME_LOSS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; batches may be joined or cut where it stays the same


@dataclass
class HessianProblem:
    """An operator inside the undisturbed context, and the first product with it.

    Attributes:
        operator: products in parameter space.
        probe: (P,) a Gaussian vector.
        product: (P,) the Hessian times it; exactly zero where the whole row is.
        measured: what the operator is of, in the batches that it is made from.
        num_samples: N.
        note: what the loss is, where that is not obvious.
        reduced: the same operator in the Hessian's own range, where that is cheaper.
    """

    operator: HessianOperator
    probe: Tensor
    product: Tensor
    measured: Measured
    num_samples: int
    note: str = ""
    reduced: RangeOperator | None = None

    @cached_property
    def live(self) -> Tensor:
        """(P,) bool: active coordinates whose rows are not exactly zero (dead units, constant inputs)."""
        return self.product != 0

    @cached_property
    def size(self) -> float:
        """Norm of the first product, which is about the Frobenius norm of the Hessian."""
        return float(self.product.norm())

    @cached_property
    def num_live(self) -> int:
        """How many coordinates are live."""
        return int(torch.count_nonzero(self.product))

    def on_live(self) -> tuple[Matvec, Tensor, Tensor | None]:
        """The operator on the live coordinates, the probe there, and the product with it.

        The dead ones are left out of the vectors where that saves more than it costs to move the others.
        """
        if self.operator.active is None and self.num_live > MOSTLY_LIVE * len(self.product):
            return self.operator.matvec, self.probe * self.live, self.product
        places = self.live.nonzero()[:, 0]
        whole = torch.zeros_like(self.probe)

        def matvec(vector: Tensor) -> Tensor:
            return self.operator.matvec(whole.index_copy_(0, places, vector)).index_select(0, places)

        return matvec, self.probe[places], self.product[places]

    def forget_vectors(self) -> None:
        """Free the probe and its product before the run needs the room."""
        _ = self.num_live, self.size
        self.probe = self.product = torch.empty(0)
        self.__dict__.pop("live", None)

    def check_symmetry(self, asymmetry: float) -> None:
        """Refuse an operator whose products are not those of a symmetric matrix.

        Args:
            asymmetry: relative to the operator; rounding for a Hessian, except where all of it is rounding.

        Raises:
            MeasurementError: when it is too large.
        """
        tolerance = MAX_ASYMMETRY.get(self.operator.dtype, math.inf)
        if asymmetry <= tolerance:
            return
        if any(self.size <= ROUNDING_MARGIN * rounding() for rounding in (self._nonlinearity, self._loss_rounding)):
            return
        raise MeasurementError(
            f"The Hessian-vector product is not symmetric (relative asymmetry {asymmetry:.2g}): a layer's double "
            "backward is wrong (a custom autograd.Function with once_differentiable, say) or the step changes weights. "
            "Define curvature_loss(batch) without it."
        )

    def _nonlinearity(self) -> float:
        """``|H(u + v) - H u - H v|`` for Gaussian u and v: rounding and nothing else, of a wrong double backward too.

        Of a layer whose own block vanishes (a bias before a batch norm, or of attention's keys) no product is more.
        """
        operator, reduced = self.operator, self.reduced
        generator = torch.Generator().manual_seed(0)
        pair = torch.randn(2, operator.num_params, generator=generator).to(operator.device, operator.dtype)
        u, v = pair if reduced is None else map(reduced.restrict, pair)
        matvec = operator.matvec if reduced is None else reduced.matvec
        return float((matvec(u + v) - matvec(u) - matvec(v)).norm())

    def _loss_rounding(self) -> float:
        """What rounding in the loss's second derivatives makes of a product: ``eps |J|^2 / N``, from one row of J^T.

        On an over-confident network that fits its data the Hessian is nothing else: p - p^2 is rounded once, and the
        products are linear in the same wrong matrix. In 16 bits this would excuse everything, so it is zero there.
        """
        eps, total = torch.finfo(self.operator.dtype).eps, 0.0
        if eps > torch.finfo(torch.float32).eps:
            return 0.0
        with self.measured.open() as closure:  # the graphs may be gone
            for index, batch in enumerate(self.measured.batches):
                evaluation = closure(batch, index)
                if evaluation.output_loss is None:
                    return 0.0
                outputs = evaluation.output_loss.outputs
                rows = torch.autograd.grad(
                    outputs, self.operator.parameters, torch.randn_like(outputs), allow_unused=True
                )
                total += sum(float(row.square().sum()) for row in rows if row is not None)
        return eps * total / self.num_samples


@contextmanager
def opened(
    measured: Measured,
    parameters: Sequence[nn.Parameter],
    generator: torch.Generator,
    *,
    chunk: int | None = None,
    in_range: int = 0,
    exact_limit: int = 0,
) -> Iterator[HessianProblem]:
    """The problem, inside the undisturbed context.

    Args:
        measured: what to measure on; its batches are joined where the loss stays the same.
        parameters: the coordinates.
        generator: of the probe.
        chunk: samples whose graph may be held at a time: products make graphs anew; None keeps all of them.
        in_range: products in which the route through the Hessian's range has to pay for itself; 0 for not taking it.
        exact_limit: live coordinates up to which products in parameter space are wanted all the same.
    """
    if chunk is None:
        measured = joined(measured)
        with measured.open() as closure:
            yield _kept(measured, closure, parameters, generator, in_range, exact_limit)
    else:
        with _rebuilt(cut(measured, chunk), parameters, generator) as problem:
            yield problem


def _kept(
    measured: Measured,
    closure: LossClosure,
    parameters: Sequence[nn.Parameter],
    generator: torch.Generator,
    in_range: int,
    exact_limit: int,
) -> HessianProblem:
    """On graphs that the operator alone keeps."""
    active = measured.active(parameters)
    look = in_range > 0 and active is None and len(measured.batches) == 1 and _only_linear(measured.module, parameters)
    with LayerTaps(measured.module) if look else nullcontext() as taps:
        evaluations = [closure(batch, index) for index, batch in enumerate(measured.batches)]
    losses = [evaluation.loss for evaluation in evaluations]
    operator = HessianOperator(losses, shares_of(evaluations), parameters, active)
    probe, product = operator.probe(generator)
    problem = HessianProblem(operator, probe, product, measured, *_about(evaluations))
    pays = taps is not None and estimated_speedup(taps, parameters, in_range) >= MIN_SPEEDUP
    if taps is not None and pays and problem.num_live > exact_limit:
        operator.forget()  # room for the bases
        problem.reduced = range_operator(losses[0], taps, parameters, probe, product)
        if problem.reduced is None:
            operator.remember(losses, shares_of(evaluations))
    return problem


@contextmanager
def _rebuilt(
    measured: Measured, parameters: Sequence[nn.Parameter], generator: torch.Generator
) -> Iterator[HessianProblem]:
    """On graphs that are made anew for every product, one batch after the other."""
    with measured.open() as closure:
        evaluations = [_forgotten(closure(batch, index)) for index, batch in enumerate(measured.batches)]
    shares = shares_of(evaluations)

    def losses() -> Generator[tuple[float, Tensor]]:
        # One context for all batches, as where graphs are kept: carried state and random draws are the same each time.
        with measured.open() as anew:
            for index, (share, batch) in enumerate(zip(shares, measured.batches, strict=True)):
                yield share, anew(batch, index).loss

    with measured.open():
        operator = HessianOperator.rebuilding(losses, parameters, measured.active(parameters))
        yield HessianProblem(operator, *operator.probe(generator), measured, *_about(evaluations))


def _about(evaluations: Sequence[Evaluation]) -> tuple[int, str]:
    return sum(evaluation.num_samples for evaluation in evaluations), evaluations[0].loss_note


def joined(measured: Measured) -> Measured:
    """All batches as one, where that changes nothing but the speed: the loss stays the same."""
    if len(measured.batches) == 1 or measured.mode == "as_is":  # batch statistics and random draws are per batch
        return measured
    try:
        whole = join_batches(measured.batches)
    except (RuntimeError, TypeError):
        return measured
    return measured if whole is None else _if_same(measured, [whole])


def cut(measured: Measured, size: int) -> Measured:
    """The batches in parts of at most ``size`` samples, where the loss stays the same; else as they are."""
    parts = in_parts(measured.batches, size)
    if len(parts) == len(measured.batches) or measured.mode == "as_is":
        return measured
    return _if_same(measured, parts)


def _if_same(measured: Measured, batches: list[Any]) -> Measured:
    """The other batches, if their losses add up to the same value; any failure keeps the old ones."""
    other = measured.with_batches(batches)
    try:
        before, after = _value(measured), _value(other)
    except Exception:  # a step may take batches of one size only
        return measured
    dtype = measured_in(next(parameter.dtype for parameter in measured.module.parameters()))
    return other if abs(before - after) <= SAME_LOSS.get(dtype, 1e-2) * abs(before) else measured


def _value(measured: Measured) -> float:
    with measured.open() as closure, forward_only():
        found = [_forgotten(closure(batch, index)) for index, batch in enumerate(measured.batches)]
    return sum(share * float(each.loss) for share, each in zip(shares_of(found), found, strict=True))


def _forgotten(evaluation: Evaluation) -> Evaluation:
    """The same evaluation without its graph."""
    loss = evaluation.output_loss
    free = None if loss is None else replace(loss, outputs=loss.outputs.detach())
    return replace(evaluation, loss=evaluation.loss.detach(), output_loss=free)


def shares_of(evaluations: Sequence[Evaluation]) -> list[float]:
    """What each batch's loss is multiplied by, so that they add up to the loss on all samples."""
    return batch_shares(
        [evaluation.output_loss for evaluation in evaluations], [evaluation.num_samples for evaluation in evaluations]
    )


def _only_linear(module: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    linear = {p for child in module.modules() if isinstance(child, nn.Linear) for p in child._parameters.values()}
    return all(parameter in linear for parameter in parameters)
