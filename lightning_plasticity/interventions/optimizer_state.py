"""What an optimizer remembers of weights that have been re-drawn: forget it, element by element.

Adam counts steps once for a whole parameter, so an element whose moments were zeroed at step s is corrected for a bias
that it does not have: its first steps are up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times too long. ``StepCounts``
remembers s for the rows and columns that were reset and, right after each ``optimizer.step()``, replaces the update
that those elements got by the one with a step count of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

FLAT = -1  # instead of a dimension: single elements
DENSE = 0.3  # share of rows or columns from which a whole parameter is handled faster than parts of it


def forget(optimizers: Iterable[Optimizer], parameter: nn.Parameter, dim: int, indices: Tensor) -> None:
    """Zero slices of every state tensor of the parameter's shape (moments, momentum, squared averages)."""
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                fill(value, dim, indices, 0.0)


def forget_all(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Drop all state of whole parameters, step counts included: the next step makes it anew."""
    parameters = list(parameters)
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


@torch.no_grad()
def fill(tensor: Tensor, dim: int, indices: Tensor, value: float) -> None:
    """Set slices to a value; with ``dim=FLAT`` elements, counted as in a flattened tensor."""
    if dim == FLAT:
        tensor[torch.unravel_index(indices, tensor.shape)] = value
    else:
        tensor.index_fill_(dim, indices, value)


def _flat_indices(shape: torch.Size, dim: int, indices: Tensor) -> Tensor:
    """The elements of some slices, counted as in a flattened tensor."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    fill(chosen, dim, indices, True)
    return chosen.flatten().nonzero().reshape(-1)


_ATTACHED: WeakKeyDictionary[Optimizer, WeakSet[StepCounts]] = WeakKeyDictionary()


class StepCounts:
    """Step counts of their own for elements that were reset, under Adam and AdamW.

    Exact up to rounding: Adam's moments do not depend on the count, only the update does, and it is linear in the
    correction. Under SGD and RMSprop nothing depends on the count. Other optimizers keep their own.

    Args:
        parameters: by name, all that can be reset.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = dict(parameters)
        self._born: dict[str, dict[int, Tensor]] = {}  # by parameter and dimension: step of the last reset, 0 for none
        self._handles: list[Any] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Correct after every step of these from now on; counts that a new optimizer cannot have are dropped."""
        self.detach()
        steps: dict[str, int] = {}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                name = self._names.get(id(parameter))
                if name is not None and "step" in state:
                    steps[name] = int(state["step"])
            if type(optimizer) in (Adam, AdamW):
                _ATTACHED.setdefault(optimizer, WeakSet()).add(self)
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._born = {
            name: born
            for name, born in self._born.items()
            if all(int(step.max()) <= steps.get(name, -1) for step in born.values())
        }

    def detach(self) -> None:
        """Stop correcting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for counts in _ATTACHED.values():
            counts.discard(self)

    def restart(self, optimizers: Iterable[Optimizer], parameter: nn.Parameter, dim: int, indices: Tensor) -> None:
        """Count from here for these slices; what else counted for their elements leaves them to this."""
        name = self._names[id(parameter)]
        if dim != FLAT and FLAT in self._born.get(name, {}):
            dim, indices = FLAT, _flat_indices(parameter.shape, dim, indices.cpu())
        for optimizer in optimizers:
            state = optimizer.state.get(parameter)
            if type(optimizer) in (Adam, AdamW) and state and "step" in state:
                size = parameter.numel() if dim == FLAT else parameter.shape[dim]
                dims = self._born.setdefault(name, {})
                born = dims.setdefault(dim, torch.zeros(size, dtype=torch.int64))
                born[indices.cpu()] = int(state["step"])
                for other in _ATTACHED.get(optimizer, ()):
                    if other is not self:
                        other._leave(parameter, dim, indices.cpu())

    def _leave(self, parameter: nn.Parameter, dim: int, indices: Tensor) -> None:
        """Count no longer for these elements: two corrections of one element would be one too many."""
        name = self._names.get(id(parameter))
        if name is None or not self._born.get(name):
            return
        flat = torch.zeros(parameter.shape, dtype=torch.int64)
        for own, born in self._born[name].items():
            shape = parameter.shape if own == FLAT else [-1 if k == own else 1 for k in range(parameter.ndim)]
            flat = torch.maximum(flat, born.reshape(shape))
        fill(flat, dim, indices, 0)
        self._born[name] = {FLAT: flat.flatten()}

    def release(self, parameter: nn.Parameter, indices: Tensor) -> None:
        """Single elements that are not updated any more need no count."""
        born = self._born.get(self._names[id(parameter)], {}).get(FLAT)
        if born is not None:
            born[indices.cpu()] = 0

    def state_dict(self) -> dict[str, Any]:
        """The steps at which rows and columns were reset."""
        return {name: {str(dim): born.clone() for dim, born in dims.items()} for name, dims in self._born.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` left off; parameters that are no more are left out."""
        self._born = {
            name: {int(dim): born.cpu().clone() for dim, born in dims.items()}
            for name, dims in state.items()
            if name in self._parameters
        }

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._born:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name in self._born and parameter.grad is not None:
                    self._correct(name, parameter, group, optimizer.state[parameter])

    def _correct(self, name: str, parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
        step = int(state["step"])
        if any(int(born.max()) >= step for born in self._born[name].values()):
            del self._born[name]  # something else has dropped all state since, and the optimizer counts anew
            return
        beta1, beta2 = (float(beta) for beta in group["betas"])
        # Where beta ** age is below rounding the correction is too.
        slowest = max(beta1, beta2)
        horizon = math.log(torch.finfo(parameter.dtype).eps / 8) / math.log(slowest) if 0 < slowest < 1 else math.inf
        for dim, born in list(self._born[name].items()):
            born[step - born > horizon] = 0
            if not bool(born.any()):
                del self._born[name][dim]
        if not self._born[name]:
            del self._born[name]
            return
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        lr = float(group["lr"])  # with ``maximize`` the moments carry the sign
        everyone = [parameter.new_full([1] * parameter.ndim, 1.0 - beta**step) for beta in (beta1, beta2)]
        own = {
            # Of single elements, which are many, only those that were reset.
            dim: [
                _corrections(born[born > 0] if dim == FLAT else born, step, beta).to(parameter)
                for beta in (beta1, beta2)
            ]
            for dim, born in self._born[name].items()
        }
        for index, (own1, own2) in _blocks(self._born[name], own, parameter):
            m, v = state["exp_avg"][index], second[index]
            all1, all2 = (one.reshape([1] * m.ndim) for one in everyone)
            wrong, right = (_direction(m, v, *pair, group["eps"]) for pair in ((all1, all2), (own1, own2)))
            parameter[index] += lr * (wrong - right)


def _corrections(born: Tensor, step: int, beta: float) -> Tensor:
    """``1 - beta ** age``; for what was never reset exactly the optimizer's own."""
    found = 1.0 - beta ** (step - born).clamp(min=1).double()
    found[born == 0] = 1.0 - beta**step
    return found


def _direction(m: Tensor, v: Tensor, correct1: Tensor, correct2: Tensor, eps: float) -> Tensor:
    """Adam's update divided by the learning rate (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""
    return (m / correct1) / ((v / correct2).sqrt() + eps)


def _blocks(
    dims: Mapping[int, Tensor], own: Mapping[int, list[Tensor]], parameter: Tensor
) -> list[tuple[tuple[Any, ...], list[Tensor]]]:
    """The elements that were reset, each once: their index, and their two corrections, to broadcast.

    An element in a row and a column that were both reset has the correction of the later reset, which is the smaller.
    Where most of a parameter was reset the block is all of it: the rest is corrected by exactly nothing.
    """
    if FLAT in dims:
        flat = dims[FLAT].nonzero().reshape(-1)
        return [(torch.unravel_index(flat.to(parameter.device), parameter.shape), own[FLAT])]
    by_row = [one.reshape(-1, *[1] * (parameter.ndim - 1)) for one in own.get(0, [])]
    by_column = [one.reshape(1, -1, *[1] * (parameter.ndim - 2)) for one in own.get(1, [])]
    pairs = zip(by_row, by_column, strict=True)
    full = [torch.minimum(one, other) for one, other in pairs] if by_row and by_column else by_row or by_column
    if max(float((born > 0).float().mean()) for born in dims.values()) > DENSE:
        return [((slice(None),), full)]
    none = torch.zeros(parameter.shape[0], dtype=torch.int64)
    rows, others = dims.get(0, none).nonzero().reshape(-1), (dims.get(0, none) == 0).nonzero().reshape(-1)
    blocks: list[tuple[tuple[Any, ...], list[Tensor]]] = []
    if len(rows):
        blocks.append(((rows,), [one[rows] for one in full]))
    if by_column:
        columns = dims[1].nonzero().reshape(-1)
        blocks.append(((others[:, None], columns[None, :]), [one[:, columns] for one in by_column]))
    return blocks
