"""Remember everything a forward pass may change in a module, and put it back in place.

What is covered: parameters and buffers (also when moved through ``.data`` or replaced), ``.grad``, ``requires_grad``,
train/eval flags, every attribute of every submodule, the contents of lists, dicts, sets and deques among them, the
values of tensors and NumPy arrays kept there (torchmetrics states are such tensors), random generators, modules in
plain containers, and the same for plain helper objects (a replay buffer, an augmentation with a generator). Not
covered: iterators, files, and objects of libraries (the Trainer, loggers, datasets and loaders among them).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plasticity.nn.generators import generator_state, is_helper, reached_by_calling

CONTAINERS = (list, dict, set, deque)
MANY = 10_000  # of a larger container the entries are remembered, but not what is inside them
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """The state of a module at construction; ``restore`` brings it back bit for bit.

    Containers are restored in place, so that other references to them stay valid.

    Args:
        module: the module to remember. Costs one copy of its parameters, buffers and tensor attributes.
        also: containers outside the module to remember in the same way.
    """

    def __init__(self, module: nn.Module, also: Iterable[Any] = ()) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id -> (tensor, its storage alias, copy)
        self._arrays: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}  # modules and helper objects: their attributes
        self._leaves: list[tuple[Tensor, bool, Tensor | None]] = []
        self._generators: list[Callable[[], object]] = []
        seen: dict[int, Any] = {}
        waiting = [module, *also]  # no recursion: helper objects may form long chains, and cycles
        while waiting:
            value = waiting.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                waiting.extend(self._remember(value))

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
        else:
            return reached_by_calling(value)
        return ()

    def _remember_container(self, container: Any) -> Iterable[Any]:
        self._containers[id(container)] = (container, container.copy())
        attributes = self._remember_attributes(container) if hasattr(container, "__dict__") else []
        items = container.values() if isinstance(container, dict) else container
        return attributes if len(container) > MANY else [*attributes, *items]

    def _remember_attributes(self, value: Any) -> Iterable[Any]:
        self._objects[id(value)] = (value, dict(value.__dict__))
        return list(value.__dict__.values())

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
            _restore_dict(value.__dict__, attributes)
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


def _restore_dict(target: dict[Any, Any], source: dict[Any, Any]) -> None:
    if len(target) == len(source) and all(
        left == right and target[left] is source[right] for left, right in zip(target, source, strict=True)
    ):
        return
    target.clear()
    target.update(source)


def restore_container(container: Any, copy: Any) -> None:
    """Give a container the entries of a shallow copy of it again, in place."""
    if isinstance(container, dict):
        _restore_dict(container, copy)
    elif isinstance(container, set):
        if container != copy:
            container.clear()
            container.update(copy)
    elif len(container) != len(copy) or any(now is not then for now, then in zip(container, copy, strict=True)):
        container.clear()
        container.extend(copy)


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
