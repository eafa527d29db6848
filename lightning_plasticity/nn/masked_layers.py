"""Layers whose weight is under a ``Mask``: put one on, take all off for a while, and find what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_plasticity.nn.masks import Mask


def put_mask(layer: nn.Module, mask: Tensor, name: str = "weight") -> None:
    """Hold a layer's weight under a mask.

    The parameter stays the same object under a new name, so an optimizer that has it keeps it. Unlike other
    parametrized layers this one can be pickled.

    Args:
        layer: owner of the weight.
        mask: bool, of the weight's shape; True where an entry is active.
        name: of the weight.
    """
    parametrize.register_parametrization(layer, name, Mask(mask))
    type(layer).__reduce_ex__ = _reduce  # type: ignore[assignment]  # a class that this one layer has for itself


def masks_of(layer: nn.Module) -> dict[str, Mask]:
    """The masks of a layer's own weights by name; empty where another parametrization is among them."""
    if not parametrize.is_parametrized(layer):
        return {}
    chains: Any = layer.parametrizations
    found = {name: chain[0] for name, chain in chains.items() if len(chain) == 1 and isinstance(chain[0], Mask)}
    return found if len(found) == len(chains) else {}


def masked_layers(module: nn.Module) -> dict[str, nn.Module]:
    """All layers with masks, by name."""
    return {name: child for name, child in module.named_modules() if masks_of(child)}


def stored(layer: nn.Module, name: str = "weight") -> Any:
    """The parameter behind a weight: what can be written to, and what an optimizer holds."""
    return getattr(layer.parametrizations, name).original if name in masks_of(layer) else getattr(layer, name)


@torch.no_grad()
def clear_masked(layer: nn.Module) -> None:
    """Set what is stored of masked entries to zero."""
    for name, mask in masks_of(layer).items():
        stored(layer, name).masked_fill_(~mask.mask, 0.0)


@contextmanager
def without_masks(module: nn.Module) -> Iterator[None]:
    """Inside, masked layers are plain ones of dense weights, to initialise or to load; afterwards masked again.

    What was written to active entries stays; masked entries are zero again.
    """
    undo = [_plain(layer) for layer in masked_layers(module).values()]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _plain(layer: nn.Module) -> Callable[[], None]:
    """Make it a layer of its own class; returns what undoes that."""
    masked, children = type(layer), dict(layer._modules)
    originals = {name: stored(layer, name) for name in masks_of(layer)}
    own = dict(layer._parameters)
    layer.__class__ = _base(masked)
    del layer._modules["parametrizations"]
    _fill(layer._parameters, originals | own)

    def put_back() -> None:
        now = {name: layer._parameters.pop(name) for name in originals}
        _fill(layer._modules, children)
        layer.__class__ = masked
        with torch.no_grad():
            for name, value in now.items():
                if value is not None and value is not originals[name]:
                    originals[name].copy_(value)
        clear_masked(layer)

    return put_back


def _fill(target: dict[str, Any], values: dict[str, Any]) -> None:
    target.clear()
    target.update(values)


def _base(cls: type) -> Any:
    """The class that ``torch.nn.utils.parametrize`` has derived this one from."""
    return cls.__mro__[1]


# ---- pickling ------------------------------------------------------------------------------------------------------
# Torch refuses to pickle parametrized modules, whose class exists in one process only: send the plain layer and masks.


def _reduce(self: nn.Module, protocol: Any) -> Any:
    masks = masks_of(self)
    if not masks:
        return object.__reduce_ex__(self, protocol)  # refuses
    children = {name: child for name, child in self._modules.items() if name != "parametrizations"}
    parameters = {name: stored(self, name) for name in masks} | self._parameters
    state = {**self.__dict__, "_modules": children, "_parameters": parameters}
    return _blank, (_base(type(self)),), (state, {name: mask.mask for name, mask in masks.items()})


def _blank(base: type) -> Any:
    cls: Any = type(f"Parametrized{base.__name__}", (base,), {"__setstate__": _restore})
    return cls.__new__(cls)


def _restore(self: Any, state: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    self.__class__ = _base(type(self))
    self.__setstate__(state[0])
    for name, mask in state[1].items():
        put_mask(self, mask, name)
