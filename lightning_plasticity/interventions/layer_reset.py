"""Reset whole layers: new parameters from their initial distribution, and no optimizer state of the old ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Generator, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lightning_plasticity.interventions.initial import reset_parameters, resetter
from lightning_plasticity.interventions.optimizer_state import forget_all
from lightning_plasticity.nn import Wiring
from lightning_plasticity.nn.masks import Mask

LayerInit = Literal["default", "zero"]


def reset_layers(
    module: nn.Module,
    names: Iterable[str],
    generator: Generator,
    optimizers: Iterable[Optimizer] = (),
    init: LayerInit = "default",
) -> None:
    """Give layers new parameters.

    Source: Nikishin et al. 2022 (arXiv 2205.07802, section 4), who reset the last layers; ``init="zero"`` is what
    Dohare et al. 2024 do to the head of Continual ImageNet.

    Args:
        module: the network.
        names: of submodules; all ``reset_parameters`` in them are called.
        generator: seeds the draws.
        optimizers: whose state of these parameters is dropped, step counts included.
        init: ``"default"`` calls ``reset_parameters``, ``"zero"`` sets all parameters to zero.
    """
    modules = dict(module.named_modules())
    optimizers = list(optimizers)
    for name in names:
        layer = modules[name]
        if init == "default":
            # A parent after its children: it may know better, but need not draw all of theirs (MultiheadAttention).
            for part in reversed(list(layer.modules())):
                if resetter(part) is not None:
                    reset_parameters(part, generator)
        else:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
        forget_all(optimizers, layer.parameters())


def refuse_derived(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse layers whose weights are computed from other parameters, which ``reset_parameters`` does not reach.

    Raises:
        ValueError: names them; masks are no such thing.
    """
    derived = []
    for name in names:
        for path, part in module.get_submodule(name).named_modules(prefix=name):
            chains = part.parametrizations.items() if parametrize.is_parametrized(part) else ()
            roles = [role for role, chain in chains if not (len(chain) == 1 and isinstance(chain[0], Mask))]
            own = part._parameters
            roles += [key.removesuffix(end) for key in own for end in ("_orig", "_v") if _hidden(part, key, end)]
            derived += [f"{path}.{role}" for role in roles]
    if derived:
        raise ValueError(
            f"{', '.join(derived)}: computed from other parameters (weight norm, spectral norm, pruning), so that "
            "reset_parameters would change nothing; name other layers, or remove the parametrization."
        )


def _hidden(part: nn.Module, key: str, end: str) -> bool:
    """Whether a parameter stands behind an attribute that hooks compute, as old weight norm and pruning have it."""
    role = key.removesuffix(end)
    return key.endswith(end) and role not in part._parameters and hasattr(part, role)


def resettable(module: nn.Module) -> list[str]:
    """Names of the submodules that together own all parameters and can all be reset; outermost ones.

    Raises:
        ValueError: for parameters that no ``reset_parameters`` draws; the message names them.
    """
    found: list[str] = []
    stuck: list[str] = []

    def visit(name: str, child: nn.Module) -> None:
        if resetter(child) is not None and name:
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                found.append(name)
            return
        stuck.extend(f"{name}.{key}".lstrip(".") for key, p in child._parameters.items() if p is not None)
        for key, grandchild in child.named_children():
            visit(f"{name}.{key}".lstrip("."), grandchild)

    visit("", module)
    if stuck:
        raise ValueError(
            f"layers='all': nothing says how to draw {', '.join(stuck)}; give the module that owns it a method "
            "reset_parameters(), or name the layers to reset."
        )
    return list(dict.fromkeys(found))


def named_resets(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Submodules by name or wildcard that can be reset; outermost ones.

    Raises:
        ValueError: for a pattern that matches none; the message lists those that exist.
    """
    able = [name for name, child in module.named_modules() if name and any(resetter(part) for part in child.modules())]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in able if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"layers: {pattern!r} matches no module with reset_parameters(). Those that exist: "
                f"{', '.join(able) or 'none'}."
            )
        chosen |= dict.fromkeys(found)
    inside = {name for name in chosen for other in chosen if name.startswith(f"{other}.")}
    return [name for name in chosen if name not in inside]


def last_layers(wiring: Wiring, choice: Literal["head"] | int) -> list[str]:
    """The heads (weights that no weight reads), or the last so many Linear and convolution layers to be called.

    Raises:
        ValueError: when there are not so many.
    """
    if choice == "head":
        if not wiring.outputs:
            raise ValueError(
                f"layers='head': no head was found, name it with layers=[...]. Known:\n{wiring.describe()}"
            )
        return list(wiring.outputs)
    if choice > len(wiring.order):
        raise ValueError(
            f"layers={choice}: there are {len(wiring.order)} Linear and convolution layers; pass at most that."
        )
    return list(wiring.order[-choice:])
