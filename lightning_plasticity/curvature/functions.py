"""Curvature spectra in one call: a plain module, a loss and data; no Trainer needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_plasticity.curvature.budget import Budget
from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.gram.estimate import GramMethod, gram_spectrum
from lightning_plasticity.curvature.hessian.measure import LANCZOS_STEPS, Method, measure_hessian
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.nn import Mode


def hessian_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    params: str | Sequence[str] | None = None,
    method: Method = "auto",
    num_steps: int = LANCZOS_STEPS,
    max_seconds: float | None = None,
    max_memory: float | None = None,
    mode: Mode = "frozen",
    seed: int = 0,
) -> Spectrum:
    """Spectrum of the Hessian of the mean loss: exact for few parameters, else by Lanczos quadrature with intervals.

    Source: Pearlmutter 1994 for the products; Ghorbani et al. 2019 (arXiv 1901.10159) for Lanczos quadrature, with the
    estimator and the intervals of ``lightning_plasticity.linalg.quadrature``.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step.
        data: ``(inputs, targets)`` or an iterable of such pairs (a DataLoader); batches are weighted by their size.
        params: names or wildcards of the parameters that count, e.g. ``"encoder.*"``; None for all trainable ones.
        method: ``"exact"`` forms the whole matrix, ``"lanczos"`` estimates, ``"auto"`` is exact up to 1000 coordinates
            with a nonzero row.
        num_steps: Lanczos steps: 60 is a quick look, 120 the usual choice, 300 careful.
        max_seconds: wall time that a Lanczos run may take; fewer samples and steps are chosen for it, from a short
            calibration, and ``settings["budget"]`` says which. None for any.
        max_memory: bytes that it may take beyond what the process holds; None for half of what is free.
        mode: ``"frozen"`` (BatchNorm and dropout off, by type), ``"as_is"`` or ``"eval"``.
        seed: of the probe and of the random state during the measurement.

    Returns:
        The spectrum over all P chosen coordinates.

    Raises:
        MeasurementError: when the loss is not finite or depends on no trainable parameter, or there is no data.
        ValueError: for unknown settings.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import hessian_spectrum
        >>> inputs = torch.tensor([[1.0], [-1.0]])
        >>> spectrum = hessian_spectrum(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (inputs, torch.zeros(2, 1)))
        >>> spectrum.eigenvalues
        tensor([2., 2.], dtype=torch.float64)
    """
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    budget = Budget(max_seconds, max_memory)
    return measure_hessian(measured, method=method, num_steps=num_steps, budget=budget)


def ggn_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    params: str | Sequence[str] | None = None,
    method: GramMethod = "auto",
    max_rows: int | None = 5000,
    num_steps: int = LANCZOS_STEPS,
    max_seconds: float | None = None,
    max_memory: float | None = None,
    mode: Mode = "frozen",
    seed: int = 0,
) -> Spectrum:
    """Spectrum of the generalised Gauss-Newton matrix (Schraudolph 2002), through its Gram matrix.

    With a root S of the loss's curvature in the outputs the nonzero eigenvalues of J^T S S^T J are those of the Gram
    matrix S^T J J^T S, with a row for each sample and output that counts. It is decomposed, or given to Lanczos.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: as in ``hessian_spectrum``; must be convex in the outputs.
        data: as in ``hessian_spectrum``.
        params: as in ``hessian_spectrum``.
        method: ``"exact"`` decomposes the Gram matrix of the first samples that fit ``max_rows`` (``num_samples`` of
            the result says how many); ``"lanczos"`` estimates, with intervals, on all samples that ``max_seconds`` and
            ``max_memory`` allow; ``"auto"`` is exact when 32 samples or all of them fit ``max_rows``, else Lanczos.
            The settings of the result say why, and by which route.
        max_rows: bound on the size of the Gram matrix to decompose, N (C - 1) for cross-entropy; None for no bound. It
            takes about (rows / 1500)^3 / 5 seconds.
        num_steps: Lanczos steps, as in ``hessian_spectrum``. Equal eigenvalues may look like one to a single probe.
        max_seconds: wall time; fewer samples, and for an estimate fewer steps, are chosen for it, from a short
            calibration, and ``settings["budget"]`` says which. None for any.
        max_memory: as in ``hessian_spectrum``.
        mode: as in ``hessian_spectrum``.
        seed: as in ``hessian_spectrum``.

    Returns:
        The spectrum over all P chosen coordinates; at most as many eigenvalues as there are rows are not zero.

    Raises:
        MeasurementError: when outputs and loss cannot be told apart, or the loss is not convex in the outputs.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import ggn_spectrum
        >>> net, data = torch.nn.Linear(4, 3), (torch.randn(10, 4), torch.randint(3, (10,)))
        >>> ggn_spectrum(net, torch.nn.CrossEntropyLoss(), data).epsilon_rank(1e-6).value  # (4 + 1) * (3 - 1)
        10.0
    """
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    budget = Budget(max_seconds, max_memory)
    return gram_spectrum(measured, "ggn", method=method, max_rows=max_rows, num_steps=num_steps, budget=budget)


def ntk_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    params: str | Sequence[str] | None = None,
    method: GramMethod = "auto",
    max_rows: int | None = 5000,
    num_steps: int = LANCZOS_STEPS,
    max_seconds: float | None = None,
    max_memory: float | None = None,
    mode: Mode = "frozen",
    seed: int = 0,
) -> Spectrum:
    """Spectrum of the empirical neural tangent kernel J J^T / N (Jacot et al. 2018, arXiv 1806.07572).

    Arguments as in ``ggn_spectrum``. The loss only serves to find the outputs, which are what its loss function is
    called on: a temperature that scales the logits before counts as the network's. Reported over the P coordinates,
    like the other spectra, so that counts compare.
    """
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    budget = Budget(max_seconds, max_memory)
    return gram_spectrum(measured, "ntk", method=method, max_rows=max_rows, num_steps=num_steps, budget=budget)
