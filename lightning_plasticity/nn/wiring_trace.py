"""Find the wiring of hidden units by watching one forward pass: labels travel with the activations.

Each output of a Linear or a convolution gets labels, one number a unit. Functions that move values about are applied to
the labels too, so flattening, concatenation and the like need no rule of their own; a weight that reads labelled values
then knows which column belongs to which unit. What cannot be followed is named with the reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_plasticity.nn.wiring import CONVOLUTIONS, NORMS, HiddenUnits, Link, Wiring, unit_count


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of functions, with underscores at their ends taken off. Value by value, so a unit stays where it is:
_SAME = _words(
    "relu relu6 gelu elu selu celu silu mish tanh sigmoid hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink leaky_relu rrelu prelu threshold softplus softsign logsigmoid clamp clamp_min clamp_max clip abs neg "
    "sign exp square sqrt sin cos dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "detach clone contiguous to type float double half bfloat16 cpu cuda data requires_grad gt ge lt le eq ne isfinite "
    "nan_to_num local_response_norm positive"
)
# Applied to the labels as well:
_MOVES = _words(
    "flatten unflatten reshape view reshape_as view_as permute transpose swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand expand_as repeat tile chunk split unbind narrow select getitem gather index_select flip roll t T "
    "mT pixel_shuffle pixel_unshuffle cat concat concatenate stack hstack vstack"
)
# Mix positions, not channels:
_POOLS = _words(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d interpolate "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample pad"
)
_NORMS = _words("batch_norm instance_norm layer_norm group_norm rms_norm")
_REDUCTIONS = _words("mean sum amax amin")
_SUMS = _words("add sub radd rsub iadd isub subtract")
_PRODUCTS = _words("mul rmul imul multiply div truediv itruediv divide pow")
# Only ask for the shape of an activation:
_FRESH = _words(
    "zeros_like ones_like rand_like randn_like randint_like empty_like full_like new_zeros new_ones new_full new_empty "
    "new_tensor"
)
# What a Linear or a convolution calls:
_WEIGHTS = _words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")


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
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)) and child._parameters.get("weight") is not None:
                self.weights[id(child.weight)] = name
                if any(len(users[id(own)]) > 1 for own in child._parameters.values() if own is not None):
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
        if name in _WEIGHTS and self._weight_call(name, args, kwargs, result):
            return result
        sources = [self.followed[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.followed]
        if sources and name not in _FRESH:
            outputs = list(_tensors(result))
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
        first = next((t for t in _tensors((args, kwargs)) if id(t) in self.followed), None)
        labels: list[Tensor | None] | None = None
        if name in _SUMS or name in _PRODUCTS:
            labels = self._combined(name, args, kwargs, outputs[0], mixed)
        elif first is not None and (own := self.followed[id(first)].labels) is not None:
            labels = self._moved(func, name, args, kwargs, outputs, first, own)
        elif name in _MOVES | _SAME | _POOLS | _NORMS | _REDUCTIONS:
            labels = [None] * len(outputs)  # nothing but mixed units came in
        if labels is None:
            why = f"its activations pass through {name}(), which cannot be followed"
            mixed |= {layer: why for source in sources for layer in self._layers(source.labels)}
            labels = [None] * len(outputs)
            if any(isinstance(t, nn.Parameter) for t in _tensors((args, kwargs))):
                self._refuse(mixed)
        for output, own_labels in zip(outputs, labels, strict=True):
            self._note(output, _Followed(own_labels, dict(mixed)))

    def _moved(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        first: Tensor,
        own: Tensor,
    ) -> list[Tensor | None] | None:
        """Labels of the outputs of a function of one activation (or of a list of them, to be joined)."""
        if name in _SAME:
            return [own if output.shape == own.shape else None for output in outputs]
        if name in _NORMS:
            self._norm_call(name, args, kwargs, own)
            return [own]
        if name in _MOVES:
            moved = func(*self._swap(args), **self._swap(kwargs))
            return list(_tensors(moved))
        if name in _POOLS:
            channels = _by_channel(own)
            if channels is None or outputs[0].ndim != own.ndim or outputs[0].shape[1] != len(channels):
                return None
            shape = [-1 if d == 1 else 1 for d in range(own.ndim)]
            return [channels.reshape(shape).expand(output.shape) for output in outputs]
        if name in _REDUCTIONS and (len(args) > 1 or "dim" in kwargs):
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            keep = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
            if dims is None:
                return None
            low, high = own.amin(dims, keepdim=keep), own.amax(dims, keepdim=keep)
            return [low] if torch.equal(low, high) else None
        return None

    def _swap(self, value: Any) -> Any:
        """The arguments with labels in place of activations."""
        if isinstance(value, Tensor):
            if id(value) in self.followed:
                labels = self.followed[id(value)].labels
                return torch.full(value.shape, -1, device=value.device) if labels is None else labels.contiguous()
            return torch.full(value.shape, -1, device=value.device) if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            return type(value)(self._swap(item) for item in value)
        if isinstance(value, dict):
            return {key: self._swap(item) for key, item in value.items()}
        return value

    def _combined(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, mixed: dict[str, str]
    ) -> list[Tensor | None]:
        """Labels of a sum or a product; where units meet others they cannot be told apart any more."""
        tensors = list(_tensors((args, kwargs)))
        known = [
            own.labels for t in tensors if (own := self.followed.get(id(t))) is not None and own.labels is not None
        ]
        others = [t for t in tensors if id(t) not in self.followed and t.numel() > 1]
        word = "added to" if name in _SUMS else "multiplied with"
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
        foreign = [t for t in others if name in _SUMS or t.requires_grad]
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
        name = next((self.norms[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.norms), None)
        if name is None:
            return
        if function in ("layer_norm", "rms_norm"):
            shape = self.modules[name].normalized_shape  # what the entries are
            rows = labels.reshape(-1, torch.Size(shape).numel())  # type: ignore[arg-type]
            row: Tensor | None = rows[0] if bool((rows == rows[0]).all()) else None
        else:
            row = _by_channel(labels)
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
        return list(dict.fromkeys(self.owners[n] for n in numbers.unique().tolist() if n >= 0))

    def _refuse(self, reasons: dict[str, str]) -> None:
        for layer, why in reasons.items():
            self.unsupported.setdefault(layer, why)

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
        for name, links in readers.items():
            self._refuse(self._faults(name, links, frozen))
        layers = {
            name: HiddenUnits(name, unit_count(self.modules[name]), tuple(readers[name]), tuple(norms.get(name, ())))
            for name in order
            if name in readers and name not in self.unsupported
        }
        outputs = tuple(name for name in order if name not in readers and name not in self.unsupported)
        for name, child in self.modules.items():
            own = [p for p in child._parameters.values() if p is not None]
            if isinstance(child, (nn.Linear, *CONVOLUTIONS)):
                if name not in self.bases:
                    why = "it was not called as a layer with its own weight (shared, parametrised, or not reached)"
                    self.unsupported.setdefault(name, why)
            elif own and not isinstance(child, NORMS):
                self.unsupported.setdefault(name, f"a {type(child).__name__} is no Linear or convolution")
        return Wiring(layers, self.unsupported, outputs, order)

    def _faults(self, name: str, links: list[Link], frozen: set[int]) -> dict[str, str]:
        if name in self.tied:
            return {name: "it shares its parameters with another module"}
        stuck = [part for part in (name, *(link.module for link in links)) if id(self.modules[part].weight) in frozen]
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


def _by_channel(labels: Tensor) -> Tensor | None:
    """(C,) labels of dimension 1, where they are the same at all samples and positions."""
    if labels.ndim < 2:
        return None
    columns = labels.movedim(1, -1).reshape(-1, labels.shape[1])
    return columns[0] if bool((columns == columns[0]).all()) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def find_wiring(module: nn.Module, run: Callable[[], object]) -> Wiring:
    """Trace the wiring of hidden units through sequential, branching and residual networks.

    Followed: Linear and convolutions, activations, norms, dropout, pooling, flattening, concatenation and other moves of
    values. Left alone, with the reason: units that are added to or multiplied with others (the stream of a residual
    network; the layers inside its branches are followed), that attention or a recurrent layer reads, tied, frozen,
    parametrised and grouped weights. Call it under ``undisturbed``.

    Args:
        module: the network.
        run: runs one forward pass of it.

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
            run()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return tracer.wiring({id(parameter) for parameter in frozen})
