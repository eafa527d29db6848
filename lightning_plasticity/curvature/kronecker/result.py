"""The block-diagonal Kronecker spectrum of a network: the layers' blocks together, products formed only when asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lightning_plasticity.curvature.kronecker.block import KroneckerBlock, check_eps
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg import Estimate

WHOLE = "whole"  # key of the errors of all blocks together


@dataclass(frozen=True)
class KroneckerError:
    """How far a Kronecker approximation is off, relative to the exact GGN; positive where it is too large.

    Attributes:
        trace: tr(approximation) / tr(exact) - 1.
        lambda_max: the same of the largest eigenvalue.
    """

    trace: float
    lambda_max: float


@dataclass(frozen=True, eq=False)
class KroneckerSpectrum:
    """Kronecker blocks of a network, and the spectrum of the block-diagonal matrix that they make up.

    It answers like a ``Spectrum`` (same names, same numbers), but from the eigenvalues of the factors; ``spectrum()``
    forms all products for whatever is not here.

    Attributes:
        layers: the blocks by layer name; ``NAME.groupI`` for the groups of a grouped convolution. A masked layer has a
            ``MaskedBlock``, unit by unit.
        skipped: why a layer that has chosen parameters is not among them, by its name.
        num_samples: N, samples that the loss is a mean over.
        seconds: wall time spent.
        settings: mode, dtype, why BackPACK refused, where it did, and the layers taken unit by unit (``per_unit``).
        errors: with ``check=True``, the errors against the exact GGN by layer, and of all together (``"whole"``).
    """

    layers: Mapping[str, KroneckerBlock]
    skipped: Mapping[str, str]
    num_samples: int
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, KroneckerError] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """Coordinates of all blocks; those of skipped layers are not among them."""
        return sum(block.num_params for block in self.layers.values())

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that the blocks cover."""
        return list(dict.fromkeys(name for block in self.layers.values() for name in block.parameters))

    @property
    def rank(self) -> int:
        """The sum over the blocks of rank A times rank B."""
        return sum(block.rank for block in self.layers.values())

    @property
    def max_abs(self) -> float:
        """Largest eigenvalue."""
        return max(block.max_abs for block in self.layers.values())

    @property
    def resolution(self) -> float:
        """Eigenvalues are known to within this, because of floating-point rounding."""
        return max(block.resolution for block in self.layers.values())

    def epsilon_rank(self, eps: float, relative: bool = False) -> Estimate:
        """Number of eigenvalues above eps, as ``Spectrum.epsilon_rank``.

        Raises:
            ValueError: for a negative ``eps``.
        """
        check_eps(eps)
        threshold = eps * self.max_abs if relative else eps
        edges = (threshold, threshold + self.resolution, max(threshold - self.resolution, 0.0))
        return Estimate(
            *(float(sum(block.count_above(edge) for block in self.layers.values())) for edge in edges),
        )

    def effective_rank(self) -> Estimate:
        """Roy and Vetterli 2007: exp of sum_l w_l (H_l - log w_l), with w_l the share of block l in the trace."""
        total = self.trace().value
        if not total:
            return Estimate.exactly(0.0)
        entropy = 0.0
        for block in self.layers.values():
            share = block.trace().value / total
            if share:
                entropy += share * (math.log(block.effective_rank().value) - math.log(share))
        return Estimate.exactly(math.exp(entropy))

    def trace(self) -> Estimate:
        """Sum of tr(A) tr(B) over the blocks."""
        return Estimate.exactly(sum(block.trace().value for block in self.layers.values()))

    def frobenius_norm(self) -> Estimate:
        """Root of the sum of all squared eigenvalues."""
        return Estimate.exactly(math.hypot(*(block.frobenius_norm().value for block in self.layers.values())))

    def lambda_max(self) -> Estimate:
        """Largest eigenvalue of any block."""
        return Estimate.exactly(self.max_abs)

    def lambda_min(self) -> Estimate:
        """Smallest eigenvalue of any block."""
        return Estimate.exactly(min(block.lambda_min().value for block in self.layers.values()))

    def stable_rank(self) -> Estimate:
        """Sum of lambda^2 over max lambda^2."""
        top = self.max_abs
        return Estimate.exactly((self.frobenius_norm().value / top) ** 2 if top else 0.0)

    def participation_ratio(self) -> Estimate:
        """(sum lambda)^2 / sum lambda^2."""
        norm = self.frobenius_norm().value
        return Estimate.exactly((self.trace().value / norm) ** 2 if norm else 0.0)

    def srank(self, delta: float = 0.01) -> Estimate:
        """As ``Spectrum.srank``; forms all products, since it is not multiplicative."""
        return self.spectrum().srank(delta)

    def spectrum(self) -> Spectrum:
        """All products as a ``Spectrum`` with ``matrix="kronecker"``; 16 bytes for each parameter, kept."""
        return self._spectrum

    @cached_property
    def _spectrum(self) -> Spectrum:
        values = torch.cat([block.eigenvalues() for block in self.layers.values()])
        return Spectrum.from_eigenvalues(
            values[values > 0],  # zeros are one entry of a Spectrum, however many there are
            self.num_params,
            matrix="kronecker",
            method="+".join(sorted({block.source for block in self.layers.values()})),
            num_samples=self.num_samples,
            seconds=self.seconds,
            resolution=self.resolution,
            settings=dict(self.settings),
        )

    def errors_against(self, exact: Mapping[str, Spectrum]) -> dict[str, KroneckerError]:
        """Relative errors of trace and largest eigenvalue against exact spectra of the GGN.

        Args:
            exact: spectra by layer name, and under ``"whole"`` that of all covered parameters together (see
                ``parameters``), on the same samples. The whole has the blocks between layers, which are left out here.

        Returns:
            One entry for each key.

        Raises:
            ValueError: for a layer that is not there, or spectra of another size or of other samples.
        """
        errors = {}
        for name, spectrum in exact.items():
            blocks = [b for b in self.layers.values() if name in (WHOLE, b.name)]
            size = sum(block.num_params for block in blocks)
            if (spectrum.num_params, spectrum.num_samples) != (size, self.num_samples):
                raise ValueError(
                    f"The spectrum given for {name!r} is over {spectrum.num_params} coordinates and "
                    f"{spectrum.num_samples} samples, the blocks over {size} and {self.num_samples}; measure it with "
                    "params= the block's parameters on the same data (layers: "
                    f"{', '.join(dict.fromkeys(b.name for b in self.layers.values()))})."
                )
            errors[name] = KroneckerError(
                _relative(sum(block.trace().value for block in blocks), spectrum.trace().value),
                _relative(max(block.max_abs for block in blocks), spectrum.lambda_max().value),
            )
        return errors


def _relative(value: float, truth: float) -> float:
    if truth == 0:
        return 0.0 if value == 0 else math.inf
    return value / truth - 1.0
