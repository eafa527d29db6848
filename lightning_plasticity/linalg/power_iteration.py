"""The largest singular value by power iteration, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_singular_value(matrix: Tensor, start: Tensor, num_iterations: int = 10, eps: float = 1e-12) -> Tensor:
    """sigma_1 of a matrix by power iteration from a start vector; the gradient flows through the iterations.

    A lower bound, up to rounding. A zero matrix gives 0 with a zero gradient.

    Args:
        matrix: (M, D).
        start: (M,), of any length but zero.
        num_iterations: each a product with the transpose and one with the matrix; there is one more at the end.
        eps: added to the norm of A A^T u before dividing by it; lowers the result by eps / sigma_1^2 of itself.

    Returns:
        ``|A^T u|``, a scalar tensor, with the last unit vector u.

    Raises:
        ValueError: when there is no iteration.

    Example:
        >>> import torch
        >>> from lightning_plasticity.linalg import largest_singular_value
        >>> largest_singular_value(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2))
        tensor(3.)
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations}, expected at least 1.")
    left = start
    for _ in range(num_iterations):
        image = matrix @ (matrix.mT @ left)
        left = image / (torch.linalg.vector_norm(image) + eps)
    sigma: Tensor = torch.linalg.vector_norm(matrix.mT @ left)
    return sigma
