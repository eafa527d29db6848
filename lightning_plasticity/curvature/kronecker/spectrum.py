"""The Kronecker-factored curvature of a network in one call: BackPACK where it can, our own hooks elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.gram.measure import measure_gram
from lightning_plasticity.curvature.kronecker.backpack_route import FACTORS, Factors, Refused, backpack_factors
from lightning_plasticity.curvature.kronecker.hooks_route import hook_factors
from lightning_plasticity.curvature.kronecker.layers import ChosenLayer, FactorSums, choose_layers, no_layers
from lightning_plasticity.curvature.kronecker.masked_block import MaskedBlock
from lightning_plasticity.curvature.kronecker.result import WHOLE, KroneckerSpectrum
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg.progress import part
from lightning_plasticity.nn import Mode

Backend = Literal["auto", "backpack", "hooks"]
BACKENDS = ("auto", "backpack", "hooks")
CHECK_ROWS = 5000  # rows of the exact GGN's Gram matrix that check=True decomposes for each layer
TRIAL_SAMPLES = 2
TRIAL_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@part("kronecker")
def kronecker_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    params: str | Sequence[str] | None = None,
    factors: Factors = "kflr",
    mc_samples: int = 1,
    backend: Backend = "auto",
    check: bool = False,
    mode: Mode = "frozen",
    seed: int = 0,
) -> KroneckerSpectrum:
    """The GGN as one Kronecker product A x B for each linear layer and convolution.

    Block of a layer: A = E[abar abar^T], abar its input with a 1 for the bias (convolutions: unfolded patches, averaged
    over positions), B from the gradients at its output (summed over positions). Exact for one sample, and for a linear
    model with squared loss; elsewhere an approximation, whose errors ``check=True`` measures.

    A mask does not factorise, so a masked layer's block is taken unit by unit: with S_o the active inputs of output
    unit o (the bias among them) its eigenvalues are the union over o of B_oo eig(A[S_o, S_o]), as many as there are
    active coordinates; terms between output units are left out. ``settings["per_unit"]`` names the layers.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); Grosse and Martens 2016 (arXiv 1602.01407) for convolutions;
    Botev et al. 2017 (arXiv 1706.03662) for KFLR and KFRA. Computed by BackPACK on a copy of the network where it can
    do all of it, else by forward hooks and autograd.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step
            (hooks only).
        data: ``(inputs, targets)`` or an iterable of such pairs, which give the factors of all samples at once: A is a
            mean over samples, B is of the loss on all of them (weights, ignored targets and sums included).
        params: names or wildcards of the parameters that count, as in ``ggn_spectrum``; None for all trainable ones.
        factors: B from the exact square root of the loss's Hessian (``"kflr"``), from sampled labels (``"kfac"``), or
            averaged at every layer on its way back (``"kfra"``). Where hooks stand in for KFAC they take the exact
            square root, which is the mean over labels.
        mc_samples: labels that KFAC samples for each input.
        backend: ``"backpack"`` or ``"hooks"`` to insist on one; ``"auto"`` tries BackPACK, compares it with the hooks
            on two samples, and falls back on the hooks.
        check: whether to measure ``errors`` against the exact GGN of every block and of the whole (at most 5000 Gram
            rows, samples times classes - 1).
        mode: ``"frozen"`` (BatchNorm and dropout off, by type), ``"as_is"`` or ``"eval"``.
        seed: of the random state during the measurement.

    Returns:
        The blocks, and whatever a ``Spectrum`` answers. Layers without factors (norms, embeddings, attention, shared
        weights) are in ``skipped``.

    Raises:
        MeasurementError: when no layer has factors, or BackPACK refuses where it is insisted on or is KFRA.
        ValueError: for unknown settings.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import kronecker_spectrum
        >>> inputs = torch.tensor([[1.0], [-1.0]])
        >>> found = kronecker_spectrum(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (inputs, torch.zeros(2, 1)))
        >>> found.spectrum().eigenvalues  # exact here: the Hessian is 2 I
        tensor([2., 2.], dtype=torch.float64)
    """
    _check_settings(factors, backend, mc_samples)
    started = time.perf_counter()
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    layers, skipped = choose_layers(model, measured.parameters())
    if not layers:
        raise no_layers(skipped)
    sums, source, refusal = _factors(measured, layers, factors, mc_samples, backend)
    blocks = sums.blocks(layers, source)
    skipped |= sums.skipped
    if not blocks:
        raise no_layers(skipped)
    settings: dict[str, Any] = {"dtype": str(sums.dtype).removeprefix("torch."), "mode": mode, "factors": factors}
    if per_unit := sorted({block.name for block in blocks.values() if isinstance(block, MaskedBlock)}):
        settings["per_unit"] = per_unit
        settings["masked_params"] = sum(int((~b.mask).sum()) for b in blocks.values() if isinstance(b, MaskedBlock))
    if refusal:
        settings["backpack_refused"] = refusal
    found = KroneckerSpectrum(blocks, skipped, sums.num_samples, time.perf_counter() - started, settings)
    return replace(found, errors=found.errors_against(_exact(measured, found))) if check else found


def _factors(
    measured: Measured, layers: Sequence[ChosenLayer], factors: Factors, mc_samples: int, backend: Backend
) -> tuple[FactorSums, str, str]:
    """Factors, who computed them, and why BackPACK did not."""
    if backend == "hooks" and factors != "kfra":
        return hook_factors(measured, layers), "hooks:kflr", ""
    try:
        if backend == "hooks":
            raise Refused("backend='hooks' was asked for.")
        if backend == "auto":
            _trial(measured, layers)
        return backpack_factors(measured, layers, factors, mc_samples), f"backpack:{factors}", ""
    except Refused as refusal:
        if backend == "backpack" or factors == "kfra":
            raise MeasurementError(
                f"BackPACK gives no {factors} factors of {type(measured.module).__name__}: {refusal} "
                "Use factors='kflr' with backend='auto', which falls back on our own hooks."
            ) from refusal
        return hook_factors(measured, layers), "hooks:kflr", str(refusal)


def _trial(measured: Measured, layers: Sequence[ChosenLayer]) -> None:
    """Compare both backends on two samples: BackPACK says nothing where an option of a layer is not in its formulas.

    Raises:
        Refused: when they differ.
    """
    small = measured.with_batches(measured.batches[:1]).first(TRIAL_SAMPLES)
    try:
        found, expected = backpack_factors(small, layers, "kflr"), hook_factors(small, layers)
    except MeasurementError as error:  # two samples may have no loss (ignored targets, say) where all have one
        raise Refused(f"its factors could not be compared with autograd's on two samples: {error}") from error
    if unsure := sorted(set(found.inputs) - set(found.skipped) - set(expected.inputs)):
        raise Refused(f"it has factors of {', '.join(unsure)}, which our hooks leave out.")
    for name in expected.inputs:
        pairs = zip(found.totals(name), expected.totals(name), strict=True) if name in found.inputs else ()
        if name not in found.inputs or not all(_close(a, b, expected.dtype) for a, b in pairs):
            raise Refused(f"its factors of {name} are not those that autograd gives on two samples.")


def _close(value: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    return bool((value - truth).norm() <= TRIAL_TOLERANCE.get(dtype, 1e-2) * truth.norm())


def _exact(measured: Measured, found: KroneckerSpectrum) -> dict[str, Spectrum]:
    """The exact GGN of each layer and of all of them."""
    wanted = {block.name: list(block.parameters) for block in found.layers.values()}
    spectra = {}
    for name, parameters in (wanted | {WHOLE: found.parameters}).items():
        spectrum = measure_gram(replace(measured, params=parameters), "ggn", max_rows=CHECK_ROWS)
        if spectrum.num_samples != found.num_samples:
            raise ValueError(
                f"check=True compares on at most {CHECK_ROWS} Gram rows, which is {spectrum.num_samples} samples here; "
                f"got {found.num_samples}. Check on fewer samples, or give errors_against() spectra of your own."
            )
        spectra[name] = spectrum
    return spectra


def _check_settings(factors: str, backend: str, mc_samples: int) -> None:
    if factors not in FACTORS:
        raise ValueError(f"factors={factors!r}, expected one of {FACTORS}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}, expected one of {BACKENDS}.")
    if mc_samples < 1:
        raise ValueError(f"mc_samples={mc_samples}, expected at least 1.")
