"""Trainability of a module: short training runs from its weights and from fresh ones, all of it undone afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_plasticity.curvature import LossClosure, Measured, MeasurementError
from lightning_plasticity.curvature.data import as_batches
from lightning_plasticity.curvature.loss.closure import LossFunction
from lightning_plasticity.curvature.samples import num_samples
from lightning_plasticity.linalg.progress import Count, part
from lightning_plasticity.nn import Mode
from lightning_plasticity.nn.undisturbed import seed_rng
from lightning_plasticity.trainability.descent import Descent, descend
from lightning_plasticity.trainability.fresh import FreshInit, reinitialize
from lightning_plasticity.trainability.optimizers import twin
from lightning_plasticity.trainability.result import TARGETS, Curve, Target, Trainability

OptimizerFactory = Callable[[Any], Optimizer]
EVALUATIONS = 20  # of a run, by default


def trainability(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    optimizer: OptimizerFactory | Optimizer | None = None,
    carry_state: bool = False,
    num_steps: int = 100,
    target: Target = "fresh",
    tau: float = 0.1,
    seeds: int = 2,
    batch_size: int | None = None,
    shuffle: bool = True,
    evaluate_every: int | None = None,
    fresh: FreshInit | bool | None = None,
    clip: tuple[float, str] | None = None,
    mode: Mode = "as_is",
    seed: int = 0,
    max_seconds: float | None = None,
) -> Trainability:
    """Train from the present weights for a budget of steps, and from fresh ones; then put everything back.

    Loss curves are of the mean loss on all of ``data``. Where a target is below what the task allows (label noise), no
    network reaches it; ``"fresh"`` avoids that, and does not take a bad start for slow learning.

    Source: the definition is ours; on curves and bad starts see the review of Lewandowski 2023 (arXiv 2312.00246).

    Args:
        model: any module; it is left exactly as it was.
        loss_fn: ``loss_fn(outputs, targets) -> scalar mean loss``; None for a LightningModule's own training step.
        data: ``(inputs, targets)`` or an iterable of such pairs.
        optimizer: a function of the parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``; or a live
            optimizer, of which a copy is used; None for Adam with a learning rate of 1e-3.
        carry_state: with a live optimizer, go on with a copy of its state; fresh runs have a fresh one always.
        num_steps: T, the budget of steps.
        target: ``"fresh"``, ``"relative"`` or ``"absolute"``, see ``Trainability``.
        tau: the target's tolerance, share or loss, >= 0.
        seeds: runs of each kind; they differ in the order of the data and the fresh initialisation.
        batch_size: of minibatches drawn from the data; None for the batches as they come.
        shuffle: a new order for each pass; with False and ``batch_size=None`` batches come as they are in ``data``.
        evaluate_every: steps between evaluations on all the data; None for 20 evaluations in all. Where one minibatch
            is all the data, every step is one.
        fresh: None for ``reset_parameters`` of every submodule, a function (see ``reinitialize``), or False for no
            fresh runs.
        clip: gradient clipping, e.g. ``(1.0, "norm")`` or ``(0.5, "value")``.
        mode: ``"as_is"`` (BatchNorm and dropout as in training), ``"frozen"`` or ``"eval"``.
        seed: of the first run; the next ones count on.
        max_seconds: wall time of all runs together; the first run is stopped when its share is up, and the others take
            as many steps. ``settings["budget"]`` says so.

    Returns:
        The curves and what follows from them.

    Raises:
        MeasurementError: when the loss is not finite at the start or depends on no parameter; when fresh runs are
            needed for the target and parameters cannot be initialised.
        ValueError: for settings out of range.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_plasticity.trainability import trainability
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = net.weight.data.fill_(4.0)
        >>> def loss(outputs, targets):  # halves the weight in each step of size 1/4
        ...     return (outputs - targets).square().mean()
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> sgd = partial(torch.optim.SGD, lr=0.25)
        >>> found = trainability(net, loss, data, optimizer=sgd, num_steps=5, target="absolute", tau=0.3)
        >>> found.curves[0].losses
        (16.0, 4.0, 1.0, 0.25, 0.0625, 0.015625)
        >>> found.steps_to_target.value
        3.0
    """
    measured = Measured(model, as_batches(data, model), loss_fn, mode=mode, seed=seed)
    how = Descent(num_steps, default_every(num_steps, evaluate_every), batch_size, shuffle, clip)
    found = measure_trainability(
        measured,
        optimizer,
        how,
        carry_state=carry_state,
        target=target,
        tau=tau,
        seeds=seeds,
        fresh=fresh,
        max_seconds=max_seconds,
    )
    if target == "fresh" and found.fresh_failure is not None:
        raise MeasurementError(found.fresh_failure)
    return found


def measure_trainability(
    measured: Measured,
    optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer] | None,
    how: Descent,
    *,
    carry_state: bool = False,
    target: Target = "fresh",
    tau: float = 0.1,
    seeds: int = 2,
    fresh: FreshInit | bool | None = None,
    max_seconds: float | None = None,
) -> Trainability:
    """The same for what is already prepared; missing fresh runs are told in ``fresh_failure``, never raised.

    Arguments and errors as in ``trainability``; several live optimizers step together.
    """
    check_settings(how, target, tau, seeds, fresh, max_seconds)
    lazy = [name for name, parameter in measured.module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MeasurementError(f"{', '.join(lazy)} are not initialised yet; run a batch through the module first.")
    started = time.perf_counter()
    runs = seeds if fresh is False else 2 * seeds
    share = math.inf if max_seconds is None else max_seconds / runs
    first, taken = how.num_steps, how
    init = fresh if callable(fresh) else None
    curves: list[Curve] = []
    fresh_curves: list[Curve] = []
    failure = None
    with part("trainability", started + share * runs):
        count = Count("training steps", runs * first)
        for number in range(seeds):
            deadline = math.inf if curves else started + share
            curves.append(_run(measured, optimizer, taken, measured.seed + number, carry_state, count, deadline))
            if number == 0 and max_seconds is not None and len(curves[0].step_losses) < first:
                taken = replace(how, num_steps=max(1, curves[0].steps[-1]))
                count.total = runs * taken.num_steps
        try:
            for seed in range(measured.seed, measured.seed + seeds) if fresh is not False else ():
                fresh_curves.append(_run(measured, optimizer, taken, seed, False, count, fresh=(init,)))
        except MeasurementError as error:
            fresh_curves, failure = [], str(error)
    settings: dict[str, Any] = {"mode": measured.mode, "seeds": seeds, "optimizer": _name(optimizer)}
    if taken.num_steps < how.num_steps:
        settings["budget"] = f"{taken.num_steps} of {how.num_steps} steps, to keep to {max_seconds:g} seconds"
    return Trainability(
        tuple(curves),
        tuple(fresh_curves),
        target,
        tau,
        num_steps=taken.num_steps,
        num_samples=num_samples(measured.batches),
        fresh_failure=failure,
        seconds=time.perf_counter() - started,
        settings=settings,
    )


def check_settings(
    how: Descent, target: str, tau: float, seeds: int, fresh: Any = None, max_seconds: float | None = None
) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: saying what was expected.
    """
    counts = {"num_steps": how.num_steps, "evaluate_every": how.evaluate_every, "seeds": seeds}
    if how.batch_size is not None:
        counts["batch_size"] = how.batch_size
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}, expected a whole number >= 1.")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}, expected one of {TARGETS}.")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau < math.inf:
        raise ValueError(f"tau={tau!r}, expected a number >= 0, such as 0.1.")
    if target == "fresh" and fresh is False:
        raise ValueError("target='fresh' needs fresh runs; drop fresh=False, or use target='relative' or 'absolute'.")
    if fresh is not None and not callable(fresh) and not isinstance(fresh, bool):
        raise ValueError(f"fresh={fresh!r}, expected a function of the module, False for no fresh runs, or None.")
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds={max_seconds!r}, expected a positive number, or None for any.")


