"""Kronecker factors by BackPACK (Dangel, Kunstner, Hennig 2020, arXiv 1912.10985), on a copy of the network.

The copy is made in float64 and rewritten by BackPACK's converter, so that residual connections work; masked weights are
plain ones in it, for the factors know no masks. The user's module is never extended. Whatever BackPACK cannot do raises
``Refused`` with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from backpack import backpack, extend
from backpack.core.derivatives.adaptive_avg_pool_nd import AdaptiveAvgPoolNDDerivatives
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.elu import ELUDerivatives
from backpack.core.derivatives.leakyrelu import LeakyReLUDerivatives
from backpack.extensions import KFAC, KFLR, KFRA
from backpack.extensions.secondorder.hbp.hbpbase import HBPBaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.kronecker.hooks_route import num_positions
from lightning_plasticity.curvature.kronecker.layers import ROOT, ChosenLayer, FactorSums, usable_calls
from lightning_plasticity.curvature.layers import LayerTaps, patches_of
from lightning_plasticity.curvature.loss.closure import as_pair
from lightning_plasticity.curvature.loss.output_loss import OutputLoss
from lightning_plasticity.curvature.measured import Measured, require_outputs
from lightning_plasticity.linalg.progress import counted
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.batches import join_batches
from lightning_plasticity.nn.masks import copy_with_plain_weights

Factors = Literal["kflr", "kfac", "kfra"]
FACTORS = ("kflr", "kfac", "kfra")
# How far the copy's outputs may be from the network's, relative: rounding of its dtype through some layers.
OUTPUT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class Refused(Exception):  # noqa: N818  # not an error for the user: our own hooks take over
    """BackPACK cannot do this network; the message says why."""


def backpack_factors(
    measured: Measured, layers: Sequence[ChosenLayer], factors: Factors, mc_samples: int = 1
) -> FactorSums:
    """Factors of all layers that ran once on whole batches.

    Raises:
        Refused: when BackPACK cannot do the network, the loss or the data.
        MeasurementError: when the loss cannot be measured at all.
    """
    if measured.loss_fn is None or any(
        hasattr(measured.module, own) for own in ("curvature_loss", "curvature_outputs")
    ):
        raise Refused("the loss is the module's own, and not loss_fn of its outputs.")
    sums = FactorSums()
    twin, network, twins = _converted_copy(measured.module, layers)
    for index, batch in enumerate(counted(_batches(measured, factors), "batches")):
        with measured.open() as closure, LayerTaps(measured.module) as taps:
            loss = require_outputs(closure(batch, index))
            outputs = loss.outputs.detach()
            sums.skipped |= usable_calls(taps, layers, loss.num_samples)[1]
        inputs = as_pair(batch)[0]
        if not isinstance(inputs, Tensor):
            raise Refused(f"the inputs are {type(inputs).__name__}, not one tensor.")
        loss_module = _loss_module(loss)
        with undisturbed(twin, mode=measured.mode, seed=measured.seed + index), _quiet_float64():
            found = _run(network, loss_module, (inputs, loss.targets, outputs), _extension(factors, mc_samples), twins)
        sums.begin(loss)
        for name, (a, b, positions) in found.items():
            sums.add(name, a[None], b[None], positions)
    missing = {layer.name for layer in layers} - set(sums.inputs) - set(sums.skipped)
    if missing:
        raise Refused(f"it gave no factors for {', '.join(sorted(missing))}.")
    return sums


def _batches(measured: Measured, factors: Factors) -> Sequence[Any]:
    """The batches; one for KFRA, whose averages at every layer are over all samples and do not add up."""
    if factors != "kfra":
        return measured.batches
    joined = join_batches(measured.batches)
    if joined is None:
        raise Refused("KFRA averages over all samples at every layer, and these batches do not fit in one.")
    return [joined]


@contextmanager
def _quiet_float64() -> Iterator[None]:
    """BackPACK makes some constants in the default dtype, and its hooks on a first layer make torch warn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        torch.set_default_dtype(before)


def _converted_copy(
    module: nn.Module, layers: Sequence[ChosenLayer]
) -> tuple[nn.Module, nn.Module, dict[nn.Module, ChosenLayer]]:
    """A float64 copy, the extended network made of it, and which of its layers is which."""
    if any(layer.groups > 1 for layer in layers):
        raise Refused("it has no factors for grouped convolutions.")
    try:
        twin = copy_with_plain_weights(module).double()
        twins = {}
        for parameter in twin.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers:
            mine = twin if layer.name == ROOT else twin.get_submodule(layer.name)
            twins[mine] = ChosenLayer(layer.name, mine, layer.weight, layer.bias)
            for parameter in twins[mine].tensors():
                parameter.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Encountered node that may break")
            network = extend(nn.Sequential(twin), use_converter=True)  # wrapped: a lone layer is no graph of modules
    except Exception as error:  # anything may happen while tracing a stranger's network
        raise Refused(f"its converter failed ({_first_line(error)}).") from error
    return twin, network, twins


