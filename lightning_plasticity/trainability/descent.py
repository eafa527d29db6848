"""One short training run on a module in place: minibatches, steps, and the loss on all the data now and then."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from lightning_plasticity.curvature import LossClosure, MeasurementError
from lightning_plasticity.curvature.samples import chosen_samples, num_samples
from lightning_plasticity.linalg.progress import Count
from lightning_plasticity.nn.batches import batch_size, join_batches
from lightning_plasticity.nn.undisturbed import seed_rng
from lightning_plasticity.trainability.optimizers import parameters_of
from lightning_plasticity.trainability.result import Curve


@dataclass(frozen=True)
class Descent:
    """How to descend.

    Attributes:
        num_steps: T, optimizer steps.
        evaluate_every: steps between evaluations on all the data.
        batch_size: of minibatches; None for the batches as they are.
        shuffle: a new order of the samples (of the batches, where ``batch_size`` is None) for each pass.
        clip: gradient clipping as a Trainer does it, (value, ``"norm"`` or ``"value"``); None for none.
    """

    num_steps: int
    evaluate_every: int
    batch_size: int | None = None
    shuffle: bool = True
    clip: tuple[float, str] | None = None


def descend(
    closure: LossClosure,
    batches: Sequence[Any],
    optimizers: list[Optimizer],
    how: Descent,
    seed: int,
    deadline: float,
    count: Count,
) -> Curve:
    """Train inside ``undisturbed``; the module is left as trained.

    Args:
        closure: evaluates the module's loss.
        batches: all the data.
        optimizers: that step its parameters.
        how: steps and minibatches.
        seed: of the order of the data and the random state.
        deadline: ``time.perf_counter()`` at which to stop early, after one step at least.
        count: of the steps of this run and of those beside it.

    Raises:
        MeasurementError: when the loss is not finite before the first step; or for several optimizers with several
            losses, for which loss belongs to which is not known.
    """
    minibatches = _minibatches(batches, how, seed)
    whole = (0, batches[0]) if _is_one(batches, how) else None  # then its loss is that on all the data
    parameters = parameters_of(optimizers)
    seed_rng(seed)
    start = _random_state()
    steps: list[int] = []
    losses: list[float] = []
    step_losses: list[float] = []

    def note(step: int, loss: float) -> bool:
        """Whether to go on."""
        steps.append(step)
        losses.append(loss if math.isfinite(loss) else math.inf)
        return math.isfinite(loss)

    for step in range(how.num_steps + 1):
        last = step == how.num_steps or (step > 0 and time.perf_counter() >= deadline)
        if last or (whole is None and step % how.evaluate_every == 0):
            goes_on = note(step, _evaluate(closure, batches, start))
            if last or not goes_on:
                break
        index, batch = next(minibatches) if whole is None else whole
        loss = _step(closure, batch, index, parameters, optimizers, how.clip)
        step_losses.append(loss)
        count.add()
        if whole is not None and not note(step, loss):
            break
        if not math.isfinite(loss):
            note(step + 1, loss)
            break
    if not math.isfinite(losses[0]):
        raise MeasurementError("The loss on the probe data is not finite; look for NaN or inf in weights and data.")
    return Curve(tuple(steps), tuple(losses), tuple(step_losses))


def _step(
    closure: LossClosure,
    batch: Any,
    index: int,
    parameters: list[torch.nn.Parameter],
    optimizers: list[Optimizer],
    clip: tuple[float, str] | None,
) -> float:
    """One optimizer step as Lightning does it: forward and backward are a closure of the step."""
    seen: list[float] = []

    def loss_with_gradients() -> float:
        loss = closure.loss(batch, index)
        if len(optimizers) > 1 and closure.num_losses > 1:
            raise MeasurementError(
                f"The step has {len(optimizers)} optimizers and {closure.num_losses} losses, and which belongs to "
                "which is not known; define curvature_loss(batch) on the module, or pass optimizer=."
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if clip is not None:
            _clip(parameters, *clip)
        seen.append(float(loss.detach()))
        return seen[-1]

    if len(optimizers) == 1:
        optimizers[0].step(loss_with_gradients)
    else:
        loss_with_gradients()
        for optimizer in optimizers:
            optimizer.step()
    return seen[0]


def _clip(parameters: list[torch.nn.Parameter], value: float, algorithm: str) -> None:
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, value)


def _evaluate(closure: LossClosure, batches: Sequence[Any], start: Callable[[], None]) -> float:
    """Mean loss over all the data, with the same random numbers each time and none of the steps'."""
    present = _random_state()
    start()
    total = sum(float(closure.loss(batch, i).detach()) * batch_size(batch) for i, batch in enumerate(batches))
    present()
    return total / num_samples(batches)


def _random_state() -> Callable[[], None]:
    """What goes back to the present random state; far cheaper than seeding, which asks for devices each time."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def _is_one(batches: Sequence[Any], how: Descent) -> bool:
    """Whether a minibatch is all the data."""
    return len(batches) == 1 and (how.batch_size is None or how.batch_size >= batch_size(batches[0]))


def _minibatches(batches: Sequence[Any], how: Descent, seed: int) -> Iterator[tuple[int, Any]]:
    """Index and minibatch, pass after pass without end; a last smaller minibatch of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    joined = join_batches(batches) if how.batch_size is not None else None
    if joined is None or how.batch_size is None:
        while True:
            numbers = torch.randperm(len(batches), generator=generator).tolist() if how.shuffle else range(len(batches))
            for index, number in enumerate(numbers):
                yield index, batches[number]
    total = batch_size(joined)
    size = min(how.batch_size, total)
    while True:
        order = torch.randperm(total, generator=generator) if how.shuffle else torch.arange(total)
        for index in range(total // size):
            yield index, chosen_samples(joined, order[index * size : (index + 1) * size])
