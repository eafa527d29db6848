"""Find a network's hidden layers and tap their activations during a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class HiddenLayer:
    """Where to tap a hidden activation.

    Attributes:
        name: the name in logs: the module's own, or ``"<module>.input"`` when no module made the activation (a
            functional ReLU, say) and it is taken where the next weight reads it.
        module: name of the module to hook.
        at_input: whether the activation is the module's input, not its output.
        channel_dim: which dimension holds the features: 1 for convolutions, -1 for vectors and sequences, None when
            only the number of dimensions can tell.
    """

    name: str
    module: str
    at_input: bool
    channel_dim: int | None


class FeatureTaps:
    """Context that records the activations of hidden layers; ``features`` holds them by layer name.

    A layer called several times contributes its activations one under the other.

    Args:
        module: the network.
        layers: what to tap.

    Example:
        >>> import torch
        >>> from lightning_plasticity.nn import FeatureTaps, named_layers
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with FeatureTaps(net, named_layers(net, ["1"])) as taps:
        ...     _ = net(torch.ones(5, 4))
        >>> taps.features["1"].shape
        torch.Size([5, 3])
    """

    def __init__(self, module: nn.Module, layers: Sequence[HiddenLayer]) -> None:
        self._module = module
        self._layers = layers
        self._records: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureTaps:
        modules = dict(self._module.named_modules(remove_duplicate=False))
        for layer in self._layers:
            target = modules[layer.module]
            if layer.at_input:
                hook = target.register_forward_pre_hook(self._input_hook(layer.name), with_kwargs=True)
            else:
                hook = target.register_forward_hook(self._output_hook(layer.name))
            self._handles.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the activations seen so far; the taps stay."""
        self._records.clear()

    def calls(self, name: str) -> list[Tensor]:
        """The activations of one layer, call by call."""
        return self._records.get(name, [])

    @property
    def features(self) -> dict[str, Tensor]:
        """Activations by layer name, in the order of the layers; those that were never computed are absent."""
        order = [layer.name for layer in self._layers if layer.name in self._records]
        return {name: _stack(self._records[name]) for name in order}

    def _record(self, name: str, value: Any) -> None:
        """Store a clone of an activation (with its graph), since a later in-place operation could overwrite it."""
        tensor = first_tensor(value)
        if tensor is not None:
            self._records.setdefault(name, []).append(tensor.clone())

    def _input_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(name, args if args else kwargs)

        return hook

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._record(name, output)

        return hook