def default_every(num_steps: int, evaluate_every: int | None) -> int:
    """Steps between evaluations: those given, else so many that there are 20 evaluations."""
    return max(1, num_steps // EVALUATIONS) if evaluate_every is None else evaluate_every


def _run(
    measured: Measured,
    optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer] | None,
    how: Descent,
    seed: int,
    carry_state: bool,
    count: Count,
    deadline: float = math.inf,
    fresh: tuple[FreshInit | None] | None = None,
) -> Curve:
    """One run; ``fresh`` holds the initialisation where it starts from one."""
    with _opened(measured, seed) as closure:
        if fresh is not None:
            seed_rng(seed)
            reinitialize(measured.module, fresh[0])
        optimizers = _optimizers(measured, optimizer, carry_state)
        return descend(closure, measured.batches, optimizers, how, seed, deadline, count)


@contextmanager
def _opened(measured: Measured, seed: int) -> Iterator[LossClosure]:
    with replace(measured, seed=seed).open() as closure:
        yield closure


def _optimizers(
    measured: Measured, optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer] | None, carry_state: bool
) -> list[Optimizer]:
    """Made inside ``undisturbed``: the parameters are then of the dtype that is measured in."""
    if isinstance(optimizer, Optimizer):
        return [twin(optimizer, carry_state)]
    if isinstance(optimizer, Sequence):
        return [twin(each, carry_state) for each in optimizer]
    parameters = measured.parameters()
    return [torch.optim.Adam(parameters) if optimizer is None else optimizer(parameters)]


def _name(optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer] | None) -> str:
    if optimizer is None:
        return "Adam"
    several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    return ", ".join(type(o).__name__ if isinstance(o, Optimizer) else "given" for o in several)
