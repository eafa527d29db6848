"""Make layers sparse: which ones can be, and random masks of an exact number of active entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_plasticity.nn.masked_layers import masks_of, put_mask, stored
from lightning_plasticity.sparsity.density import Distribution, active_counts, check_density

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sparsify(
    module: nn.Module,
    density: float = 0.1,
    distribution: Distribution = "erk",
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Mask the weights of Linear and convolution layers at random, in place.

    All such layers are made sparse, the first and the last included; ``layers`` leaves some dense. (Evci et al. 2020,
    arXiv 1911.11134, keep the first layer dense under ``"uniform"`` and all sparse under ``"erk"``.) Biases and norms
    are dense. The papers draw each entry with the layer's density; here the number of active entries is exact.
    Active entries keep their values, of masked ones nothing is left. An optimizer that already holds the parameters
    keeps them: they are the same objects, named ``<layer>.parametrizations.weight.original`` from now on.

    Args:
        module: any module.
        density: share of the weights that stay, over all sparse layers, in (0, 1].
        distribution: over the layers, see ``active_counts``.
        layers: names or wildcards; None for all Linear and Conv1d to Conv3d. Layers that are tied, frozen, pruned or
            under another parametrization are left out with a warning.
        seed: of the draws; the global random state is not used.

    Returns:
        Number of active entries by layer.

    Raises:
        ValueError: for settings out of range, names that match no layer, layers that have no shape yet, a module with
            nothing to make sparse, or one that has masks already.

    Example:
        >>> import torch
        >>> from lightning_plasticity.sparsity import sparsify
        >>> net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> sparsify(net, 0.2)
        {'0': 100, '2': 80}
        >>> int((net[0].weight != 0).sum())
        100
    """
    check_density(density, distribution)
    chosen, left_out = chosen_layers(module, layers)
    if left_out:
        rank_zero_warn(
            f"These layers stay dense: {_listed(left_out)}. To silence this name the others with layers=[...]."
        )
    if masked := [name for name, layer in chosen.items() if masks_of(layer)]:
        raise ValueError(
            f"{', '.join(masked)} have masks already, expected dense layers. What to do: sparsify once; SparseTopology "
            "takes over masks that are there."
        )
    counts = active_counts({name: layer.weight.shape for name, layer in chosen.items()}, density, distribution)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in chosen.items():
        weight = layer.weight
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: counts[name]]] = True
        put_mask(layer, mask.reshape(weight.shape).to(weight.device))
    return counts


def chosen_layers(module: nn.Module, patterns: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that can be sparse, or are, by name; and why others that are meant cannot.

    Raises:
        ValueError: for patterns that match nothing, lazy layers, and when nothing is left.
    """
    known = {name: child for name, child in module.named_modules() if isinstance(child, KINDS)}
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"layers: {pattern!r} matches no Linear or convolution. Those that exist: {', '.join(known) or 'none'}."
            )
    wanted = {n: c for n, c in known.items() if patterns is None or any(fnmatchcase(n, p) for p in patterns)}
    if lazy := [
        name for name, child in wanted.items() if isinstance(child._parameters.get("weight"), UninitializedParameter)
    ]:
        raise ValueError(
            f"{', '.join(lazy)} have no shape yet, expected layers that know their inputs. What to do: run the module "
            "on one batch first, or leave them out with layers=[...]."
        )
    owners = _owners(module)
    reasons = {name: why for name, child in wanted.items() if (why := _reason(child, owners))}
    found = {name: child for name, child in wanted.items() if name not in reasons}
    if not found:
        raise ValueError(
            f"Nothing to make sparse in {type(module).__name__}, expected Linear or convolution layers. "
            f"{f'Left out: {_listed(reasons)}. ' if reasons else ''}Layers that a LightningModule makes in "
            "configure_model are not there when a fit is set up; call sparsify at the end of it."
        )
    return found, reasons


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in reasons.items())


def _owners(module: nn.Module) -> dict[int, int]:
    """In how many places each parameter is."""
    places: dict[int, int] = {}
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                places[id(parameter)] = places.get(id(parameter), 0) + 1
    return places


def _reason(layer: Any, owners: dict[int, int]) -> str | None:
    """Why a layer cannot be sparse."""
    if parametrize.is_parametrized(layer) and not masks_of(layer):
        return "under another parametrization"
    if not masks_of(layer) and layer._parameters.get("weight") is None:
        return "its weight is computed from others, as torch.nn.utils.prune and weight_norm do"
    weight = stored(layer)
    if owners[id(weight)] > 1:
        return "its weight is shared"
    if not weight.requires_grad or not weight.is_floating_point():
        return "its weight is frozen"
    return None
