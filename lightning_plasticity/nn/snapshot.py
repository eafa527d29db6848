"""Remember everything a forward pass may change in a module, and put it back in place.

What is covered: parameters and buffers (also when moved through ``.data`` or replaced), ``.grad``, ``requires_grad``,
train/eval flags, every attribute of every submodule, the contents of lists, dicts, sets and deques among them, the
values of tensors and NumPy arrays kept there (torchmetrics states are such tensors), random generators, modules in
plain containers, and the same for plain helper objects (a replay buffer, an augmentation with a generator), with
``__dict__`` or ``__slots__``, and for optimizers and schedulers that the module keeps itself. Of datasets the
attributes and lists, but only small tensors: they hold the data. Not covered: files, and objects of other libraries
(the Trainer, loggers and loaders among them). Iterators cannot be put back; see ``divert_iterators``.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from lightning_plasticity.nn.generators import generator_state, is_helper, reached_by_calling
from lightning_plasticity.nn.iterators import is_iterator, stand_in

CONTAINERS = (list, dict, set, deque)
MANY = 10_000  # of a larger container the entries are remembered, but not what is inside them
SMALL = 2**16  # bytes; larger tensors of datasets are taken for data
FEW = 64  # entries of a dataset's containers that are looked into
_MISSING = object()
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """The state of a module at construction; ``restore`` brings it back bit for bit.

    Containers are restored in place, so that other references to them stay valid.

    Args:
        module: the module to remember. Costs one copy of its parameters, buffers and tensor attributes.
        also: containers outside the module to remember in the same way.
        data: containers that hold data; of these the tensors of more than ``SMALL`` bytes are not remembered.

    Attributes:
        optimizers: those found on the module.
        schedulers: those found on the module.
        writers: the TensorBoard writers found on the module.
    """

    def __init__(self, module: nn.Module | None, also: Iterable[Any] = (), data: Iterable[Any] = ()) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id -> (tensor, its storage alias, copy)
        self._arrays: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}  # modules and helper objects: their attributes
        self._leaves: list[tuple[Tensor, bool, Tensor | None]] = []
        self._generators: list[Callable[[], object]] = []
        self._iterators: dict[int, Any] = {}
        self.optimizers: list[Optimizer] = []
        self.schedulers: list[LRScheduler] = []
        self.writers: list[Any] = []
        self._seen: dict[int, Any] = {}
        self._data: set[int] = set()  # what was reached through data only
        self.add([module, *also])
        self.add(data, data=True)

    def add(self, values: Iterable[Any], data: bool = False) -> None:
        """Remember more, as it is now."""
        waiting, held_as_data = ([], list(values)) if data else (list(values), [])
        while waiting or held_as_data:  # no recursion: helper objects may form long chains, and cycles
            as_data = not waiting
            value = (held_as_data if as_data else waiting).pop()
            if id(value) in self._seen or (as_data and _is_bulk(value)):
                continue
            self._seen[id(value)] = value
            held = self._remember(value)
            if as_data or isinstance(value, Dataset):
                self._data.add(id(value))
                held_as_data.extend(islice(held, FEW))
            else:
                waiting.extend(held)

    def _remember(self, value: Any) -> Iterable[Any]:
        """Note one value; returns what it holds."""
        if type(value) in weakref.ProxyTypes:
            return ()
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, CONTAINERS):
            return self._remember_container(value)
        elif isinstance(value, tuple):
            return value
        elif isinstance(value, np.ndarray):
            if not isinstance(value, np.memmap):  # a file, and often a large one
                self._arrays[id(value)] = (value, value.copy())
        elif (state := generator_state(value)) is not None:
            self._generators.append(state)
        elif isinstance(value, nn.Module) or is_helper(value):
            return self._remember_attributes(value)
        elif isinstance(value, Optimizer):
            self.optimizers.append(value)
            return self._remember_attributes(value)
        elif isinstance(value, LRScheduler):
            self.schedulers.append(value)
            return self._remember_attributes(value)
        elif is_iterator(value):
            self._iterators[id(value)] = value
        elif any(cls.__name__ == "SummaryWriter" for cls in type(value).__mro__):
            self.writers.append(value)
        else:
            return reached_by_calling(value)
        return ()

    def _remember_container(self, container: Any) -> Iterable[Any]:
        self._containers[id(container)] = (container, copy_container(container))
        attributes = self._remember_attributes(container) if hasattr(container, "__dict__") else []
        items = container.values() if isinstance(container, dict) else container
        return attributes if len(container) > MANY else [*attributes, *items]

    def _remember_attributes(self, value: Any) -> Iterable[Any]:
        attributes = _attributes(value)
        self._objects[id(value)] = (value, attributes)
        return list(attributes.values())

    def divert_iterators(self) -> None:
        """Put copies in the place of the iterators on the module; where there is none, what refuses to be drawn from.

        ``restore`` brings the originals back, and nothing was drawn from them.
        """
        stand_ins: dict[int, Any] = {}

        def diverted(value: Any, name: str) -> Any:
            if type(value) is tuple:
                parts = tuple(diverted(part, name) for part in value)
                return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
            if id(value) not in self._iterators:
                return value
            return stand_ins.setdefault(id(value), stand_in(value, name))

        if not self._iterators:
            return
        for value, attributes in self._objects.values():
            for name, held in attributes.items():
                if id(value) not in self._data and (other := diverted(held, f"self.{name}")) is not held:
                    object.__setattr__(value, name, other)
        for container, entries in self._containers.values():
            if id(container) in self._data or len(entries) > MANY or isinstance(container, set):
                continue
            for key, held in entries.items() if isinstance(entries, dict) else enumerate(entries):
                where = f"an entry of a {type(container).__name__}"
                if (other := diverted(held, where)) is not held:
                    container[key] = other

    def _remember_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._tensors or is_lazy(tensor):
            return
        alias = tensor.detach() if _is_sparse(tensor) else tensor.data
        self._tensors[id(tensor)] = (tensor, alias, alias.clone())
        if tensor.is_leaf:
            self._leaves.append((tensor, tensor.requires_grad, tensor.grad))
            if tensor.grad is not None:
                self._remember_tensor(tensor.grad)

    def restore(self) -> None:
        """Put everything back; what did not change is not written."""
        for value, attributes in self._objects.values():
            _restore_attributes(value, attributes)
        for container, copy in self._containers.values():
            restore_container(container, copy)
        for tensor, alias, copy in self._tensors.values():
            _restore_tensor(tensor, alias, copy)
        for tensor, requires_grad, grad in self._leaves:
            if tensor.grad is not grad:
                tensor.grad = grad
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        for array, values in self._arrays.values():
            if array.flags.writeable:
                array[...] = values
        for state in self._generators:
            state()


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def _restore_tensor(tensor: Tensor, alias: Tensor, copy: Tensor) -> None:
    if _is_sparse(copy):
        # Sparse values cannot be compared or written in place bit by bit; a gradient of an embedding, mostly.
        with torch.no_grad():
            tensor.copy_(copy)
        return
    if _place(tensor.data) != _place(alias):
        tensor.data = alias
    if not _same_bits(alias, copy):
        # Written through the alias: the version counter that autograd checks does not move.
        with torch.inference_mode(alias.is_inference()):
            alias.copy_(copy)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where and how a tensor lies in memory."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0 and knows a NaN again; of a sharded tensor, of this process's piece."""
    left, right = (t.to_local() if hasattr(t, "to_local") else t for t in (left, right))
    left, right = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (left, right))
    bits = _BITS.get(left.element_size())
    return bits is not None and torch.equal(left.view(bits), right.view(bits))


