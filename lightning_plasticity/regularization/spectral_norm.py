"""Regularisation of the largest singular value of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.linalg import largest_singular_value
from lightning_plasticity.regularization.base import (
    Regularizer,
    check_params,
    check_strength,
    chosen_parameters,
    in_full_precision,
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SCALES = ("weight", "scale", "gamma")  # what layers of normalisation call theirs


class SpectralNorm(Regularizer):
    """Add ``strength * [sum_W (sigma_1(W)^k - target)^2 + sum_b ||b||^e + sum_s ||s - 1||^e]`` to the loss.

    W: parameters of two and more dimensions, flattened to (outputs, the rest); s: the scales of layers of
    normalisation (their class name says "norm"); b: all other vectors, such as biases.

    Source: Lewandowski et al. 2024 (arXiv 2406.06811; ICLR 2025), with k = 2, target 1 and e = 2k, so that the largest
    singular values stay near one. Prakash et al. 2026 (arXiv 2509.22335) run ``target=2, bias_exponent=2, eps=1e-6``.
    sigma_1 is found by power iteration from fixed start vectors, the gradient flows through it, and no random state is
    touched. A weight that is exactly zero gets no gradient.

    Args:
        strength: >= 0; 1e-2 to 1e-4.
        k: exponent of the singular value, >= 1.
        target: what sigma_1^k is drawn to, >= 0.
        bias_exponent: e, >= 1; None for 2k.
        num_iterations: power iterations, each a product with W and one with its transpose; None for an exact singular
            value decomposition.
        params: names or wildcards of the parameters to regularise; None for all trainable ones.
        eps: added to norms in the power iteration.

    Raises:
        ValueError: for settings out of range; when a fit starts, for names that match nothing.

    Example:
        >>> import torch
        >>> from lightning_plasticity import SpectralNorm
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        >>> round(SpectralNorm(0.1).penalty(net, {}).item(), 4)  # 0.1 * (2^2 - 1)^2
        0.9
    """

    def __init__(
        self,
        strength: float = 1e-3,
        k: float = 2,
        target: float = 1.0,
        bias_exponent: float | None = None,
        num_iterations: int | None = 10,
        params: Sequence[str] | None = None,
        eps: float = 1e-12,
    ) -> None:
        self.strength = check_strength("strength", strength)
        self.target = check_strength("target", target)
        for name, exponent in (("k", k), ("bias_exponent", bias_exponent)):
            if exponent is not None and (isinstance(exponent, bool) or not 1 <= exponent < 100):
                raise ValueError(f"{name}={exponent!r}, expected a number of at least 1, such as 2.")
        if num_iterations is not None and (type(num_iterations) is not int or num_iterations < 1):
            raise ValueError(
                f"num_iterations={num_iterations!r}, expected a whole number >= 1, or None for an exact decomposition."
            )
        self.k = k
        self.bias_exponent = bias_exponent
        self.num_iterations = num_iterations
        self.params = check_params(params)
        self.eps = check_strength("eps", eps)
        self._starts: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def penalty(self, module: nn.Module, features: Mapping[str, Tensor]) -> Tensor | None:
        """The penalty, (); None when there is nothing to regularise."""
        if not self.strength:
            return None
        parts = list(self._parts(module))
        return self.strength * torch.stack(parts).sum() if parts else None

    def _parts(self, module: nn.Module) -> Iterator[Tensor]:
        exponent = 2 * self.k if self.bias_exponent is None else self.bias_exponent
        for name, parameter in chosen_parameters(module, self.params):
            path, _, own_name = name.rpartition(".")
            owner = _owner(module, path)
            value = in_full_precision(parameter)
            of_norm = "norm" in type(owner).__name__.lower()
            if of_norm and own_name in _SCALES:
                yield (value - 1).norm() ** exponent
            elif of_norm or value.ndim < 2:
                yield value.norm() ** exponent
            else:
                matrix = (value.movedim(1, 0) if isinstance(owner, _TRANSPOSED) else value).flatten(1)
                yield (self._sigma(matrix) ** self.k - self.target) ** 2

    def _sigma(self, matrix: Tensor) -> Tensor:
        if self.num_iterations is None:
            values: Tensor = torch.linalg.svdvals(matrix)
            return values[0]
        return largest_singular_value(matrix, self.start(matrix), self.num_iterations, self.eps)

    def start(self, matrix: Tensor) -> Tensor:
        """(M,) the fixed Gaussian start vector for a matrix (M, D): the same for all of so many rows."""
        key = (len(matrix), matrix.device, matrix.dtype)
        if key not in self._starts:
            generator = torch.Generator().manual_seed(0)
            self._starts[key] = torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(matrix)
        return self._starts[key]


def _owner(module: nn.Module, path: str) -> nn.Module:
    """The submodule; of a compiled one what is inside."""
    for part in path.split(".") if path else ():
        module = getattr(module, "_orig_mod", module)
        module = module.get_submodule(part)
    return getattr(module, "_orig_mod", module)
