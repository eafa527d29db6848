"""Hidden units and their wiring: which weights come in, which norms lie between, which weights read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_plasticity.nn.masked_layers import masks_of

CONVOLUTIONS = (nn.modules.conv._ConvNd,)
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Link:
    """Entries of a module that belong to hidden units.

    Attributes:
        module: name of the module.
        entries: (K,) positions: input columns (channels) of a weight, or entries of a flattened norm.
        units: (K,) the unit that owns each entry; a unit may own several (a flattened map, CReLU) or none.
    """

    module: str
    entries: Tensor
    units: Tensor

    @cached_property
    def one_to_one(self) -> bool:
        """Whether entry k belongs to unit k, from the first on."""
        count = torch.arange(len(self.entries), device=self.entries.device)
        return torch.equal(self.entries, count) and torch.equal(self.units, count)


@dataclass(frozen=True)
class HiddenUnits:
    """The units of one Linear or convolution: an output feature or an output channel each.

    Attributes:
        layer: name of the module whose rows are the incoming weights.
        num_units: D.
        readers: the weights that read the activations.
        norms: normalisations between the layer and its readers.
    """

    layer: str
    num_units: int
    readers: tuple[Link, ...]
    norms: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Wiring:
    """What can be acted on unit by unit, and what cannot.

    Attributes:
        layers: by name of the layer, in the order in which they run.
        unsupported: reasons by name of the module.
        outputs: weight layers that no weight reads (the heads).
        order: all Linear and convolution layers in the order of their first call.
    """

    layers: dict[str, HiddenUnits]
    unsupported: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line a layer: units and readers, or the reason why it is left alone."""
        lines = []
        for name, layer in self.layers.items():
            readers = ", ".join(link.module for link in layer.readers)
            norms = f", through {', '.join(link.module for link in layer.norms)}" if layer.norms else ""
            lines.append(f"{name}: {layer.num_units} units, read by {readers}{norms}")
        lines += [f"{name}: left alone, {reason}" for name, reason in self.unsupported.items()]
        return "\n".join(lines) or "no hidden layer"

    def only(self, patterns: Sequence[str]) -> Wiring:
        """The layers that names or wildcards pick.

        Raises:
            ValueError: for a pattern that picks none; the message says which there are, and why others are left out.
        """
        chosen: dict[str, HiddenUnits] = {}
        for pattern in patterns:
            found = {name: layer for name, layer in self.layers.items() if fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(f"layers: {pattern!r} is no layer whose units can be reset. Known:\n{self.describe()}")
            chosen |= found
        ordered = {name: layer for name, layer in self.layers.items() if name in chosen}
        return Wiring(ordered, {}, self.outputs, self.order)


def told_wiring(module: nn.Module, following: Mapping[str, Sequence[str]]) -> Wiring:
    """Wiring as the user tells it: for each hidden layer the modules that follow, norms and readers.

    A reader whose inputs are a multiple of the layer's units gives each unit a block of neighbouring columns, as
    flattening a feature map does.

    Args:
        module: the network.
        following: e.g. ``{"conv": ["norm", "fc"], "fc": ["head"]}``.

    Raises:
        ValueError: for unknown names, modules of other types, or sizes that do not fit.
    """
    modules = dict(module.named_modules())
    layers: dict[str, HiddenUnits] = {}
    for name, followers in following.items():
        if isinstance(followers, str):
            raise ValueError(f"wiring[{name!r}]={followers!r} is one string, expected a list of names.")
        layer = _checked(modules, name, (nn.Linear, *CONVOLUTIONS))
        num_units = unit_count(layer)
        readers: list[Link] = []
        norms: list[Link] = []
        for follower in followers:
            target = _checked(modules, follower, (nn.Linear, *CONVOLUTIONS, *NORMS))
            (norms if isinstance(target, NORMS) else readers).append(_blocks(name, num_units, follower, target))
        if not readers:
            raise ValueError(f"wiring[{name!r}]={list(followers)!r} names no Linear or convolution that reads it.")
        layers[name] = HiddenUnits(name, num_units, tuple(readers), tuple(norms))
    order = tuple(dict.fromkeys([*layers, *(link.module for layer in layers.values() for link in layer.readers)]))
    return Wiring(layers, {}, tuple(name for name in order if name not in layers), order)


def _checked(modules: Mapping[str, nn.Module], name: str, types: tuple[type[nn.Module], ...]) -> nn.Module:
    if name not in modules:
        known = ", ".join(
            key for key, child in modules.items() if isinstance(child, (nn.Linear, *CONVOLUTIONS, *NORMS))
        )
        raise ValueError(f"wiring: {name!r} is no module. Layers and norms that exist: {known or 'none'}.")
    if not isinstance(modules[name], types):
        raise ValueError(
            f"wiring: {name!r} is a {type(modules[name]).__name__}, expected one of "
            f"{', '.join(sorted({kind.__name__.strip('_') for kind in types}))}."
        )
    if "weight" not in modules[name]._parameters and not masks_of(modules[name]):
        raise ValueError(
            f"wiring: the weight of {name!r} is computed from others (a parametrization, prune, weight_norm), expected "
            "one that can be written to: plain or under a Mask."
        )
    return modules[name]


def _blocks(layer: str, num_units: int, name: str, target: nn.Module) -> Link:
    size = entry_count(target)
    if size % num_units or (getattr(target, "groups", 1) != 1 and not isinstance(target, NORMS)):
        raise ValueError(
            f"wiring: {name!r} takes {size} inputs in {getattr(target, 'groups', 1)} group(s), expected one group and "
            f"a multiple of the {num_units} units of {layer!r}."
        )
    entries = torch.arange(size)
    return Link(name, entries, entries // (size // num_units))


def unit_count(layer: nn.Module) -> int:
    """Output features of a Linear, output channels of a convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def entry_count(module: nn.Module) -> int:
    """Input features or channels of a weight; entries of a norm."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return int(torch.Size(module.normalized_shape).numel())
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    size = module.in_channels if isinstance(module, CONVOLUTIONS) else module.num_features
    return int(size)  # type: ignore[arg-type]


def row_dim(layer: nn.Module) -> int:
    """Dimension of the weight that counts units: 0, but 1 in a transposed convolution."""
    return 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
