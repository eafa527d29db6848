"""One context in which a module can be run, differentiated and forgotten: nothing that training uses has changed after.

Recipe and evidence: every item here is a way in which a plain ``module.training_step(batch, 0)`` changes a run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_plasticity.nn.precision import full_precision as raised_precision
from lightning_plasticity.nn.snapshot import Snapshot, shadow_method
from lightning_plasticity.nn.twice import twice_differentiable

Mode = Literal["frozen", "as_is", "eval"]
MODES = ("frozen", "as_is", "eval")

_measuring = 0


def is_measuring() -> bool:
    """Whether the code that asks runs inside ``undisturbed``; our own regularisers stand aside then."""
    return _measuring > 0


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the random states of torch (CPU and CUDA), NumPy and Python on exit, also after an error."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_rng(seed: int) -> None:
    """Seed torch, NumPy and Python; call it inside ``preserve_rng``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def undisturbed(
    module: nn.Module,
    *,
    mode: Mode = "frozen",
    seed: int = 0,
    full_precision: bool = False,
    optimizers: Iterable[Any] = (),
    schedulers: Iterable[Any] = (),
    draw: bool = False,
) -> Iterator[list[Tensor]]:
    """Run ``module`` and take gradients with ``torch.autograd.grad``; on exit all is as it was, bit for bit.

    Inside: gradients on, inference mode and autocast off, attention by its math kernel (the fused ones have no double
    backward), checkpointing and weight normalisation by forms that can be differentiated twice, compiled code run
    eagerly, TF32 off, random state seeded. ``log`` and ``log_dict`` do nothing; in manual
    optimization ``manual_backward`` collects the loss instead of running it, and optimizers and schedulers do not step,
    also those that the module keeps itself. A TensorBoard writer kept on the module writes nothing; an iterator kept
    there is not drawn from (a copy is, or a ``RuntimeError`` says that there is none).

    Args:
        module: the user's module, run as it is (never copied).
        mode: ``"frozen"`` switches off BatchNorm updates and dropout, by layer type; ``"as_is"`` keeps what the
            optimizer sees; ``"eval"`` is ``module.eval()``, which also switches code that asks ``self.training``.
        seed: of the random state inside; the same seed gives the same dropout masks and samples.
        full_precision: whether the tensors of a half-precision module become float32 meanwhile; the batches are then
            for ``match_precision`` to cast.
        optimizers: the live optimizers that the module can reach; also their parameter groups' settings are put back.
        schedulers: their learning-rate schedulers; also their state is put back.

        draw: whether iterators kept on the module are drawn from, and stay moved on: for regularisers, which need the
            step to run.

    Yields:
        The list that collects the losses given to ``manual_backward``.

    Raises:
        ValueError: for an unknown mode.

    Example:
        >>> import torch
        >>> from lightning_plasticity.nn import undisturbed
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> with undisturbed(net, mode="as_is"):
        ...     loss = net(torch.randn(8, 3)).sum()
        >>> net[1].num_batches_tracked
        tensor(0)
    """
    global _measuring
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}, expected one of {MODES}.")
    losses: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_plain_cuda(module))
        stack.enter_context(twice_differentiable())
        if _is_compiled(module):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        optimizers, schedulers = list(optimizers), list(schedulers)
        snapshot = Snapshot(module, _settings_of(optimizers, schedulers))
        stack.callback(snapshot.restore)
        if full_precision:
            stack.enter_context(raised_precision(module))
        if not draw:
            snapshot.divert_iterators()
        kept = [optimizer for optimizer in snapshot.optimizers if all(optimizer is not one for one in optimizers)]
        timed = [scheduler for scheduler in snapshot.schedulers if all(scheduler is not one for one in schedulers)]
        _silence(stack, module, losses, [*optimizers, *kept], [*schedulers, *timed])
        _silence_kept(stack, module, snapshot, optimizers)
        _set_mode(module, mode)
        _make_gradients_dense(module)
        seed_rng(seed)
        _measuring += 1
        try:
            yield losses
        finally:
            _measuring -= 1


def _settings_of(optimizers: Iterable[Any], schedulers: Iterable[Any]) -> list[Any]:
    """What a step may write to by hand: learning rates in the parameter groups, counters of schedulers."""
    groups = [getattr(optimizer, "param_groups", None) for optimizer in optimizers]
    return [*groups, *(getattr(scheduler, "__dict__", None) for scheduler in schedulers)]


def _autocast_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@contextmanager
def _plain_cuda(module: nn.Module) -> Iterator[None]:
    """Full float32 products, and recurrent layers that can be differentiated twice; a no-op without CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        enabled = torch.backends.cudnn.enabled and not recurrent
        with torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolution


def _is_compiled(module: nn.Module) -> bool:
    return any(
        "_orig_mod" in submodule._modules
        or getattr(submodule, "_compiled_call_impl", None) is not None
        or getattr(submodule, "_compiler_ctx", None) is not None
        for submodule in module.modules()
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _only_closure(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    return closure() if callable(closure) else None


def _silence(
    stack: ExitStack, module: nn.Module, losses: list[Tensor], optimizers: Iterable[Any], schedulers: Iterable[Any]
) -> None:
    """Shadow what would write outside the module, until the stack closes."""

    def collect(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)

    for submodule in module.modules():
        if hasattr(type(submodule), "manual_backward"):
            for name in ("log", "log_dict", "clip_gradients"):
                stack.callback(shadow_method(submodule, name, _nothing))
            stack.callback(shadow_method(submodule, "manual_backward", collect))
    for optimizer in optimizers:
        stack.callback(shadow_method(optimizer, "step", _only_closure))
        stack.callback(shadow_method(optimizer, "zero_grad", _nothing))
    for scheduler in schedulers:
        stack.callback(shadow_method(scheduler, "step", _nothing))


def _silence_kept(stack: ExitStack, module: nn.Module, snapshot: Snapshot, live: list[Any]) -> None:
    """What is kept on the module and writes outside; and the state of the Trainer's optimizers, once it is asked for.

    Remembered then only, because it is two more copies of the parameters, and most steps never come near it.
    """
    for writer in snapshot.writers:
        for name in dir(type(writer)):
            if name.startswith("add_"):
                stack.callback(shadow_method(writer, name, _nothing))
    for submodule in module.modules():
        if live and hasattr(type(submodule), "manual_backward") and hasattr(type(submodule), "optimizers"):
            reach: Any = submodule.optimizers

            def optimizers(*args: Any, reach: Any = reach, **kwargs: Any) -> Any:
                snapshot.add(optimizer.state for optimizer in live)
                return reach(*args, **kwargs)

            stack.callback(shadow_method(submodule, "optimizers", optimizers))


def _make_gradients_dense(module: nn.Module) -> None:
    """Sparse gradients of lookup tables cannot be differentiated or joined with others; the forward pass stays."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Embedding | nn.EmbeddingBag):
            submodule.sparse = False


def _set_mode(module: nn.Module, mode: Mode) -> None:
    if mode == "eval":
        module.eval()
    if mode != "frozen":
        return
    for submodule in module.modules():
        if isinstance(submodule, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            submodule.training = False
        elif isinstance(submodule, nn.RNNBase | nn.MultiheadAttention):
            submodule.dropout = 0.0
