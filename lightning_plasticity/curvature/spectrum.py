"""The spectrum of a curvature matrix: a frozen result that answers with numbers and their uncertainty."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_plasticity.linalg import (
    Estimate,
    LanczosQuadrature,
    effective_rank_of,
    extreme_spectra,
    participation_ratio_of,
    srank_of,
    stable_rank_of,
)

NUM_DRAWS = 200  # resampled spectra behind the interval of a smooth functional


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a P x P curvature matrix, or quadrature nodes that stand for them.

    Attributes:
        eigenvalues: (K,) float64, ascending: distinct entries of an exact spectrum (the structural zeros are one
            entry), or the nodes of a quadrature.
        weights: (K,) float64, the share of the P coordinates that each entry stands for; they sum to 1.
        num_params: P, the number of coordinates, zeros included.
        exact: whether these are all eigenvalues (up to rounding), not an estimate.
        matrix: ``"hessian"``, ``"ggn"`` or ``"ntk"``.
        method: how they were computed.
        num_samples: N, samples that the loss is a mean over.
        num_products: matrix-vector products (or backward passes) spent.
        seconds: wall time spent.
        resolution: eigenvalues are known to within this, because of floating-point rounding.
        quadrature: the Lanczos quadrature behind an estimate, over the live coordinates; None when exact.
        settings: anything else worth recording (dtype, mode, seed), plain values.

    Example:
        >>> import torch
        >>> from lightning_plasticity import Spectrum
        >>> spectrum = Spectrum.from_eigenvalues(torch.tensor([2.0, 0.5, -0.1], dtype=torch.float64), num_params=10)
        >>> spectrum.epsilon_rank(0.2)
        Estimate(value=2.0, lower=2.0, upper=2.0)
        >>> spectrum.trace().value
        2.4
    """

    eigenvalues: Tensor
    weights: Tensor
    num_params: int
    exact: bool
    matrix: str = "hessian"
    method: str = ""
    num_samples: int = 0
    num_products: int = 0
    seconds: float = 0.0
    resolution: float = 0.0
    quadrature: LanczosQuadrature | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_eigenvalues(cls, eigenvalues: Tensor, num_params: int, **about: Any) -> Spectrum:
        """An exact spectrum: the given eigenvalues, and zeros for the rest of ``num_params`` coordinates.

        Raises:
            ValueError: for no coordinates, more eigenvalues than coordinates, or values that are not finite.
        """
        values = eigenvalues.detach().to("cpu", torch.float64).sort().values
        if num_params < 1:
            raise ValueError(f"num_params={num_params}, expected at least 1: a spectrum is over coordinates.")
        if len(values) > num_params:
            raise ValueError(f"{len(values)} eigenvalues for num_params={num_params}; pass at most one for each.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError("The eigenvalues hold NaN or inf; the weights, the data or the loss are not finite.")
        weights = torch.full((len(values),), 1.0 / num_params, dtype=torch.float64)
        zeros = num_params - len(values)
        if zeros:
            values, weights = _insert_zeros(values, weights, zeros / num_params)
        return cls(values, weights, num_params, exact=True, **about)

    @classmethod
    def from_quadrature(cls, quadrature: LanczosQuadrature, num_params: int, **about: Any) -> Spectrum:
        """An estimate: a quadrature over the live coordinates, and zeros for the others."""
        values = torch.from_numpy(np.array(quadrature.nodes))
        weights = torch.from_numpy(np.array(quadrature.counts)) / num_params
        if num_params > quadrature.dim:
            values, weights = _insert_zeros(values, weights, (num_params - quadrature.dim) / num_params)
        complete = len(quadrature.nodes) == quadrature.dim
        return cls(values, weights, num_params, exact=complete, quadrature=quadrature, **about)

    # ---- summaries; formulas and sources: docs/concepts/spectrum.md -------------------------------------------------

    def epsilon_rank(self, eps: float, relative: bool = False) -> Estimate:
        """Number of eigenvalues with ``|lambda|`` > eps (a count out of ``num_params``).

        Source: Prakash et al. 2026 (arXiv 2509.22335), but counted, never read off a smoothed density.

        Args:
            eps: threshold, in units of the loss; with ``relative`` a multiple of the largest ``|lambda|``.
            relative: whether ``eps`` is relative.

        Returns:
            The count. Of an exact spectrum it is a whole number, with an interval only as wide as rounding makes it.
            Of an estimate it comes with a 95 % interval, and is ``nan`` where only the interval can be given.

        Raises:
            ValueError: for a negative ``eps``.
        """
        if not eps >= 0:
            raise ValueError(f"eps={eps}, expected eps >= 0.")
        threshold = eps * self.max_abs if relative else eps
        if self.quadrature is not None and not self.exact:
            inner, outer = max(threshold - self.resolution, 0.0), threshold + self.resolution
            found = [self.quadrature.count_above(edge) for edge in (threshold, inner, outer)]
            return Estimate(found[0].value, min(count.lower for count in found), max(count.upper for count in found))
        return Estimate(
            self._count(self._magnitudes > threshold),
            self._count(self._magnitudes > threshold + self.resolution),
            self._count(self._magnitudes > max(threshold - self.resolution, 0.0)),
        )

    def effective_rank(self) -> Estimate:
        """The exponential of the entropy of ``|lambda| / sum |lambda|`` (Roy, Vetterli 2007), 1 to ``num_params``."""
        return self._bounded(effective_rank_of)

    def srank(self, delta: float = 0.01) -> Estimate:
        """Fewest eigenvalues that hold 1 - delta of ``sum |lambda|`` (Lewandowski et al. 2023, arXiv 2312.00246).

        Of an estimate the interval is wide: the last 1 % is in the eigenvalues near zero, which Lanczos resolves least.
        """
        return self._bounded(partial(srank_of, delta=delta))

    def stable_rank(self) -> Estimate:
        """Sum of lambda^2 over max lambda^2 (Rudelson and Vershynin 2007)."""
        return self._functional(lambda counts: stable_rank_of(self._magnitudes, counts))

    def participation_ratio(self) -> Estimate:
        """``(sum |lambda|)^2 / sum lambda^2``."""
        return self._bounded(participation_ratio_of)

    def trace(self) -> Estimate:
        """Sum of the eigenvalues."""
        return self._functional(lambda counts: (counts * self.eigenvalues).sum(-1))

    def lambda_max(self) -> Estimate:
        """Largest eigenvalue; of an estimate, the top Ritz value and that plus its residual.

        That is a residual bound, not a 95 % interval: an eigenvalue lies within it for sure, and it is the largest one
        unless the probe has next to nothing of that eigenvector.
        """
        return self._extreme(-1)

    def lambda_min(self) -> Estimate:
        """Smallest eigenvalue; of an estimate, the bottom Ritz value and that minus its residual (a residual bound)."""
        return self._extreme(0)

    def negative_fraction(self, eps: float | None = None) -> Estimate:
        """Share of the coordinates with an eigenvalue below -eps; eps defaults to 1e-6 of the largest ``|lambda|``."""
        eps = 1e-6 * self.max_abs if eps is None else eps
        if self.quadrature is not None and not self.exact:
            below = self.quadrature.count_below(-eps)
            return Estimate(*(x / self.num_params for x in (below.value, below.lower, below.upper)))
        return Estimate.exactly(self._count(self.eigenvalues < -eps) / self.num_params)

    @property
    def max_abs(self) -> float:
        """Largest ``|lambda|``."""
        return float(self._magnitudes.max()) if len(self.eigenvalues) else 0.0

    @property
    def counts(self) -> Tensor:
        """(K,) float64, how many of the ``num_params`` eigenvalues each entry stands for."""
        return self.weights * self.num_params

    def density(self, grid: Tensor, variance: float = 1e-5) -> Tensor:
        """Gaussian-smoothed spectral density on a grid, for plots only.

        Args:
            grid: (G,) points.
            variance: kernel variance as a multiple of max(1, range of the spectrum), as in the public code of
                Prakash et al. 2026.

        Returns:
            (G,) density per unit of lambda, integrating to 1 over the real line.
        """
        deviation = self._kernel_width(variance)
        offsets = (grid.to(torch.float64)[:, None] - self.eigenvalues) / deviation
        kernel = torch.exp(-0.5 * offsets**2) / (deviation * (2 * torch.pi) ** 0.5)
        density: Tensor = kernel @ self.weights
        return density

    def density_epsilon_rank(self, eps: float, num_points: int = 10_000, variance: float = 1e-5) -> float:
        """The normalised eps-rank as published code computes it, from the smoothed density: for comparison only.

        Do not trust it: the kernel and the grid can be wider than eps, the masked trapezoid adds back the area over
        [-eps, eps], and the result can exceed 1 and grow with eps. A warning says when. Use ``epsilon_rank``.
        """
        low, high = float(self.eigenvalues.min()) - 0.01, float(self.eigenvalues.max()) + 0.01
        grid = torch.linspace(low, high, num_points, dtype=torch.float64)
        step, width = float(grid[1] - grid[0]), self._kernel_width(variance)
        if max(step, width) > eps:
            _warn_density(eps, step, width)
        density = self.density(grid, variance)
        density = density / (density.sum() * step)  # a plain sum here and trapezoids below, as published
        outside = grid.abs() > eps
        return float(torch.trapezoid(density[outside], grid[outside]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an ``.npz`` file (a name without the ending gets it)."""
        arrays = {"eigenvalues": self.eigenvalues.numpy(), "weights": self.weights.numpy()}
        about = {name: getattr(self, name) for name in _ABOUT} | {"settings": dict(self.settings)}
        if self.quadrature is not None:
            arrays |= {"alpha": self.quadrature.alpha, "beta": self.quadrature.beta}
            about["quadrature"] = {name: getattr(self.quadrature, name) for name in ("dim", "breakdown", "merge")}
        np.savez(_with_ending(path), about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read what ``save`` wrote."""
        with np.load(_with_ending(path), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            found = about.pop("quadrature", None)
            quadrature = None if found is None else LanczosQuadrature(file["alpha"], file["beta"], **found)
            return cls(
                torch.from_numpy(file["eigenvalues"]), torch.from_numpy(file["weights"]), quadrature=quadrature, **about
            )

    # ---- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _magnitudes(self) -> Tensor:
        return self.eigenvalues.abs()

    @cached_property
    def _resampled(self) -> Tensor:
        """(NUM_DRAWS, K) counts that other probes could have shown."""
        assert self.quadrature is not None
        draws = torch.from_numpy(self.quadrature.resample(NUM_DRAWS))
        missing = self.num_params - self.quadrature.dim
        if missing:
            at = _zero_position(torch.from_numpy(np.array(self.quadrature.nodes)))
            zeros = torch.full((len(draws), 1), float(missing), dtype=torch.float64)
            draws = torch.cat([draws[:, :at], zeros, draws[:, at:]], dim=1)
        return draws

    @cached_property
    def _extremes(self) -> tuple[Tensor, Tensor]:
        assert self.quadrature is not None
        return extreme_spectra(self.quadrature)

    def _count(self, region: Tensor) -> float:
        return float(round(float(self.counts[region].sum())))

    def _kernel_width(self, variance: float) -> float:
        spread = float(self.eigenvalues.max() - self.eigenvalues.min()) + 0.02
        return float((variance * max(1.0, spread)) ** 0.5)

    def _bounded(self, function: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
        """A functional of magnitudes and counts; its interval is what count intervals allow (none for exact spectra).

        There is no value where the quadrature's own lies outside, for then it is misleading.
        """
        value = float(function(self._magnitudes, self.counts))
        if self.quadrature is None or self.exact:
            return Estimate.exactly(value)
        found = function(*self._extremes)
        lower, upper = float(found.min()), float(found.max())
        slack = 1e-5 * max(abs(value), 1.0)  # rounding and what no threshold resolves, where all else is
        if not lower - slack <= value <= upper + slack:
            return Estimate(float("nan"), lower, upper)
        return Estimate(value, min(lower, value), max(upper, value))

    def _functional(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """A functional of the counts; its interval is the spread over resampled probes (none for exact spectra)."""
        value = float(function(self.counts))
        if self.exact:
            return Estimate.exactly(value)
        lower, upper = torch.quantile(function(self._resampled).to(torch.float64), _INTERVAL).tolist()
        return Estimate(value, min(lower, value), max(upper, value))

    def _extreme(self, index: int) -> Estimate:
        value = float(self.eigenvalues[index])
        if self.quadrature is None or self.exact:
            return Estimate.exactly(value)
        if value != float(self.quadrature.nodes[index]):  # the structural zero is the extreme
            return Estimate(value, value, value)
        residual = float(self.quadrature.residuals[index])
        return Estimate(value, value - residual * (index == 0), value + residual * (index == -1))


_ABOUT = ("num_params", "exact", "matrix", "method", "num_samples", "num_products", "seconds", "resolution")
# Wider than the 95 % it is meant for: resampling does not know what Lanczos left unresolved, and at 2.5 % on each side
# the interval of the trace held in 85 to 98 % of the repetitions (docs/studies/intervals.md).
_INTERVAL = torch.tensor([0.005, 0.995], dtype=torch.float64)


def _with_ending(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")


def _zero_position(values: Tensor) -> int:
    return int(torch.searchsorted(values, torch.zeros(1, dtype=values.dtype)))


def _insert_zeros(values: Tensor, weights: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Add one entry at zero, in its place."""
    at = _zero_position(values)
    zero, share = values.new_zeros(1), weights.new_full((1,), weight)
    return torch.cat([values[:at], zero, values[at:]]), torch.cat([weights[:at], share, weights[at:]])


def _warn_density(eps: float, step: float, width: float) -> None:
    warnings.warn(
        f"density_epsilon_rank at eps={eps:g}: the kernel is {width:.3g} wide and the grid step is {step:.3g}, wider "
        "than eps, so the number does not measure the eps-rank. Use epsilon_rank(eps), which counts.",
        stacklevel=3,
    )