def _stack(records: list[Tensor]) -> Tensor:
    return records[0] if len(records) == 1 else torch.cat(records)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.data
    if isinstance(value, dict):
        value = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, entry.name) for entry in fields(value)]  # not vars(), for the sake of slots
    elif not isinstance(value, tuple | list):
        return None
    for item in value:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def named_layers(module: nn.Module, patterns: Sequence[str]) -> list[HiddenLayer]:
    """Layers by name or wildcard (``"net.1"``, ``"encoder.*"``, ``"fc2.input"``): the outputs of those modules.

    A wildcard takes each module once, by its first name, and no ``ModuleList``, which is never called.

    Raises:
        ValueError: for a pattern that matches nothing; the message lists the names that exist.
        TypeError: when ``patterns`` is one string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"layers={patterns!r} is one string, expected a list of names; write layers=[{patterns!r}].")
    modules = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    once = [
        name
        for name, child in module.named_modules()
        if name and not isinstance(child, _NEVER_CALLED) and PARAMETRIZATIONS not in name.split(".")
    ]
    found: dict[str, HiddenLayer] = {}
    for pattern in patterns:
        base, at_input = pattern, False
        if pattern.endswith(".input") and pattern not in modules:
            base, at_input = pattern.removesuffix(".input"), True
        matches = [base] if base in modules else [name for name in once if fnmatchcase(name, base)]
        if not matches:
            raise ValueError(
                f"layers: {pattern!r} matches no layer of {type(module).__name__}. "
                f"Those that exist: {', '.join(modules) or 'none'}. Use a name or a wildcard such as 'net.*'."
            )
        for name in matches:
            label = f"{name}.input" if at_input else name
            found.setdefault(label, HiddenLayer(label, name, at_input, _channel_dim(modules[name])))
    return list(found.values())


PARAMETRIZATIONS = "parametrizations"  # modules below make weights, not activations
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


_CHANNEL_FIRST = (
    *CONVOLUTIONS,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_CHANNEL_LAST = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def _channel_dim(module: nn.Module) -> int | None:
    """Where a named layer has its features, as far as its type tells."""
    if isinstance(module, _CHANNEL_FIRST):
        return 1
    return -1 if isinstance(module, _CHANNEL_LAST) else None


class _Recorder:
    """Watches one forward pass: who made each tensor, which weights read which tensors, in which order."""

    def __init__(self, module: nn.Module) -> None:
        children = {name: child for name, child in module.named_modules() if name}
        self.names = {id(child): name for name, child in children.items()}  # a torchmetrics Metric changes its hash
        self.weighted = {
            n for n, child in children.items() if any(isinstance(part, WEIGHTS) for part in child.modules())
        }
        self.blocks = _blocks(module)
        self.makers: dict[int, _Made] = {}  # by id of the tensor
        self.calls: dict[str, list[_Made]] = {}  # by name of the module
        self.learned: set[int] = set()  # addresses of what weights have computed, also without a graph
        self.keep: list[Tensor] = []  # keeps ids and addresses unique while we compare them
        self.found: dict[tuple[str, str], HiddenLayer] = {}  # by maker and reader
        self.pending: dict[tuple[str, str], HiddenLayer] = {}
        self.inside = 0
        self.handles = [child.register_forward_pre_hook(self._enter, with_kwargs=True) for child in children.values()]
        self.handles += [child.register_forward_hook(self._leave, always_call=True) for child in children.values()]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[id(module)]
        if isinstance(module, WEIGHTS):
            self._weight_reads(module, first_tensor(args if args else kwargs))
        if name in self.blocks:
            self.inside += 1

    def _weight_reads(self, module: nn.Module, tensor: Tensor | None) -> None:
        self.found.update(self.pending)  # a weight runs after these blocks: their outputs are hidden, not final
        self.pending.clear()
        if self.inside or tensor is None or not self._is_hidden(tensor):
            return
        name = self.names[id(module)]
        channel_dim = 1 if isinstance(module, CONVOLUTIONS) else -1
        made = self.makers.get(id(tensor))
        if made is None or made.version != _version(tensor):  # made, or changed in place since, by no module
            self.found.setdefault(("", name), _input_of(name, channel_dim))
        elif made.by not in self.blocks:
            made.readers.add(name)
            self.found.setdefault((made.by, name), HiddenLayer(made.by, made.by, False, channel_dim))

    def layers(self) -> list[HiddenLayer]:
        """What was found, in the order of the reads; of a module that serves in several places, where it is read."""
        out: dict[str, HiddenLayer] = {}
        for (maker, reader), layer in self.found.items():
            readers = {frozenset(call.readers) for call in self.calls.get(maker, [])}
            # One that reads its own output is recurrent, not shared.
            shared = len(readers) > 1 and maker not in self.blocks and not any(maker in names for names in readers)
            chosen = _input_of(reader, layer.channel_dim) if shared else layer
            out.setdefault(chosen.name, chosen)
        return list(out.values())

    def _is_hidden(self, tensor: Tensor) -> bool:
        """Whether weights have made it; a frozen part under ``no_grad`` leaves no graph, only its tensors."""
        return tensor.requires_grad or tensor.data_ptr() in self.learned

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self.names[id(module)]
        if name in self.blocks:
            self.inside -= 1
        tensor = first_tensor(output)
        if tensor is None:
            return
        self.keep.append(tensor)
        source = first_tensor(args)
        if name in self.weighted or (source is not None and self._is_hidden(source)):
            self.learned.add(tensor.data_ptr())
        made = _Made(name, _version(tensor))
        if name in self.blocks:  # a block speaks for its inside
            self.pending[name, ""] = HiddenLayer(name, name, False, None)
        elif any(True for _ in module.children()):
            before = self.makers.get(id(tensor))
            if before is not None and before.version == made.version:
                return  # a container returns its last child's tensor: the child made it
        self.calls.setdefault(name, []).append(made)
        self.makers[id(tensor)] = made  # the latest leaf: an in-place ReLU returns the tensor that it was given


@dataclass
class _Made:
    """One output of a module: the tensor's version when it was made, and the weights that read it."""

    by: str
    version: int
    readers: set[str] = field(default_factory=set)


def _input_of(name: str, channel_dim: int | None) -> HiddenLayer:
    return HiddenLayer(f"{name}.input", name, True, channel_dim)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _blocks(module: nn.Module) -> set[str]:
    """Names of repeated blocks, innermost ones: non-leaf children, with parameters, of a ModuleList or Sequential.

    A child of a Sequential counts only if another one is of its type: a Sequential may also wrap one whole network.
    """
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, parent in module.named_modules():
        if not isinstance(parent, nn.Sequential | nn.ModuleList):
            continue
        for key, child in parent.named_children():
            nested = any(part != PARAMETRIZATIONS for part, _ in child.named_children())
            if nested and any(True for _ in child.parameters()):
                found[f"{name}.{key}" if name else key] = (parent, child)
    types = Counter(type(child) for _, child in found.values())
    names = {n for n, (parent, child) in found.items() if isinstance(parent, nn.ModuleList) or types[type(child)] > 1}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def find_hidden_layers(module: nn.Module, run: Callable[[], object]) -> list[HiddenLayer]:
    """Hidden activations that feed a later weight; for containers of blocks, the outputs of the blocks.

    The network is run once and watched. Activations made by a module (``nn.ReLU``) are named after it, others after
    the weight that reads them; so are those of one module that serves several places. Call it under
    ``undisturbed``, since it needs gradients switched on for all parameters.

    Args:
        module: the network.
        run: runs one forward pass of it.

    Returns:
        The layers in the order in which they are computed; empty for a network without hidden layers.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters() if parameter.is_floating_point()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    recorder = _Recorder(module)
    try:
        run()
    finally:
        for handle in recorder.handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return recorder.layers()
