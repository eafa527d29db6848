"""How labels of hidden units travel through the functions that a network calls; by name, shape and a try-out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LabelsOf = Callable[[Tensor], Tensor | None]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of functions, with underscores at their ends taken off. Value by value, so a unit stays where it is:
SAME = _words(
    "relu relu6 gelu elu selu celu silu mish tanh sigmoid hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink leaky_relu rrelu prelu threshold softplus softsign logsigmoid clamp clamp_min clamp_max clip abs neg "
    "sign exp square sqrt sin cos dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
    "feature_alpha_dropout detach clone contiguous to type float double half bfloat16 cpu cuda data requires_grad gt "
    "ge lt le eq ne isfinite nan_to_num local_response_norm positive"
)
# Applied to the labels as well:
MOVES = _words(
    "flatten unflatten reshape view reshape_as view_as permute transpose swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand expand_as repeat tile chunk split unbind narrow select getitem gather index_select flip roll t T "
    "mT pixel_shuffle pixel_unshuffle cat concat concatenate stack hstack vstack"
)
# Mix positions, not channels:
POOLS = _words(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d interpolate "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample pad"
)
NORM_CALLS = _words("batch_norm instance_norm layer_norm group_norm rms_norm")
REDUCTIONS = _words("mean sum amax amin")
SUMS = _words("add sub radd rsub iadd isub subtract")
PRODUCTS = _words("mul rmul imul multiply div truediv itruediv divide pow")
# Only ask for the shape of an activation:
FRESH = _words(
    "zeros_like ones_like rand_like randn_like randint_like empty_like full_like new_zeros new_ones new_full new_empty "
    "new_tensor"
)
# What a Linear or a convolution calls:
WEIGHT_CALLS = _words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")


def moved(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: list[Tensor],
    own: Tensor,
    labels_of: LabelsOf,
) -> list[Tensor | None] | None:
    """Labels of the outputs of a function of one activation, or of several that it joins.

    Args:
        func: the function.
        name: its name.
        args: its arguments.
        kwargs: its keyword arguments.
        outputs: what it returned.
        own: labels of its first labelled argument.
        labels_of: gives the labels of any argument.

    Returns:
        For each output its labels; None where the function cannot be followed.
    """
    if name in SAME | NORM_CALLS:
        return [own if output.shape == own.shape else None for output in outputs]
    if name in MOVES:
        try:
            result = func(*_swapped(args, labels_of), **_swapped(kwargs, labels_of))
        except (RuntimeError, TypeError, IndexError):
            return None
        found: list[Tensor | None] = list(nested_tensors(result))
        shapes = [labels.shape for labels in found if labels is not None]
        return found if shapes == [output.shape for output in outputs] else None
    if name in POOLS:
        channels = by_channel(own)
        if channels is None or outputs[0].ndim != own.ndim or outputs[0].shape[1] != len(channels):
            return None
        shape = [-1 if d == 1 else 1 for d in range(own.ndim)]
        return [channels.reshape(shape).expand(output.shape) for output in outputs]
    if name in REDUCTIONS and (len(args) > 1 or "dim" in kwargs):
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        keep = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
        if dims is None:
            return None
        low, high = own.amin(dims, keepdim=keep), own.amax(dims, keepdim=keep)
        return [low] if torch.equal(low, high) else None
    return None


def _swapped(value: Any, labels_of: LabelsOf) -> Any:
    """Arguments with labels in place of activations; -1 in place of other values."""
    if isinstance(value, Tensor):
        labels = labels_of(value)
        if labels is not None:
            return labels.contiguous()
        blank = value.is_floating_point()
        return torch.full(value.shape, -1, dtype=torch.int64, device=value.device) if blank else value
    if isinstance(value, tuple | list):
        return type(value)(_swapped(item, labels_of) for item in value)
    if isinstance(value, dict):
        return {key: _swapped(item, labels_of) for key, item in value.items()}
    return value


def by_channel(labels: Tensor) -> Tensor | None:
    """(C,) labels of dimension 1, where they are the same at all samples and positions."""
    if labels.ndim < 2:
        return None
    columns = labels.movedim(1, -1).reshape(-1, labels.shape[1])
    return columns[0] if bool((columns == columns[0]).all()) else None


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from nested_tensors(item)
    elif isinstance(value, dict):
        yield from nested_tensors(list(value.values()))
