"""Mean activations of hidden units, taken where they are read, during training's own forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.nn import Link, Wiring, is_measuring
from lightning_plasticity.nn.features import first_tensor

Reduce = Callable[[Tensor], Tensor]
Key = tuple[str, int]  # layer, number of the reader
Totals = dict[Key, Tensor]


class ActivationMeans:
    """Hooks on the readers of every layer; sums over samples and positions, in float64.

    Only passes count that training itself differentiates: with gradients on, outside ``undisturbed``, and while
    ``recording`` is set. Passes add up until ``take`` is called, so that gradient accumulation needs no care.

    Args:
        module: the network.
        wiring: its wiring.
        keep: also keep the activations (references, no copies), for means of other functions of them.
    """

    def __init__(self, module: nn.Module, wiring: Wiring, *, keep: bool = False) -> None:
        self.recording = True
        self._keep = keep
        self._sums: Totals = {}  # see ``take``
        self._before: Totals | None = None  # the sums when the present batch began
        self._kept: dict[Key, list[Tensor]] = {}
        modules = dict(module.named_modules())
        by_reader: dict[str, list[tuple[Key, Link, int]]] = {}
        for name, layer in wiring.layers.items():
            for index, link in enumerate(layer.readers):
                by_reader.setdefault(link.module, []).append(((name, index), link, layer.num_units))
        self._handles = [
            modules[name].register_forward_pre_hook(self._hook(modules[name], wanted), with_kwargs=True)
            for name, wanted in by_reader.items()
        ]

    def begin(self) -> None:
        """Record from here; until ``pause`` the state to save is that of now, for a cut batch is run again."""
        self.recording, self._before = True, dict(self._sums)

    def pause(self) -> None:
        """Do not record until ``begin``."""
        self.recording, self._before = False, None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, reader: nn.Module, wanted: list[tuple[Key, Link, int]]) -> Callable[..., None]:
        spatial = len(getattr(reader, "kernel_size", ()))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.recording or is_measuring() or not torch.is_grad_enabled():
                return
            value = first_tensor(args if args else kwargs)
            if value is None:
                return
            samples = value.shape[0] if value.ndim > spatial + 1 else 1
            value = _columns_last(value.detach(), spatial)
            count = value.new_full((value.shape[1],), len(value))
            totals = torch.stack([value.sum(0), value.abs().sum(0), count]).double()  # (3, columns)
            for key, link, num_units in wanted:
                own = sum_by_unit(link, totals, num_units)
                own = torch.cat([own, torch.full_like(own[:1], samples)])
                self._sums[key] = self._sums[key] + own if key in self._sums else own
                if self._keep:
                    self._kept.setdefault(key, []).append(value[:, link.entries.to(value.device)])

        return hook

    def take(self) -> Totals:
        """Sums since the last call, (4, D) for each reader: of h, of ``|h|``, of values and of samples."""
        sums, self._sums = self._sums, {}
        return sums

    def take_kept(self) -> dict[Key, list[Tensor]]:
        """The activations since the last call, (values, entries) for each pass."""
        kept, self._kept = self._kept, {}
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Sums of a step that is not complete."""
        sums = self._sums if self._before is None else self._before
        return {"sums": [[*key, total.clone()] for key, total in sums.items()]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on where ``state_dict`` left off."""
        self._sums = {(name, index): total.to(device) for name, index, total in state["sums"]}


def joined(totals: Totals, wiring: Wiring, reduce: Reduce | None = None) -> Totals | None:
    """Sums over processes; None when some reader has not been called on any.

    Args:
        totals: of this process.
        wiring: whose readers are asked for.
        reduce: sums a tensor over processes; every process has to call it.
    """
    widths = {
        (name, index): layer.num_units for name, layer in wiring.layers.items() for index in range(len(layer.readers))
    }
    if reduce is not None and widths:
        device = next((total.device for total in totals.values()), torch.device("cpu"))
        filled = [
            totals.get(key, torch.zeros(4, width, dtype=torch.float64, device=device)) for key, width in widths.items()
        ]
        parts = torch.split(reduce(torch.cat(filled, 1)), list(widths.values()), 1)
        totals = dict(zip(widths, parts, strict=True))
    return totals if all(key in totals and bool((totals[key][2] > 0).all()) for key in widths) else None


def _columns_last(value: Tensor, spatial: int) -> Tensor:
    """(values, columns) in at least single precision."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    return value.movedim(-1 - spatial, -1).reshape(-1, value.shape[-1 - spatial])


def sum_by_unit(link: Link, totals: Tensor, num_units: int) -> Tensor:
    """Sums over the entries of each unit: (..., columns) to (..., D)."""
    if link.one_to_one and totals.shape[-1] == num_units:
        return totals
    entries, units = link.entries.to(totals.device), link.units.to(totals.device)
    out = torch.zeros(*totals.shape[:-1], num_units, dtype=totals.dtype, device=totals.device)
    return out.index_add_(-1, units, totals[..., entries])