def _run(
    network: nn.Module,
    loss_module: nn.Module,
    data: tuple[Tensor, Any, Tensor],
    extension: Any,
    twins: Mapping[nn.Module, ChosenLayer],
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """A, B and positions of each layer on one batch; A averaged over positions, and with the bias's row."""
    inputs, targets, expected = data
    found: dict[str, tuple[Tensor, Tensor, int]] = {}

    def collect(module: nn.Module) -> None:
        if module in twins:
            found[twins[module].name] = _factors_of(twins[module], extension.savefield)

    try:
        outputs = network(inputs.double() if inputs.is_floating_point() else inputs)
    except Exception as error:
        raise Refused(f"the converted network does not run in float64 ({_first_line(error)}).") from error
    _check_outputs(outputs, expected)
    try:
        floating = isinstance(targets, Tensor) and targets.is_floating_point()
        loss = loss_module(outputs, targets.double() if floating else targets)
        with backpack(extension, extension_hook=collect):
            loss.backward()
    except Exception as error:
        raise Refused(_first_line(error)) from error
    return found


def _check_outputs(outputs: Any, expected: Tensor) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        raise Refused("the loss is not taken of the network's outputs as they are.")
    tolerance = OUTPUT_TOLERANCE.get(expected.dtype, 1e-2)
    distance = float((outputs.detach() - expected).norm())
    if not distance <= tolerance * float(expected.double().norm()):
        raise Refused("the converted network, in float64, puts out something else.")
    if not outputs.requires_grad:
        raise Refused("the converted network's outputs depend on no chosen layer.")


def _factors_of(layer: ChosenLayer, savefield: str) -> tuple[Tensor, Tensor, int]:
    module: Any = layer.module
    positions = num_positions(layer, module.output)
    stored = [getattr(parameter, savefield) for parameter in layer.tensors()]
    for parameter in layer.tensors():
        delattr(parameter, savefield)
    b = stored[0][0]
    if not layer.weight:
        return torch.ones(1, 1, dtype=torch.float64, device=b.device), b, positions
    a = stored[0][1] / positions
    if layer.bias:
        mean = _mean_patch(module, module.input0.detach())[:, None]
        a = torch.cat([torch.cat([a, mean], dim=1), torch.cat([mean.T, mean.new_ones(1, 1)], dim=1)])
    return a, b, positions


def _mean_patch(module: nn.Module, x: Tensor) -> Tensor:
    """(D,) mean input over samples and positions; unfolding is linear, so the mean sample is unfolded."""
    patches = patches_of(module)
    assert patches is not None
    return patches(module, x.mean(0, keepdim=True))[0, 0].mean(1)


def _loss_module(loss: OutputLoss) -> nn.Module:
    """BackPACK's counterpart of a loss.

    Raises:
        Refused: for a loss or an option that it ignores or does not know.
    """
    options = dict(loss.options)
    reduction = options.get("reduction", "mean")
    unusual = [name for name in ("weight", "pos_weight") if options.get(name) is not None]
    kinds = {
        F.cross_entropy: nn.CrossEntropyLoss,
        F.mse_loss: nn.MSELoss,
        F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    }
    kind: Any = kinds.get(loss.function)
    if kind is None or unusual or loss.outputs.ndim != 2 or reduction not in ("mean", "sum"):
        raise Refused(
            f"it does not know the loss {loss.name}{f' with {unusual[0]}' if unusual else ''} on such outputs."
        )
    if kind is nn.CrossEntropyLoss:
        if loss.targets.is_floating_point() or int(loss.targets.min()) < 0 or options.get("ignore_index", -100) >= 0:
            raise Refused("it takes cross-entropy for class indices only, and ignores none.")
    elif loss.outputs.shape != loss.targets.shape:
        raise Refused("outputs and targets have different shapes.")
    return extend(kind(reduction=reduction))  # type: ignore[no-any-return]


class _BranchingKFLR(KFLR):  # type: ignore[misc]  # BackPACK has no types
    """KFLR on branching graphs: back-propagated columns are linear, so the branches' shares add up."""

    def accumulate_backpropagated_quantities(self, existing: Tensor, other: Tensor) -> Tensor:
        return existing + other


class _EvalBatchNorm(BatchNormNdDerivatives):  # type: ignore[misc]
    """BatchNorm with frozen statistics, which is a scaling; in training mode it mixes samples."""

    def _check_parameters(self, module: nn.Module) -> None:
        super()._check_parameters(module)
        if module.training:
            raise NotImplementedError("BatchNorm in training mode mixes samples.")


class _AdaptiveAvgPool2d(AdaptiveAvgPoolNDDerivatives):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(N=2)


# Modules whose Jacobian BackPACK has, but has not entered in its tables of Kronecker methods.
_MORE = {
    nn.BatchNorm1d: _EvalBatchNorm,
    nn.BatchNorm2d: _EvalBatchNorm,
    nn.BatchNorm3d: _EvalBatchNorm,
    nn.LeakyReLU: LeakyReLUDerivatives,
    nn.ELU: ELUDerivatives,
    nn.AdaptiveAvgPool2d: _AdaptiveAvgPool2d,
}


def _extension(factors: Factors, mc_samples: int) -> Any:
    if factors == "kfra":
        return KFRA()
    extension = KFAC(mc_samples) if factors == "kfac" else _BranchingKFLR()
    for kind, derivatives in _MORE.items():
        extension.set_module_extension(kind, HBPBaseModule(derivatives()))
    return extension


def _first_line(error: BaseException) -> str:
    if isinstance(error, MeasurementError):
        raise error
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
