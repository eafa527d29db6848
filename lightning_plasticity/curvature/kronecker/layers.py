"""Which layers get Kronecker factors, and the running sums of those factors over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.curvature.kronecker.block import KroneckerBlock
from lightning_plasticity.curvature.kronecker.masked_block import MaskedBlock
from lightning_plasticity.curvature.layers import LayerCall, LayerTaps
from lightning_plasticity.curvature.loss.output_loss import OutputLoss, batch_shares
from lightning_plasticity.nn.masks import parameter_of

ROOT = "root"  # name of the layer when the whole model is one


@dataclass(frozen=True)
class ChosenLayer:
    """A linear layer or convolution, and which of its parameters count.

    Attributes:
        name: its name in the model.
        module: the layer.
        weight: whether the weight counts.
        bias: whether the bias counts.
        mask: (O, ...) bool, the active entries of the weight; None where it has no mask.
    """

    name: str
    module: nn.Module
    weight: bool
    bias: bool
    mask: Tensor | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that count; of a masked weight as without the mask."""
        prefix = "" if self.name == ROOT else f"{self.name}."
        return tuple(prefix + own for own in ("weight", "bias") if getattr(self, own))

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution, else 1."""
        return int(getattr(self.module, "groups", 1))

    def tensors(self) -> list[nn.Parameter]:
        """The parameters that count."""
        found = [parameter_of(self.module, own)[0] for own in ("weight", "bias") if getattr(self, own)]
        return [parameter for parameter in found if parameter is not None]

    def group_mask(self, group: int) -> Tensor | None:
        """(O, D) bool, the active entries of a group, those of the bias among them; None where all are active."""
        if self.mask is None or not self.weight:
            return None
        mask = self.mask.reshape(self.groups, len(self.mask) // self.groups, -1)[group].cpu()
        if bool(mask.all()):
            return None
        return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1) if self.bias else mask


@dataclass
class FactorSums:
    """Factors added up over batches, so that they are those of all samples at once.

    A is a mean over samples, whatever the loss makes of them, and batches count by their size. B is of the loss, so
    batches count by what the loss divides by: weights of classes, kept targets, nothing for a sum.

    Attributes:
        inputs: (G, D, D) float64 sum of N_b x A over batches, by layer; G groups.
        outputs: (G, O, O) float64 B of each batch.
        positions: T, of the last batch.
        skipped: reasons, by layer.
        losses: the batches' losses, without their graphs.
        dtype: what the network ran in.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    losses: list[OutputLoss] = field(default_factory=list)
    dtype: torch.dtype = torch.float64

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(loss.num_samples for loss in self.losses)

    def begin(self, loss: OutputLoss) -> None:
        """Note a batch's loss; its factors follow by ``add``."""
        self.losses.append(loss.detached())

    def add(self, name: str, inputs: Tensor, outputs: Tensor, positions: int) -> None:
        """Add the factors of a layer on the batch that has begun: (G, D, D) and (G, O, O)."""
        part = inputs.detach().to("cpu", torch.float64) * self.losses[-1].num_samples
        self.inputs[name] = self.inputs[name] + part if name in self.inputs else part
        self.outputs.setdefault(name, []).append(outputs.detach().to("cpu", torch.float64))
        self.positions[name] = positions

    def totals(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer on all samples, (G, D, D) and (G, O, O)."""
        shares = batch_shares(self.losses)
        parts = zip(shares, self.outputs[name], strict=True)
        return self.inputs[name] / self.num_samples, torch.stack([share * part for share, part in parts]).sum(0)

    def blocks(self, layers: Iterable[ChosenLayer], source: str) -> dict[str, KroneckerBlock]:
        """The finished blocks, in the order of the layers.

        Raises:
            MeasurementError: when a factor is not finite.
        """
        found = {}
        for layer in layers:
            if layer.name in self.skipped or layer.name not in self.inputs:
                continue
            grouped = layer.groups > 1
            for group, factors in enumerate(zip(*self.totals(layer.name), strict=True)):
                a, b = (_symmetric(factor, layer.name) for factor in factors)
                about: dict[str, Any] = {
                    "num_positions": self.positions[layer.name],
                    "group": group if grouped else None,
                    "source": source,
                    "dtype": self.dtype,
                }
                name, mask = f"{layer.name}.group{group}" if grouped else layer.name, layer.group_mask(group)
                if mask is None:
                    found[name] = KroneckerBlock(layer.name, layer.parameters, a, b, **about)
                elif bool(mask.any()):
                    found[name] = MaskedBlock(layer.name, layer.parameters, a, b, **about, mask=mask)
                else:
                    self.skipped[name] = "all its entries are masked."
        return found


def choose_layers(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[list[ChosenLayer], dict[str, str]]:
    """Layers that can have Kronecker factors, and why others with chosen parameters cannot."""
    chosen = {id(parameter) for parameter in parameters}
    owners: dict[int, list[str]] = {}
    masked = {id(part) for module in model.modules() for part in _mask_holders(module)}
    modules = [(name or ROOT, module) for name, module in model.named_modules() if id(module) not in masked]
    for name, module in modules:
        for parameter in _own(module).values():
            owners.setdefault(id(parameter), []).append(name)
    layers: list[ChosenLayer] = []
    skipped: dict[str, str] = {}
    for name, module in modules:
        own = {key: id(parameter) for key, parameter in _own(module).items()}
        if not any(parameter in chosen for parameter in own.values()):
            continue
        sharers = sorted({other for parameter in own.values() for other in owners[parameter]} - {name})
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            skipped[name] = f"{type(module).__name__} has no Kronecker factors; linear layers and convolutions have."
        elif not set(own) <= {"weight", "bias"} or "weight" not in own:
            skipped[name] = f"its parameters are {', '.join(own)}, expected weight and bias (is it parametrised?)."
        elif sharers:
            skipped[name] = f"it shares parameters with {', '.join(sharers)}."
        elif parameter_of(module, "bias")[1] is not None:
            skipped[name] = "its bias is masked."
        else:
            counts = own["weight"] in chosen, own.get("bias") in chosen
            layers.append(ChosenLayer(name, module, *counts, mask=parameter_of(module, "weight")[1]))
    return layers, skipped


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters; those under a mask by the name of the weight that they make."""
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    for role in ("weight", "bias"):
        parameter, mask = parameter_of(module, role)
        if parameter is not None and mask is not None:
            own = {key: value for key, value in own.items() if value is not parameter} | {role: parameter}
    return own


def _mask_holders(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the parameters under a layer's masks, which are counted as the layer's own."""
    if not parametrize.is_parametrized(module):
        return []
    chains: Any = module.parametrizations
    return [chains[role] for role in ("weight", "bias") if role in chains and parameter_of(module, role)[1] is not None]


def usable_calls(
    taps: LayerTaps, layers: Iterable[ChosenLayer], num_samples: int
) -> tuple[dict[str, LayerCall], dict[str, str]]:
    """Calls of layers that ran once, on the whole batch; reasons for the others."""
    calls: dict[str, LayerCall] = {}
    skipped: dict[str, str] = {}
    for layer in layers:
        found = taps.calls.get(layer.module, [])
        if not found:
            skipped[layer.name] = "it was never called (its weights may be used elsewhere, as in attention)."
        elif len(found) > 1:
            skipped[layer.name] = f"it was called {len(found)} times in one forward pass."
        elif found[0].output.ndim < 2 or not found[0].input.shape[0] == found[0].output.shape[0] == num_samples:
            skipped[layer.name] = (
                f"its input has shape {tuple(found[0].input.shape)}, and the first dimension is not the "
                f"{num_samples} samples."
            )
        else:
            calls[layer.name] = found[0]
    return calls, skipped


def no_layers(skipped: Mapping[str, str]) -> MeasurementError:
    """The error of a network in which nothing has a Kronecker block."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    return MeasurementError(f"No layer has Kronecker factors here ({reasons}) Use ggn_spectrum, which is exact.")


def _symmetric(factor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(factor).all()):
        raise MeasurementError(f"The factors of {name} hold NaN or inf; look for them in weights, data and loss.")
    return 0.5 * (factor + factor.T)
