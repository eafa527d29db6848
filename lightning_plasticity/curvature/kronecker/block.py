"""One Kronecker block A x B: its spectrum from the eigenvalues of its two factors, products formed only when asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_plasticity.linalg import Estimate, effective_rank_of

# Rounding of one eigenvalue relative to the largest, by the dtype that the network ran in.
RESOLUTION = {torch.float64: 1e-13, torch.float32: 1e-6}
# Quotients and products this close to a threshold are decided by the product itself, not by the quotient.
_TIE = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """The curvature of one layer as A x B, with D inputs (the bias is one) and O outputs; D O eigenvalues a_i b_j.

    Source: Martens and Grosse 2015 (arXiv 1503.05671). With singular values sigma_i of the layer's N x D feature matrix
    (ones appended for the bias), a_i = sigma_i^2 / N: the rank of A is the rank of the features, and the rank, the
    trace, the Frobenius norm and the effective rank of the block are those of A times those of B.

    Attributes:
        name: the layer.
        parameters: names of the parameters that the layer's blocks cover.
        input_factor: A, (D, D) float64, mean over samples and positions of abar abar^T.
        output_factor: B, (O, O) float64, of the gradients at the layer's output, summed over positions.
        num_positions: T, positions (pixels, tokens) that share the weights; 1 for a plain linear layer.
        group: which group of a grouped convolution this is; None for other layers.
        source: who computed them and which B it is, e.g. ``"backpack:kflr"``.
        dtype: what the network ran in; rounding is judged by it.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import KroneckerBlock
        >>> a, b = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 0.0]))
        >>> block = KroneckerBlock("net.0", ("net.0.weight",), a.double(), b.double())
        >>> block.eigenvalues()
        tensor([0., 0., 2., 6.], dtype=torch.float64)
        >>> block.epsilon_rank(3.0).value, block.rank, block.trace().value
        (1.0, 2, 8.0)
    """

    name: str
    parameters: tuple[str, ...]
    input_factor: Tensor
    output_factor: Tensor
    num_positions: int = 1
    group: int | None = None
    source: str = ""
    dtype: torch.dtype = torch.float64

    @cached_property
    def input_eigenvalues(self) -> Tensor:
        """a, (D,) float64, ascending; what is rounding is exactly 0."""
        return factor_eigenvalues(self.input_factor, self.dtype)

    @cached_property
    def output_eigenvalues(self) -> Tensor:
        """b, (O,) float64, ascending; what is rounding is exactly 0."""
        return factor_eigenvalues(self.output_factor, self.dtype)

    @property
    def num_params(self) -> int:
        """D O, the number of coordinates."""
        return len(self.input_factor) * len(self.output_factor)

    @property
    def rank(self) -> int:
        """Rank of A times rank of B."""
        return self.input_rank * self.output_rank

    @property
    def input_rank(self) -> int:
        """Rank of A, the numerical rank of the layer's features, with the column of ones that the bias multiplies."""
        return int((self.input_eigenvalues > 0).sum())

    @property
    def output_rank(self) -> int:
        """Rank of B."""
        return int((self.output_eigenvalues > 0).sum())

    @property
    def max_abs(self) -> float:
        """The largest eigenvalue."""
        return float(self.input_eigenvalues[-1] * self.output_eigenvalues[-1])

    @property
    def resolution(self) -> float:
        """Eigenvalues are known to within this, because of floating-point rounding."""
        return RESOLUTION.get(self.dtype, 1e-2) * self.max_abs

    def eigenvalues(self) -> Tensor:
        """(D O,) float64, ascending: all products; 8 bytes for each parameter."""
        return torch.outer(self.input_eigenvalues, self.output_eigenvalues).flatten().sort().values

    def count_above(self, threshold: float) -> int:
        """How many products exceed a nonnegative threshold: one binary search in a for each b_j."""
        return int((len(self._small_and_large[1]) - self._split(threshold)).sum())

    def histogram(self, edges: Tensor) -> Tensor:
        """(G - 1,) int64 numbers of eigenvalues in (edge_i, edge_i+1], for G ascending nonnegative edges."""
        above = torch.tensor([self.count_above(float(edge)) for edge in edges])
        return above[:-1] - above[1:]

    def epsilon_rank(self, eps: float, relative: bool = False) -> Estimate:
        """Number of eigenvalues above eps, as ``Spectrum.epsilon_rank``.

        Raises:
            ValueError: for a negative ``eps``.
        """
        check_eps(eps)
        threshold = eps * self.max_abs if relative else eps
        edges = (threshold, threshold + self.resolution, max(threshold - self.resolution, 0.0))
        return Estimate(*(float(self.count_above(edge)) for edge in edges))

    def effective_rank(self) -> Estimate:
        """Roy and Vetterli 2007: exactly erank(A) erank(B), because the entropies of the factors add up."""
        factors = (self.input_eigenvalues, self.output_eigenvalues)
        return Estimate.exactly(float(effective_rank_of(factors[0]) * effective_rank_of(factors[1])))

    def trace(self) -> Estimate:
        """tr(A) tr(B)."""
        return Estimate.exactly(float(self.input_eigenvalues.sum() * self.output_eigenvalues.sum()))

    def frobenius_norm(self) -> Estimate:
        """||A||_F ||B||_F."""
        return Estimate.exactly(float(self.input_eigenvalues.norm() * self.output_eigenvalues.norm()))

    def lambda_max(self) -> Estimate:
        """Largest eigenvalue of A times largest of B."""
        return Estimate.exactly(self.max_abs)

    def lambda_min(self) -> Estimate:
        """Smallest eigenvalue of A times smallest of B."""
        return Estimate.exactly(float(self.input_eigenvalues[0] * self.output_eigenvalues[0]))

    def stable_rank(self) -> Estimate:
        """Sum of lambda^2 over max lambda^2; 0 for a zero block."""
        top = self.max_abs
        return Estimate.exactly((self.frobenius_norm().value / top) ** 2 if top else 0.0)

    @cached_property
    def _small_and_large(self) -> tuple[Tensor, Tensor]:
        """The shorter list of eigenvalues, which is walked through, and the longer, which is searched."""
        a, b = self.input_eigenvalues, self.output_eigenvalues
        return (a, b) if len(a) <= len(b) else (b, a)

    def _split(self, threshold: float) -> Tensor:
        """For each x in the shorter list, how many y of the longer have x y <= threshold."""
        small, large = self._small_and_large
        split = torch.full(small.shape, len(large))
        live = small > 0
        quotient = threshold / small[live]
        low = torch.searchsorted(large, quotient * (1 - _TIE), right=True)
        high = torch.searchsorted(large, quotient * (1 + _TIE), right=True)
        for row in (low < high).nonzero()[:, 0].tolist():  # ties with the threshold: ask the product
            near = large[low[row] : high[row]] * small[live][row]
            low[row] += int((near <= threshold).sum())
        split[live] = low
        return split


def factor_eigenvalues(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of positive semidefinite float64 factors (..., D, D), ascending, those that are rounding set to 0.

    The factor is a sum of outer products of vectors in ``dtype``. Below D eps64 of the largest, an eigenvalue is
    rounding of the sum; below (D eps)^2 it is rounding of the vectors, by the rule of ``numerical_rank`` squared.
    """
    values: Tensor = torch.linalg.eigvalsh(factor).clamp_min(0.0)
    size = values.shape[-1]
    eps = torch.finfo(dtype).eps if dtype in RESOLUTION else torch.finfo(torch.float32).eps
    tolerance = max(size * torch.finfo(torch.float64).eps, (size * eps) ** 2)
    return values.where(values > tolerance * values[..., -1:], 0.0)


def check_eps(eps: float) -> None:
    """Refuse a negative threshold.

    Raises:
        ValueError: for a negative or NaN ``eps``.
    """
    if not eps >= 0:
        raise ValueError(f"eps={eps}, expected eps >= 0.")
