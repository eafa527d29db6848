"""Weights that lie in pieces on several processes: a whole copy to measure on, or an early refusal."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.regularization import Regularizer

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
STATE = "__composable_api_state_key"  # begins the names under which torch keeps process groups on modules
SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
INSTEAD = "strategy='ddp', or ModelParallelStrategy with fully_shard in configure_model; or measure a checkpoint later"


def refuse_unknown_sharding(trainer: Any, who: str) -> None:
    """Refuse, when a fit starts, strategies whose weights cannot be had whole.

    Raises:
        ValueError: for FSDP1 and for DeepSpeed at ZeRO stage 3.
    """
    name = _sharding(trainer)
    if name == "FSDPStrategy" or (name == "DeepSpeedStrategy" and getattr(trainer.strategy, "zero_stage_3", True)):
        what = "DeepSpeed ZeRO stage 3" if name == "DeepSpeedStrategy" else "FSDP1 (FSDPStrategy)"
        stages = " stage 1 or 2," if name == "DeepSpeedStrategy" else ""
        raise ValueError(
            f"{who} got {what}, which keeps weights in pieces that cannot be measured; expected a strategy with whole "
            f"weights, or FSDP2. What to do: use{stages} {INSTEAD}."
        )


def refuse_sharded_regularizers(trainer: Any, regularizers: Sequence[Regularizer]) -> None:
    """Refuse, when a fit starts, regularisers that would act on a piece of the weights, or on none.

    Raises:
        ValueError: for separate steps under sharding strategies; for DeepSpeed also for what is added to gradients.
    """
    name = _sharding(trainer)
    if name is None:
        return
    refused = [type(r).__name__ for r in regularizers if r.takes_steps]
    remedy = "pass mode='loss', or use strategy='ddp'"
    if name == "DeepSpeedStrategy":
        refused += [type(r).__name__ for r in regularizers if type(r).add_gradient is not Regularizer.add_gradient]
        remedy += "; give L2 to the optimizer as weight_decay"
    if refused:
        raise ValueError(
            f"{', '.join(dict.fromkeys(refused))} got {name}, which keeps weights or gradients in pieces; expected "
            f"whole ones, for steps past the optimizer and for what is added to gradients. What to do: {remedy}."
        )


def refuse_sharded_interventions(trainer: Any, who: str) -> None:
    """Refuse, when a fit starts, to change single units of weights that are in pieces.

    Raises:
        ValueError: for every sharding strategy.
    """
    name = _sharding(trainer)
    if name is not None:
        raise ValueError(
            f"{who} got {name}, which keeps weights or optimizer state in pieces; expected whole ones on every "
            "process, whose units it can change. What to do: use strategy='ddp' or a single device."
        )


def whole(module: Any) -> Any:
    """The module itself, or a copy with whole weights of one that ``fully_shard`` or tensor parallelism has cut.

    A collective, for all ranks at the same time; the copy takes a whole model's memory on each.
    """
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if _is_dtensor(tensor):
            full = tensor.detach().full_tensor().clone()
            memo[id(tensor)] = nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full
    if not memo and not any(_fsdp_base(type(part)) for part in module.modules()):
        return module
    mesh = module.__dict__.get("_device_mesh")
    memo[id(mesh)] = mesh
    with _without_sharding(module):
        twin = copy.deepcopy(module, memo)
    if "_trainer" in module.__dict__:  # Lightning leaves it out of copies; steps read it
        twin.__dict__["_trainer"] = module.__dict__["_trainer"]
    return twin


@contextmanager
def _without_sharding(module: nn.Module) -> Iterator[None]:
    """Inside, the parts of the module have the classes, hooks and attributes that they had before they were sharded."""
    kept = [(part, type(part), dict(part.__dict__)) for part in module.modules()]
    try:
        for part, cls, attributes in kept:
            part.__class__ = _fsdp_base(cls) or cls
            for name, value in attributes.items():
                if name.startswith(STATE):
                    del part.__dict__[name]
                elif name in HOOKS:
                    part.__dict__[name] = type(value)((k, hook) for k, hook in value.items() if not _shards(hook))
        yield
    finally:
        for part, cls, attributes in kept:
            part.__class__ = cls
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _fsdp_base(cls: type) -> type | None:
    """The class that ``fully_shard`` put its own in front of."""
    names = [base.__name__ for base in cls.__mro__]
    if "FSDPModule" not in names or not cls.__name__.startswith("FSDP"):
        return None
    base: type = cls.__mro__[names.index("FSDPModule") + 1]
    return base


def _shards(hook: Any) -> bool:
    """Whether a hook is torch's own, for sharding; a bound one would drag the process group into a copy."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _is_dtensor(tensor: Tensor) -> bool:
    return torch.distributed.is_available() and hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _sharding(trainer: Any) -> str | None:
    """The Trainer's sharding strategy by the name of its class or of a base: Lightning has two copies of each."""
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    return next((name for name in SHARDING if name in names), None)
