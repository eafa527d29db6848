"""Spectra of the diagonal blocks of a curvature matrix: one for each layer, from one set of backward passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.gram.matrix import assemble
from lightning_plasticity.curvature.gram.measure import collected_rows, exact_spectrum
from lightning_plasticity.curvature.hessian.measure import measure_hessian
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.measured import Measured
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.linalg.progress import part
from lightning_plasticity.nn import Mode
from lightning_plasticity.nn.masks import active_entries, plain_names

MATRICES = ("ggn", "ntk", "hessian")


def layer_spectra(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    matrix: Literal["ggn", "ntk", "hessian"] = "ggn",
    params: str | Sequence[str] | None = None,
    max_rows: int | None = 5000,
    mode: Mode = "frozen",
    seed: int = 0,
) -> dict[str, Spectrum]:
    """The spectrum of each layer's diagonal block of the GGN, the NTK or the Hessian.

    The GGN's blocks come from the layers' own shares of one Gram matrix: the backward passes are those of one
    ``ggn_spectrum``, and each layer adds a decomposition. The Hessian is measured anew for each layer. For piecewise
    linear networks both agree, layer by layer.

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: as in ``ggn_spectrum``.
        data: as in ``ggn_spectrum``.
        matrix: ``"ggn"``, ``"ntk"`` (J J^T / N with J of the layer's parameters) or ``"hessian"``.
        params: as in ``ggn_spectrum``; layers of which no parameter counts are left out.
        max_rows: as in ``ggn_spectrum`` with ``method="exact"``; the Hessian takes all samples.
        mode: as in ``ggn_spectrum``.
        seed: as in ``ggn_spectrum``.

    Returns:
        Spectra in the order of the layers, by the name of the module that owns the parameters ("" for the model
        itself). A parameter that several modules own counts once, for the first of them in ``named_modules`` order. A
        masked layer's spectrum is over its active coordinates; without any the layer is left out.
        GGN and NTK are exact; the Hessian is as ``hessian_spectrum`` with ``method="auto"`` measures it.

    Raises:
        MeasurementError: as ``ggn_spectrum`` and ``hessian_spectrum``.
        ValueError: for an unknown matrix.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import layer_spectra
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(10, 4), torch.randint(3, (10,))
        >>> {name: found.num_params for name, found in layer_spectra(net, torch.nn.CrossEntropyLoss(), data).items()}
        {'0': 40, '2': 27}
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix={matrix!r}, expected one of {MATRICES}.")
    measured = Measured(model, as_batches(data, model), loss_fn, params, mode, seed)
    layers = _layers(measured)
    if matrix == "hessian":
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {}
        for layer, own in layers.items():
            with part(layer):
                found[layer] = measure_hessian(replace(measured, params=[_literal(names[p]) for p in own]))
        return found
    spectra = {}
    started = time.perf_counter()
    with collected_rows(measured, matrix, measured.parameters(), max_rows=max_rows) as rows:
        for layer, own in layers.items():
            gram = assemble(rows.batches, only=set(own))
            spectra[layer] = exact_spectrum(measured, matrix, rows, gram, own, started)
            started = time.perf_counter()
    return spectra


def _layers(measured: Measured) -> dict[str, list[nn.Parameter]]:
    """The parameters that count, by the first module that owns them."""
    chosen = set(measured.parameters())
    layers: dict[str, list[nn.Parameter]] = {}
    for parameter, name in plain_names(measured.module).items():
        if parameter in chosen:
            layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    masks = active_entries(measured.module)
    return {name: own for name, own in layers.items() if not all(p in masks and not masks[p].any() for p in own)}


def _literal(name: str) -> str:
    """A pattern that matches one name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
