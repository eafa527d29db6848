"""Per-layer shortcuts for Gram matrices of per-sample gradients.

The gradient of one output column with respect to a layer's weights is a sum over positions of (gradient at the layer's
output) x (layer input). Inner products between samples then need no gradient of the size of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import unfoldNd
from torch import Tensor, nn
from torch.nn import functional as F

ROW_CHUNK = 64 * 2**20  # elements of per-sample gradient rows held at once


@dataclass
class LayerCall:
    """One call of a layer during the measured forward pass."""

    module: nn.Module
    input: Tensor
    output: Tensor


class LayerTaps:
    """Context that records the calls of all layers that have a shortcut, and passes on clones of their outputs.

    The clone keeps the gradient at the layer's output reachable when the next operation works in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: dict[nn.Module, list[LayerCall]] = {}
        self._modules = [child for child in module.modules() if patches_of(child) is not None]
        self._handles: list[Any] = []

    def __enter__(self) -> LayerTaps:
        self._handles = [child.register_forward_hook(self._hook) for child in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or len(args) != 1 or not isinstance(args[0], Tensor):
            self.calls.setdefault(module, []).append(LayerCall(module, torch.empty(0), torch.empty(0)))
            return None
        self.calls.setdefault(module, []).append(LayerCall(module, args[0].detach(), output))
        return output.clone()


@dataclass(frozen=True)
class Factors:
    """A layer's inputs and output gradients, cut in groups and positions.

    Attributes:
        inputs: (groups, N, k, L): what multiplies the weights, at each of L positions; row numbers for a lookup.
        gradients: (groups, R, N, O, L): gradients of R output columns at the layer's output.
        diagonal: whether the layer scales features one by one (norms), so that input and gradient are multiplied, and
            k = O.
        lookup: whether the layer is a table whose rows the inputs name, k = 1; its gradient rows are (table rows, O).
        weight: the weight, or None when it is frozen; its gradient rows are (O, k), or (O,) when diagonal.
        bias: the bias, or None.
    """

    inputs: Tensor
    gradients: Tensor
    diagonal: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lookup: bool = False


def linear_patches(module: nn.Linear, x: Tensor) -> Tensor:
    """(1, N, d_in, L)."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)[None]


def conv_patches(module: Any, x: Tensor) -> Tensor:
    """(groups, N, c_in / groups * kernel, L)."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    elif isinstance(padding, str):
        x, padding = F.pad(x, module._reversed_padding_repeated_twice), 0
    patches: Tensor = unfoldNd.unfoldNd(
        x, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
    )
    return patches.reshape(x.shape[0], module.groups, -1, patches.shape[-1]).transpose(0, 1)


def norm_patches(module: Any, x: Tensor) -> Tensor:
    """(1, N, features, L): the normalised input, which is what the scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        return normalised.reshape(x.shape[0], -1, module.weight.numel()).transpose(1, 2)[None]
    if isinstance(module, nn.GroupNorm):
        normalised = F.group_norm(x, module.num_groups, eps=module.eps)
    else:
        normalised = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return normalised.reshape(x.shape[0], x.shape[1], -1)[None]


def lookup_patches(module: nn.Embedding, x: Tensor) -> Tensor:
    """(1, N, 1, L): which row of the table each position takes."""
    return x.reshape(x.shape[0], 1, -1)[None]


def patches_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """The patch function of a layer that has a shortcut and parameters of its own, else None."""
    own = module._parameters
    if own.get("weight") is None:
        return None
    if isinstance(module, nn.Linear):
        return linear_patches
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return conv_patches
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return norm_patches
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse:
        return lookup_patches
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and not module.training:
        return norm_patches
    return None


def factors(call: LayerCall, gradients: Tensor, trainable: set[Tensor]) -> Factors:
    """Cut one layer call into ``Factors``; ``gradients`` is (R, N, ...), of the first N samples of the output."""
    module: Any = call.module
    patches = patches_of(call.module)
    assert patches is not None
    inputs = patches(module, call.input[: gradients.shape[1]])
    if isinstance(module, nn.Linear | nn.Embedding):
        width = module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
        gradients = gradients.reshape(*gradients.shape[:2], -1, width).transpose(2, 3)
    elif isinstance(module, nn.LayerNorm):
        gradients = gradients.reshape(*gradients.shape[:2], -1, module.weight.numel()).transpose(2, 3)
    else:
        gradients = gradients.reshape(*gradients.shape[:3], -1)
    groups = inputs.shape[0]
    size = gradients.shape[2] // groups
    grouped = gradients.reshape(*gradients.shape[:2], groups, size, gradients.shape[3]).permute(2, 0, 1, 3, 4)
    bias = module._parameters.get("bias")
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        grouped = grouped * (inputs != module.padding_idx)[:, None]
    return Factors(
        inputs,
        grouped,
        diagonal=patches is norm_patches,
        weight=module.weight if module.weight in trainable else None,
        bias=bias if bias is not None and bias in trainable else None,
        lookup=patches is lookup_patches,
    )


def concatenate(parts: list[Factors]) -> Factors:
    """The factors of one layer over several batches, as one batch.

    Batches of shorter sequences have fewer positions, and may have fewer columns: zeros in their place add nothing.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    length = max(part.inputs.shape[3] for part in parts)
    columns = max(part.gradients.shape[1] for part in parts)
    inputs = torch.cat([_padded_to(part.inputs, {3: length}) for part in parts], dim=1)
    gradients = torch.cat([_padded_to(part.gradients, {1: columns, 4: length}) for part in parts], dim=2)
    return Factors(inputs, gradients, first.diagonal, first.weight, first.bias, first.lookup)


def _padded_to(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """Zeros appended until the given dimensions have the given sizes."""
    missing = [sizes.get(dim, size) - size for dim, size in enumerate(tensor.shape)]
    return F.pad(tensor, [amount for extra in reversed(missing) for amount in (0, extra)]) if any(missing) else tensor


def contract(layer: Factors, mix: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The gradient sum_{r,n} mix[r, n] row[r, n] of each parameter, from the factors alone (to check them)."""
    g = torch.einsum("grnol,rn->gnol", layer.gradients, mix.to(layer.gradients.dtype))
    out = []
    if layer.lookup:
        assert layer.weight is not None
        table = torch.zeros_like(layer.weight, dtype=g.dtype)
        return [(layer.weight, table.index_add_(0, layer.inputs.flatten(), g[0].mT.flatten(0, 1)))]
    if layer.weight is not None:
        pattern = "gnol,gnol->go" if layer.diagonal else "gnol,gnkl->gok"
        out.append((layer.weight, torch.einsum(pattern, g, layer.inputs).reshape(layer.weight.shape)))
    if layer.bias is not None:
        out.append((layer.bias, g.sum(dim=(1, 3)).reshape(layer.bias.shape)))
    return out


def add_gram(gram: Tensor, layer: Factors) -> None:
    """Add a layer's share to the (R, N, R, N) float64 Gram matrix, by the cheaper of its routes."""
    num_groups, num_columns, num_samples, size, positions = layer.gradients.shape
    num_rows, num_inputs = num_columns * num_samples, layer.inputs.shape[2]
    if layer.lookup:
        _add_lookup(gram, layer)
        return
    if layer.diagonal:
        _add_diagonal(gram, layer)
        return
    for group in range(num_groups):
        g, x = layer.gradients[group], layer.inputs[group]
        if layer.bias is not None:
            ones = x.new_ones(num_samples, 1, positions)
            x = ones if layer.weight is None else torch.cat([x, ones], dim=1)
        if positions == 1:
            _add_vectors(gram, g[..., 0], x[..., 0])
            continue
        by_rows = num_rows * size * num_inputs * positions + num_rows**2 * size * num_inputs
        by_pairs = (num_rows * positions) ** 2 * size + (num_samples * positions) ** 2 * num_inputs
        if by_pairs < by_rows and (num_samples * positions) ** 2 <= ROW_CHUNK:
            _add_pairs(gram, g, x)
        else:
            _add_rows(gram, g, x)


def add_rows(gram: Tensor, rows: Tensor) -> None:
    """Add J J^T for explicit gradient rows (R, N, p)."""
    flat = rows.reshape(-1, rows.shape[-1])
    gram.view(len(flat), len(flat)).add_(flat @ flat.T)


def _add_vectors(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """One position: <g_rn, g_sm> <x_n, x_m>, for s >= r only; the other half follows by symmetry at the end."""
    num_columns, num_samples, size = g.shape
    inputs = (x @ x.T).to(gram.dtype)
    for r in range(num_columns):
        outer = g[r] @ g[r:].reshape(-1, size).T
        block = outer.view(num_samples, num_columns - r, num_samples).to(gram.dtype) * inputs[:, None, :]
        gram[r, :, r:] += block
        gram[r + 1 :, :, r] += block[:, 1:].permute(1, 2, 0)


def _add_rows(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """Explicit rows, a chunk of output channels at a time."""
    num_columns, num_samples, size, _ = g.shape
    chunk = max(1, ROW_CHUNK // max(1, num_columns * num_samples * x.shape[1]))
    for start in range(0, size, chunk):
        rows = torch.matmul(g[:, :, start : start + chunk], x.transpose(1, 2))  # (R, N, o, k)
        add_rows(gram, rows.reshape(num_columns, num_samples, -1))


def _add_pairs(gram: Tensor, g: Tensor, x: Tensor) -> None:
    """Sum over position pairs of <g_rn[p], g_sm[q]> <x_n[p], x_m[q]>."""
    num_columns, num_samples, size, positions = g.shape
    flat_x = x.transpose(1, 2).reshape(-1, x.shape[1])
    inputs = flat_x @ flat_x.T
    flat_g = g.transpose(2, 3).reshape(num_columns, num_samples * positions, size)
    for r in range(num_columns):
        for s in range(r, num_columns):
            product = (flat_g[r] @ flat_g[s].T) * inputs
            block = product.view(num_samples, positions, num_samples, positions).sum(dim=(1, 3), dtype=gram.dtype)
            gram[r, :, s] += block
            if s > r:
                gram[s, :, r] += block.T


def _add_diagonal(gram: Tensor, layer: Factors) -> None:
    g = layer.gradients[0]
    if layer.weight is not None:
        add_rows(gram, torch.einsum("rnol,nol->rno", g, layer.inputs[0]))
    if layer.bias is not None:
        add_rows(gram, g.sum(dim=3))


def _add_lookup(gram: Tensor, layer: Factors) -> None:
    """Sum over pairs of positions that take the same row of the table, one table row at a time."""
    g, rows = layer.gradients[0], layer.inputs[0, :, 0]  # (R, N, O, L), (N, L)
    num_columns, num_samples, size, _ = g.shape
    pairs = rows * num_samples + torch.arange(num_samples, device=rows.device)[:, None]
    pairs, positions = torch.unique(pairs, return_inverse=True)  # (table row, sample), sorted
    sums = g.new_zeros(len(pairs), num_columns, size)
    sums.index_add_(0, positions.flatten(), g.permute(1, 3, 0, 2).reshape(-1, num_columns, size))
    lengths = torch.unique_consecutive(pairs // num_samples, return_counts=True)[1].tolist()
    flat = gram.view(num_columns * num_samples, -1)
    first = num_samples * torch.arange(num_columns, device=rows.device)
    parts = zip(torch.split(pairs % num_samples, lengths), torch.split(sums, lengths), strict=True)
    for samples, own in parts:
        own = own.flatten(0, 1)
        index = (samples[:, None] + first).flatten()
        flat[index[:, None], index] += (own @ own.T).to(gram.dtype)
