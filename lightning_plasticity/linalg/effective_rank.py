"""The effective rank of a feature matrix, with a gradient that is safe to train on."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_plasticity.linalg.feature_matrix import check_feature_matrix
from lightning_plasticity.linalg.functionals import check_nonnegative

# Up to this size of min(N, D), a float64 eigendecomposition of the Gram matrix is faster than a float32 SVD on CPU and
# its gradient is about 60 times more accurate; beyond, the SVD wins.
_MAX_GRAM_SIZE = 256


def effective_rank(matrix: Tensor, *, log_offset: float = 0.0) -> Tensor:
    r"""Effective rank of a matrix; differentiable once.

    ``E = exp(-sum_i p_i log(p_i + o))`` with ``p_i = sigma_i / sum_j sigma_j`` and the offset ``o = log_offset``; Roy
    and Vetterli 2007 (EUSIPCO) with ``o = 0``. The code behind Prakash et al. 2026, "Spectral Collapse Drives Loss of
    Plasticity in Deep Continual Learning" (arXiv 2509.22335), trains on ``o = 1e-8`` (and bounds the sum of the sigma
    below by 1e-8, which is left out here because it breaks the invariance to scale). E is between 1 and min(N, D).

    **Gradient.** ``dE/dF = sum_i (dE/dsigma_i) u_i v_i^T`` over the singular values above a tolerance ``tol``, with
    ``dE/dsigma_i = (E / sum sigma) (g_i - sum_j p_j g_j)`` and ``g_i = -log(p_i + o) - p_i / (p_i + o)``; for ``o = 0``
    that is ``-(E / sum sigma) (log p_i + log E)``. It scales as ``1 / ||F||``.

    **Singular values at or below tol count as zero,** in the value and in the gradient, since their singular vectors
    are rounding noise. At a zero singular value E has no unique slope; leaving the direction out is the choice of
    minimum norm. An *all-zero matrix* has the value 0 and a gradient of exactly 0: the same on every process, never
    noise blown up by ``1 / ||F||``. Little is lost, because no gradient passes a ReLU whose units are all dead;
    reviving such a layer is the work of a reset. A matrix of rank one has a zero gradient too: exact collapse is a
    fixed point.

    **Precision,** after scaling by the largest entry, so that features of size 1e-20 are no special case:

    - float64: SVD in float64; ``tol = max(N, D) * eps64 * sigma_1``, NumPy's bound on the noise of an SVD.
    - float32 and half precision, min(N, D) <= 256: float64 eigendecomposition of the smaller Gram matrix;
      ``tol = 2 * sqrt(max(N, D)) * eps32 * sigma_1``. That is 16 times the noise of the Gram route itself,
      ``sqrt(max(N, D) * eps64) * sigma_1``, and above the rounding noise of float32 data, a few ``eps32 * sigma_1``.
    - the same, larger: SVD in float32; ``tol = max(N, D) * eps32 * sigma_1``. On collapsed features, where all rows are
      alike, rounding errors add up instead of cancelling: up to a quarter of this tol was measured at 600 x 1000. Real
      singular values of that size are lost; pass float64 where they matter.

    Autocast is switched off inside. Under float16 the gradient of very small features may overflow; pass ``.float()``
    features and a float32 graph where that matters.

    Args:
        matrix: F, ``(N, D)``, N samples of D features.
        log_offset: o, not negative; 0 is the textbook quantity.

    Returns:
        ``()`` in the dtype of ``matrix``, float32 for half precision. 0 for an all-zero matrix. If an entry is not
        finite, the value and the whole gradient are NaN.

    Raises:
        TypeError: If the dtype is not floating point.
        ValueError: If ``matrix`` is not a matrix or is empty, or ``log_offset`` is negative.
        RuntimeError: On differentiating a second time.

    Example:
        >>> import torch
        >>> features = torch.diag(torch.tensor([1.0, 1.0, 0.0])).requires_grad_()
        >>> rank = effective_rank(features)
        >>> round(rank.item(), 6)
        2.0
        >>> rank.backward()
        >>> bool(features.grad.abs().max() < 1e-6)  # two equal singular values: a maximum on their plane
        True
    """
    check_feature_matrix(matrix)
    check_nonnegative("log_offset", log_offset)
    with torch.autocast(device_type=matrix.device.type, enabled=False):
        if matrix.dtype not in (torch.float32, torch.float64):
            matrix = matrix.float()
        return cast(Tensor, _EffectiveRank.apply(matrix, log_offset))


class _EffectiveRank(torch.autograd.Function):
    """The gradient is formed in the forward pass: one matrix is kept instead of all singular vectors."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, log_offset: float) -> Tensor:
        """Value, and the gradient if somebody may ask for it."""
        value, gradient = _value_and_gradient(matrix, log_offset, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient.to(matrix.dtype), matrix)
        return value.to(matrix.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Scale the stored gradient."""
        gradient, matrix = ctx.saved_tensors
        return cast(Tensor, _OnlyOnce.apply(grad_output, gradient, matrix)), None


class _OnlyOnce(torch.autograd.Function):
    """The scaled gradient, tied to the matrix so that a second derivative raises.

    PyTorch's ``once_differentiable`` takes the gradient for a constant when ``grad_output`` needs no gradient itself,
    as after ``loss.backward(create_graph=True)``: the term would be missing from a Hessian, and nobody would know.
    """

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, gradient: Tensor, matrix: Tensor) -> Tensor:
        """The matrix is there for the graph only."""
        return grad_output * gradient

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:
        """Refuse."""
        raise RuntimeError(
            "effective_rank was differentiated twice; expected once. "
            "Leave it out of a loss whose Hessian is measured, or build it from torch.linalg.svdvals."
        )


def _value_and_gradient(matrix: Tensor, log_offset: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """E, (), and dE/dF, (N, D)."""
    scale = matrix.abs().max()
    if scale == 0 or not torch.isfinite(scale):  # not left to the decompositions, which raise on NaN
        fill = 0.0 if scale == 0 else math.nan
        return matrix.new_full((), fill), torch.full_like(matrix, fill) if with_gradient else None
    use_gram = matrix.dtype != torch.float64 and min(matrix.shape) <= _MAX_GRAM_SIZE
    # In float64 the scaling is exact even where float32 entries are subnormal.
    scaled = matrix.double() / scale.double() if use_gram else matrix / scale
    if use_gram:
        left = scaled.shape[0] <= scaled.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(scaled @ scaled.T if left else scaled.T @ scaled)
        sigma = eigenvalues.clamp(min=0.0).sqrt()
    elif with_gradient:
        u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
    else:
        sigma = torch.linalg.svdvals(scaled)

    kept = sigma > _tolerance(matrix, use_gram) * sigma.max()
    value, slopes = _entropy_and_slopes(sigma.double().where(kept, 0.0), log_offset)
    if not with_gradient:
        return value, None
    slopes = slopes.where(kept, 0.0)
    if use_gram:  # u_i v_i^T = u_i u_i^T F / sigma_i, or F v_i v_i^T / sigma_i: only one side is ever computed
        projector = (vectors * (slopes / sigma.where(kept, 1.0))) @ vectors.T
        gradient = projector @ scaled if left else scaled @ projector
    else:
        gradient = (u * slopes.to(u.dtype)) @ vh
    return value, gradient.double() / scale.double()


def _entropy_and_slopes(sigma: Tensor, log_offset: float) -> tuple[Tensor, Tensor]:
    """E, (), and dE/dsigma, (q,); the slope at a zero singular value is left undefined."""
    total = sigma.sum()
    p = sigma / total
    value = torch.exp(-torch.xlogy(p, p + log_offset).sum())
    g = -torch.log(p + log_offset) - p / (p + log_offset)
    mean = (p * g).where(p > 0, 0.0).sum()
    return value, value / total * (g - mean)


def _tolerance(matrix: Tensor, use_gram: bool) -> float:
    """Relative size up to which a singular value is rounding noise; derived in ``effective_rank``."""
    size, eps = max(matrix.shape), torch.finfo(matrix.dtype).eps
    return (2.0 * math.sqrt(size) if use_gram else size) * eps