def _is_bulk(value: Any) -> bool:
    """Whether a value that is held by data is left out."""
    if isinstance(value, Tensor):
        return is_lazy(value) or _is_sparse(value) or value.numel() * value.element_size() > SMALL
    return isinstance(value, nn.Module) or (isinstance(value, np.ndarray) and value.nbytes > SMALL)


@lru_cache(maxsize=1024)
def _slots(kind: type) -> list[str]:
    """Names of the attributes that objects of a class keep outside of their ``__dict__``."""
    names = []
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{cls.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _attributes(value: Any) -> dict[str, Any]:
    attributes = dict(getattr(value, "__dict__", ()))
    kind: Any = type(value)
    for name in _slots(kind):
        if (held := getattr(value, name, _MISSING)) is not _MISSING:
            attributes[name] = held
    return attributes


def _restore_attributes(value: Any, attributes: dict[str, Any]) -> None:
    kind: Any = type(value)
    slots = _slots(kind)
    for name in slots:
        if name in attributes:
            object.__setattr__(value, name, attributes[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)
    if slots:
        attributes = {name: held for name, held in attributes.items() if name not in slots}
    if hasattr(value, "__dict__"):
        _restore_dict(value.__dict__, attributes)


def _restore_dict(target: dict[Any, Any], source: dict[Any, Any]) -> None:
    if len(target) == len(source) and all(
        left is right and target[left] is source[right] for left, right in zip(target, source, strict=True)
    ):
        return
    base = OrderedDict if isinstance(target, OrderedDict) else dict
    base.clear(target)
    for key, value in source.items():
        base.__setitem__(target, key, value)


def copy_container(container: Any) -> Any:
    """The entries of a list, dict, set or deque in a container of the plain class, whatever the subclass does."""
    if isinstance(container, dict):
        if not len(container):
            return {}
        base = OrderedDict if isinstance(container, OrderedDict) else dict
        return dict(base.items(container))
    return next(base(container) for base in (list, set, deque) if isinstance(container, base))


def restore_container(container: Any, copy: Any) -> None:
    """Give a container the entries of ``copy_container`` again, in place."""
    if isinstance(container, dict):
        _restore_dict(container, copy)
    elif isinstance(container, set):
        if container != copy:
            set.clear(container)
            set.update(container, copy)
    elif len(container) != len(copy) or any(now is not then for now, then in zip(container, copy, strict=True)):
        base: Any = list if isinstance(container, list) else deque
        base.clear(container)
        base.extend(container, copy)


def shadow_method(owner: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method on one instance; returns what undoes it."""
    attributes = owner.__dict__
    had = name in attributes
    before = attributes.get(name)
    attributes[name] = replacement

    def undo() -> None:
        if had:
            attributes[name] = before
        else:
            attributes.pop(name, None)

    return undo
