"""Find the wiring of hidden units by watching one forward pass: labels travel with the activations.

Each output of a Linear or a convolution gets labels, one number a unit. Functions that move values about are applied to
the labels too, so flattening, concatenation and the like need no rule of their own; a weight that reads labelled values
then knows which column belongs to which unit. What cannot be followed is named with the reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_plasticity.nn.masked_layers import masks_of, stored
from lightning_plasticity.nn.unit_labels import (
    FRESH,
    MOVES,
    NORM_CALLS,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    SAME,
    SUMS,
    WEIGHT_CALLS,
    by_channel,
    moved,
    nested_tensors,
)
from lightning_plasticity.nn.wiring import CONVOLUTIONS, NORMS, HiddenUnits, Link, Wiring, unit_count


@dataclass(frozen=True)
class _Followed:
    """What is known of one activation."""

    labels: Tensor | None  # shape of the activation: number of the unit, -1 where there is none
    mixed: dict[str, str] = field(default_factory=dict)  # layers whose units went in but cannot be told apart, and why


class _Tracer(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.modules = {name: child for name, child in module.named_modules() if name}
        users: dict[int, set[tuple[int, str]]] = {}
        for child in module.modules():
            for key, parameter in child._parameters.items():
                users.setdefault(id(parameter), set()).add((id(child), key))
        self.weights: dict[int, str] = {}
        self.norms: dict[int, str] = {}
        self.tied: set[str] = set()
        for name, child in self.modules.items():
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)) and own_weight(child) is not None:
                weight = own_weight(child)
                self.weights[id(weight)] = name
                if any(len(users[id(own)]) > 1 for own in (weight, *child._parameters.values()) if own is not None):
                    self.tied.add(name)
            elif isinstance(child, NORMS):
                parts = [child._parameters.get(k) for k in ("weight", "bias")] + [child._buffers.get("running_mean")]
                self.norms |= {id(part): name for part in parts if part is not None}
        self.bases: dict[str, int] = {}
        self.owners: list[str] = []  # layer by number of the unit
        self.followed: dict[int, _Followed] = {}
        self.keep: list[Any] = []  # keeps ids unique while we compare them
        self.nodes: dict[int, str] = {}  # autograd nodes that made labelled activations
        self.reads: dict[str, Tensor] = {}  # labels by input column of a weight
        self.normed: dict[str, Tensor] = {}  # labels by entry of a norm
        self.unsupported: dict[str, str] = {}
        self.direct: list[str] = []  # layers that the loss is computed from, past all weights

    # ---- one function call -----------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, then carry the labels from its arguments to its results."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        name = name.strip("_")
        if name == "masked_fill" and id(args[0]) in self.weights:  # a weight under its mask
            self.keep.append(result)
            self.weights[id(result)] = self.weights[id(args[0])]
        if name in WEIGHT_CALLS and self._weight_call(name, args, kwargs, result):
            return result
        sources = [self.followed[id(t)] for t in nested_tensors((args, kwargs)) if id(t) in self.followed]
        if sources and name not in FRESH:
            outputs = list(nested_tensors(result))
            if name in ("setitem", "copy"):
                outputs = [args[0]]
            if outputs:
                self._carry(func, name, args, kwargs, outputs, sources)
        return result

    def _note(self, tensor: Tensor, followed: _Followed) -> None:
        self.keep.append(tensor)
        self.followed[id(tensor)] = followed

    def _carry(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        sources: list[_Followed],
    ) -> None:
        mixed = {layer: why for source in sources for layer, why in source.mixed.items()}
        first = next((t for t in nested_tensors((args, kwargs)) if id(t) in self.followed), None)
        labels: list[Tensor | None] | None = None
        if name in SUMS or name in PRODUCTS:
            labels = self._combined(name, args, kwargs, outputs[0], mixed)
        elif first is not None and (own := self.followed[id(first)].labels) is not None:
            if name in NORM_CALLS:
                self._norm_call(name, args, kwargs, own)
            labels = moved(func, name, args, kwargs, outputs, own, self._labels)
        elif name in MOVES | SAME | POOLS | NORM_CALLS | REDUCTIONS:
            labels = [None] * len(outputs)  # nothing but mixed units came in
        if labels is None:
            why = f"its activations pass through {name}(), which cannot be followed"
            mixed |= {layer: why for source in sources for layer in self._layers(source.labels)}
            labels = [None] * len(outputs)
            if any(isinstance(t, nn.Parameter) for t in nested_tensors((args, kwargs))):
                self._refuse(mixed)
        for output, own_labels in zip(outputs, labels, strict=True):
            self._note(output, _Followed(own_labels, dict(mixed)))

    def _labels(self, tensor: Tensor) -> Tensor | None:
        followed = self.followed.get(id(tensor))
        return None if followed is None else followed.labels

    def _combined(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, mixed: dict[str, str]
    ) -> list[Tensor | None]:
        """Labels of a sum or a product; where units meet others they cannot be told apart any more."""
        tensors = list(nested_tensors((args, kwargs)))
        known = [labels for t in tensors if (labels := self._labels(t)) is not None]
        others = [t for t in tensors if id(t) not in self.followed and t.numel() > 1]
        word = "added to" if name in SUMS else "multiplied with"
        layers = {layer: None for labels in known for layer in self._layers(labels)}
        if mixed:
            mixed |= {layer: f"its units are {word} those of {', '.join(mixed)}" for layer in layers}
            return [None]
        wide = [labels.expand(output.shape) for labels in known]
        if any(not torch.equal(wide[0], labels) for labels in wide[1:]):
            for layer in layers:
                rest = ", ".join(other for other in layers if other != layer) or "others of its own"
                mixed[layer] = f"its units are {word} those of {rest}"
            return [None]
        foreign = [t for t in others if name in SUMS or t.requires_grad]
        if foreign:
            what = (
                "a learned tensor" if isinstance(foreign[0], nn.Parameter) else "a tensor that is not a hidden unit's"
            )
            mixed |= dict.fromkeys(layers, f"its units are {word} {what}")
            return [None]
        return [wide[0]] if wide else [None]

    # ---- weights and norms -----------------------------------------------------------------------------------------

    def _weight_call(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
        """Read labels and give new ones; False for a weight that no layer owns."""
        given = list(args) + [kwargs[key] for key in ("input", "weight") if key in kwargs]
        source, weight = given[0], given[1]
        name = self.weights.get(id(weight))
        if name is None:
            if (read := self.followed.get(id(source))) is not None:
                why = f"{function}() reads it with a weight that is no layer's own parameter"
                self._refuse(read.mixed | dict.fromkeys(self._layers(read.labels), why))
            return False
        layer = self.modules[name]
        if name not in self.bases:
            self.bases[name] = len(self.owners)
            self.owners += [name] * unit_count(layer)
        spatial = weight.ndim - 2
        self._read(name, layer, source, -1 - spatial)
        numbers = torch.arange(unit_count(layer), device=output.device) + self.bases[name]
        self._note(
            output,
            _Followed(
                numbers.reshape(-1, *[1] * spatial).expand(output.shape) if spatial else numbers.expand(output.shape)
            ),
        )
        if output.grad_fn is not None:
            self.keep.append(output.grad_fn)
            self.nodes[id(output.grad_fn)] = name
        return True

    def _read(self, name: str, layer: nn.Module, source: Tensor, dim: int) -> None:
        read = self.followed.get(id(source))
        if read is None:
            self._refuse(dict.fromkeys(self._behind(source), f"the way from it to {name} cannot be followed"))
            return
        self._refuse(read.mixed)
        if read.labels is None:
            return
        columns = read.labels.movedim(dim, -1).reshape(-1, read.labels.shape[dim])
        layers = self._layers(columns)
        row = columns[0]
        before = self.reads.setdefault(name, row)
        if not bool((columns == row).all()):
            self._refuse(dict.fromkeys(layers, f"{name} reads its units in other columns at other positions"))
        elif not torch.equal(before, row):
            both = [*layers, *self._layers(before)]
            self._refuse(dict.fromkeys(both, f"{name} reads several activations with the same weights"))
        elif getattr(layer, "groups", 1) != 1:
            self._refuse(dict.fromkeys(layers, f"{name}, which reads it, is a grouped convolution"))
        elif name in self.tied:
            self._refuse(dict.fromkeys(layers, f"{name}, which reads it, shares its parameters with another module"))
        elif name in layers:
            self._refuse({name: "it reads its own activations"})

    def _norm_call(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor) -> None:
        name = next((self.norms[id(t)] for t in nested_tensors((args, kwargs)) if id(t) in self.norms), None)
        if name is None:
            return
        if function in ("layer_norm", "rms_norm"):
            shape = self.modules[name].normalized_shape  # what the entries are
            rows = labels.reshape(-1, torch.Size(shape).numel())
            row: Tensor | None = rows[0] if bool((rows == rows[0]).all()) else None
        else:
            row = by_channel(labels)
        before = self.normed.get(name)
        if row is None or (before is not None and not torch.equal(before, row)):
            self._refuse(dict.fromkeys(self._layers(labels), f"the entries of {name} do not belong to one unit each"))
        else:
            self.normed[name] = row

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _layers(self, labels: Tensor | None) -> list[str]:
        if labels is None:
            return []
        numbers = labels.reshape(-1)
        if labels.ndim > 1 and any(stride == 0 for stride in labels.stride()):  # spare copies of expanded labels
            numbers = labels[tuple(slice(0, 1) if s == 0 else slice(None) for s in labels.stride())].reshape(-1)
        return list(dict.fromkeys(self.owners[n] for n in torch.unique(numbers).tolist() if n >= 0))

    def _refuse(self, reasons: dict[str, str]) -> None:
        for layer, why in reasons.items():
            self.unsupported.setdefault(layer, why)

    def ended(self, returned: object) -> None:
        """See what the loss is computed from; a pass that returns no loss tells nothing of it."""
        returned = returned["loss"] if isinstance(returned, Mapping) and "loss" in returned else returned
        for tensor in nested_tensors(returned):
            if tensor.ndim == 0:
                self.direct += self._behind(tensor)

    def _behind(self, tensor: Tensor) -> list[str]:
        """Layers whose activations went into a tensor, by its autograd graph."""
        found: dict[str, None] = {}
        waiting, seen = [tensor.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            self.keep.append(node)
            if id(node) in self.nodes:
                found[self.nodes[id(node)]] = None
            else:
                waiting += [following for following, _ in node.next_functions]
        return list(found)

    def wiring(self, frozen: set[int]) -> Wiring:
        """What was found, once the pass is over."""
        readers = self._links(self.reads)
        norms = self._links(self.normed)
        order = tuple(self.bases)
        outputs = tuple(name for name in order if name not in readers and name not in self.unsupported)
        self._refuse(dict.fromkeys(sorted(self.tied), "it shares its parameters with another module"))
        past = "its activations also go into the loss past the weights that read them"
        self._refuse({name: past for name in self.direct if name in readers})
        for name, links in readers.items():
            self._refuse(self._faults(name, links, frozen))
        layers = {
            name: HiddenUnits(name, unit_count(self.modules[name]), tuple(readers[name]), tuple(norms.get(name, ())))
            for name in order
            if name in readers and name not in self.unsupported
        }
        for name, child in self.modules.items():
            own = [p for p in child._parameters.values() if p is not None and id(p) not in self.weights]
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)):
                if name not in self.bases:
                    why = "it was not called as a layer with its own weight (shared, parametrised, or not reached)"
                    self.unsupported.setdefault(name, why)
            elif own and not isinstance(child, NORMS):
                self.unsupported.setdefault(name, f"a {type(child).__name__} is no Linear or convolution")
        return Wiring(layers, self.unsupported, outputs, order)

    def _faults(self, name: str, links: list[Link], frozen: set[int]) -> dict[str, str]:
        stuck = [
            part for part in (name, *(link.module for link in links)) if id(own_weight(self.modules[part])) in frozen
        ]
        return {name: f"the weight of {stuck[0]} is frozen"} if stuck else {}

    def _links(self, rows: dict[str, Tensor]) -> dict[str, list[Link]]:
        links: dict[str, list[Link]] = {}
        owners = {base: layer for layer, base in self.bases.items()}
        for name, row in rows.items():
            row = row.cpu()
            for base, layer in owners.items():
                mine = (row >= base) & (row < base + unit_count(self.modules[layer]))
                if bool(mine.any()):
                    entries = mine.nonzero().reshape(-1)
                    links.setdefault(layer, []).append(Link(name, entries, row[entries] - base))
        return links


def own_weight(layer: nn.Module) -> Any:
    """The parameter that is a layer's weight, or that its mask masks; None where it is computed in other ways."""
    return stored(layer) if "weight" in masks_of(layer) else layer._parameters.get("weight")


def find_wiring(module: nn.Module, run: Callable[[], object]) -> Wiring:
    """Trace the wiring of hidden units through sequential, branching and residual networks.

    Followed: Linear and convolutions, activations, norms, dropout, pooling, flattening, concatenation and other moves
    of values. Left alone, with the reason: units that are added to or multiplied with others (the stream of a residual
    network; the layers inside its branches are followed), that attention or a recurrent layer reads, tied, frozen,
    parametrised (masks excepted) and grouped weights, and units that the loss looks at directly. Call it under
    ``undisturbed``.

    Args:
        module: the network.
        run: runs one forward pass of it, and returns its loss where it has one: a scalar, or a dict with ``"loss"``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.nn import find_wiring
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> print(find_wiring(net, lambda: net(torch.ones(5, 4))).describe())
        0: 3 units, read by 2
    """
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # an autograd graph behind every activation
    tracer = _Tracer(module)
    try:
        with tracer:
            returned = run()
        tracer.ended(returned)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return tracer.wiring({id(parameter) for parameter in frozen})
