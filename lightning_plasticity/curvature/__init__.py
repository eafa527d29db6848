"""Curvature of a loss at given weights: Hessian, GGN and NTK spectra. Knows modules, and no Trainer."""

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.functions import ggn_spectrum, hessian_spectrum, ntk_spectrum
from lightning_plasticity.curvature.gram.measure import measure_gram
from lightning_plasticity.curvature.hessian.eigenpairs import Eigenpairs, hessian_eigenpairs
from lightning_plasticity.curvature.hessian.measure import measure_hessian
from lightning_plasticity.curvature.hessian.operator import HessianOperator
from lightning_plasticity.curvature.kronecker.block import KroneckerBlock
from lightning_plasticity.curvature.kronecker.masked_block import MaskedBlock
from lightning_plasticity.curvature.kronecker.result import KroneckerError, KroneckerSpectrum
from lightning_plasticity.curvature.kronecker.spectrum import kronecker_spectrum
from lightning_plasticity.curvature.layer_spectra import layer_spectra
from lightning_plasticity.curvature.linearized.measure import linearized_trainability
from lightning_plasticity.curvature.linearized.result import LinearizedPrediction
from lightning_plasticity.curvature.loss.closure import Evaluation, LossClosure
from lightning_plasticity.curvature.loss.output_loss import OutputLoss
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.spectrum import Spectrum

__all__ = [
    "Eigenpairs",
    "Evaluation",
    "HessianOperator",
    "KroneckerBlock",
    "KroneckerError",
    "KroneckerSpectrum",
    "LinearizedPrediction",
    "LossClosure",
    "MaskedBlock",
    "Measured",
    "MeasurementError",
    "OutputLoss",
    "Spectrum",
    "ggn_spectrum",
    "hessian_eigenpairs",
    "hessian_spectrum",
    "kronecker_spectrum",
    "layer_spectra",
    "linearized_trainability",
    "measure_gram",
    "measure_hessian",
    "ntk_spectrum",
]
