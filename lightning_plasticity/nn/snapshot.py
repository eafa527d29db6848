"""Remember everything a forward pass may change in a module, and put it back in place.

What is covered: parameters and buffers (also when moved through ``.data`` or replaced), ``.grad``, ``requires_grad``,
train/eval flags, every attribute of every submodule, the contents of lists, dicts, sets and deques among them, and the
values of tensors kept there (torchmetrics states are such tensors).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)


class Snapshot:
    """The state of a module at construction; ``restore`` brings it back bit for bit.

    Containers are restored in place, so that other references to them stay valid.

    Args:
        module: the module to remember. Costs one copy of its parameters, buffers and tensor attributes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id -> (tensor, its storage alias, copy)
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._parameters: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        for submodule in module.modules():
            attributes = dict(submodule.__dict__)
            self._attributes.append((submodule, attributes))
            for value in attributes.values():
                self._remember(value)
        for parameter in module.parameters():
            self._parameters.append((parameter, parameter.requires_grad, parameter.grad))
            if parameter.grad is not None:
                self._remember(parameter.grad)

    def _remember(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self._tensors and not _is_uninitialized(value):
                alias = value.detach() if value.is_sparse else value.data
                self._tensors[id(value)] = (value, alias, alias.clone())
        elif isinstance(value, _CONTAINERS) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
            for item in value.values() if isinstance(value, dict) else value:
                self._remember(item)
        elif isinstance(value, tuple):
            for item in value:
                self._remember(item)

    def restore(self) -> None:
        """Put everything back; what did not change is not written."""
        for submodule, attributes in self._attributes:
            _restore_dict(submodule.__dict__, attributes)
        for container, copy in self._containers.values():
            _restore_container(container, copy)
        for tensor, alias, copy in self._tensors.values():
            _restore_tensor(tensor, alias, copy)
        for parameter, requires_grad, grad in self._parameters:
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _is_uninitialized(value: Tensor) -> bool:
    return isinstance(value, nn.parameter.UninitializedTensorMixin)


def _restore_tensor(tensor: Tensor, alias: Tensor, copy: Tensor) -> None:
    if tensor.data.data_ptr() != alias.data_ptr() or tensor.data.shape != alias.shape:
        tensor.data = alias
    if not _same_bits(alias, copy):
        # Written through the alias: the version counter that autograd checks does not move.
        with torch.inference_mode(alias.is_inference()):
            alias.copy_(copy)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.is_sparse is False and bool(torch.equal(left, right))


def _restore_dict(target: dict[Any, Any], source: dict[Any, Any]) -> None:
    if len(target) == len(source) and all(
        left == right and target[left] is source[right] for left, right in zip(target, source, strict=True)
    ):
        return
    target.clear()
    target.update(source)


def _restore_container(container: Any, copy: Any) -> None:
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


