"""The Hessian's outermost eigenpairs, each with its residual; whole spectra are in ``measure``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.hessian.arpack import ORDERS, ArpackIteration, Pairs, Which, best, subspace_size
from lightning_plasticity.curvature.hessian.operator import HessianOperator
from lightning_plasticity.curvature.hessian.problem import opened
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.measured import RESOLUTION, Measured, about_masks, dtype_name, finite
from lightning_plasticity.linalg.progress import part
from lightning_plasticity.nn import Mode
from lightning_plasticity.nn.masks import plain_names

DENSE_LIMIT = 200  # live coordinates up to which the whole matrix costs no more products than the iteration


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues and eigenvectors of a Hessian, and how far each is off.

    Attributes:
        values: (k,) float64; by magnitude or size descending, or ascending for ``which="smallest"``.
        vectors: (k, P) orthonormal rows, in the parameters' dtype and on their device; zero where a mask is.
        residuals: (k,) float64, ``|H v - value v|`` from one product each; an eigenvalue of H is within it of the
            value.
        converged: (k,) bool, residual within ``tol`` times the largest ``|eigenvalue|`` of H, or within rounding.
        num_products: Hessian-vector products spent, those for the residuals included.
        shapes: names and shapes of the parameters that the P coordinates are, in their order.
        num_samples: N, samples that the loss is a mean over.
        seconds: wall time spent.
        settings: dtype, mode and the like.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_products: int
    shapes: Mapping[str, torch.Size]
    num_samples: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def named(self, index: int) -> dict[str, Tensor]:
        """One eigenvector as views shaped like the parameters, by their names."""
        parts = torch.split(self.vectors[index], [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@part("eigenpairs")
def hessian_eigenpairs(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    k: int = 10,
    *,
    which: Which = "magnitude",
    params: str | Sequence[str] | None = None,
    tol: float = 1e-6,
    max_products: int = 1000,
    mode: Mode = "frozen",
    seed: int = 0,
) -> Eigenpairs:
    """The k outermost eigenpairs of the Hessian of the mean loss.

    The whole matrix where at most 200 coordinates have a nonzero row; else ARPACK's implicitly restarted Lanczos method
    (Lehoucq, Sorensen and Yang 1998), float64 outside of the products. One start vector sees one vector of each
    eigenspace, so ARPACK alone may return three copies of an eigenvalue that there are ten of (the last layer under a
    squared loss has each as often as it has outputs). It is therefore run again on the orthogonal complement of what
    was found, until nothing there comes before the last pair.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step.
        data: ``(inputs, targets)`` or an iterable of such pairs, which count as one loss on all samples.
        k: how many; all P when there are fewer (all active ones of a masked module, whose pairs are those of the
            Hessian on the active coordinates).
        which: the k largest by ``"magnitude"``, or the ``"largest"`` or ``"smallest"`` with their signs.
        params: names or wildcards of the parameters that count, e.g. ``"encoder.*"``; None for all trainable ones.
        tol: relative residual to stop at; with float32 products rounding is about 1e-6.
        max_products: the budget of products; a pass that has begun is finished, so ``num_products`` may be a little
            more.
        mode: ``"frozen"`` (BatchNorm and dropout off, by type), ``"as_is"`` or ``"eval"``.
        seed: of the start vector and of the random state during the measurement.

    Returns:
        The pairs, with residuals. Where the budget runs out they are the best found, and not ``converged``.

    Raises:
        MeasurementError: when something is not finite, or the loss depends on no trainable parameter.
        ValueError: for unknown settings.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import hessian_eigenpairs
        >>> inputs, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> found = hessian_eigenpairs(net, torch.nn.MSELoss(), (inputs, targets), k=1)
        >>> found.values, found.named(0)["weight"].abs()  # loss 1/2 (4 w1^2 + w2^2)
        (tensor([4.], dtype=torch.float64), tensor([[1., 0.]]))
    """
    _check_settings(k, which, tol, max_products)
    started = time.perf_counter()
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    parameters = measured.parameters()
    names = plain_names(model)
    with opened(measured, parameters, torch.Generator().manual_seed(seed), in_range=0) as problem:
        operator, live, num_samples = problem.operator, problem.live, problem.num_samples
        found, scale, method = _live_pairs(operator, live, k, which, tol, max_products, seed)
        dead = ~live if operator.active is None else operator.active & ~live
        vectors = _with_dead(found, live.cpu().numpy(), dead.cpu().numpy(), k, which).to(
            operator.device, operator.dtype
        )
        values, residuals = _measured(operator, vectors)
    scale = max(scale, float(values.abs().max()))
    order = torch.from_numpy(ORDERS[which][0](values.numpy())).sort(descending=True, stable=True).indices
    return Eigenpairs(
        values[order],
        vectors[order.to(vectors.device)],
        residuals[order],
        residuals[order] <= max(tol, 10 * RESOLUTION.get(operator.dtype, 1e-2)) * scale,
        operator.num_products,
        {names[parameter]: parameter.shape for parameter in parameters},
        num_samples,
        time.perf_counter() - started,
        {
            "dtype": dtype_name(operator.dtype),
            "mode": mode,
            "which": which,
            "method": method,
            "live_coordinates": int(live.sum()),
        }
        | about_masks(operator.active),
    )


def _live_pairs(
    operator: HessianOperator, live: Tensor, k: int, which: Which, tol: float, max_products: int, seed: int
) -> tuple[Pairs, float, str]:
    """At most k pairs on the live coordinates, a lower bound of the largest ``|eigenvalue|``, and the method."""
    size = int(live.sum())
    if size <= max(DENSE_LIMIT, subspace_size(k)):
        values, vectors = torch.linalg.eigh(finite(operator.dense(live)))
        top = float(values.abs().max()) if size else 0.0
        return best((values.cpu().numpy(), vectors.T.cpu().numpy()), k, which), top, "dense"
    iteration = ArpackIteration(operator, live, which, tol, max_products, seed)
    return iteration.run(k), iteration.scale, "arpack"


def _with_dead(found: Pairs, live: NDArray[np.bool_], zero: NDArray[np.bool_], k: int, which: Which) -> Tensor:
    """(k, P) the best of the live pairs and of the dead coordinates, which are eigenvectors of eigenvalue zero."""
    dead = np.flatnonzero(zero)[:k]
    vectors = np.zeros((len(found[0]) + len(dead), len(live)))
    vectors[: len(found[0]), live] = found[1]
    vectors[len(found[0]) + np.arange(len(dead)), dead] = 1.0
    values = np.concatenate([found[0], np.zeros(len(dead))])
    return torch.from_numpy(best((values, vectors), k, which)[1])


def _measured(operator: HessianOperator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients and residuals, (k,) float64, from one product with each vector."""
    values, residuals = [], []
    for vector in vectors:
        product, exact = finite(operator.matvec(vector)).double(), vector.double()
        values.append(torch.dot(exact, product) / torch.dot(exact, exact))
        residuals.append((product - values[-1] * exact).norm())
    return torch.stack(values).cpu(), torch.stack(residuals).cpu()


def _check_settings(k: int, which: str, tol: float, max_products: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}, expected at least one eigenpair.")
    if which not in ORDERS:
        raise ValueError(f"which={which!r}, expected one of {tuple(ORDERS)}.")
    if not 0 < tol < 1:
        raise ValueError(f"tol={tol}, expected a relative residual between 0 and 1, e.g. 1e-6.")
    if max_products < 1:
        raise ValueError(f"max_products={max_products}, expected at least 1; {subspace_size(k)} make one pass.")
