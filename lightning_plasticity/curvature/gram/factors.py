"""Gradient rows of the parameters that layers multiply their inputs by, in factored form.

The gradient of one output column with respect to a weight is a sum over positions, and over all calls of all layers
that own the weight, of (gradient at the layer's output) x (layer input). Inner products between samples then need no
gradient of the size of the weight; how they are summed is in ``shares``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature.layers import LayerCall, lookup_patches, norm_patches, patches_of
from lightning_plasticity.nn.masks import parameter_of

Kind = Literal["dense", "diagonal", "lookup"]
Key = tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Factors:
    """A weight's inputs and output gradients, cut in groups and positions; positions of all its calls stand together.

    Attributes:
        inputs: (groups, N, k, L): what multiplies the weight, at each of L positions; row numbers for a lookup.
        gradients: (groups, R, N, O, L): gradients of R output columns at the layer's output.
        kind: ``"dense"``, gradient rows are (O, k); ``"diagonal"``, the layer scales features one by one (norms), so
            that k = O and rows are (O,); ``"lookup"``, a table whose rows the inputs name: k = 1, rows are (table, O).
        weight: the weight, or None when it is frozen or counted elsewhere.
        bias: the bias, or None.
        mask: (groups, O, k) bool, the active entries of a dense weight; None where all are.
    """

    inputs: Tensor
    gradients: Tensor
    kind: Kind
    weight: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    mask: Tensor | None = None

    def absolute(self) -> Factors:
        """The same with the absolute values of all terms."""
        inputs = self.inputs if self.kind == "lookup" else self.inputs.abs()
        return replace(self, inputs=inputs, gradients=self.gradients.abs())


Share = tuple[Factors, ...]  # one for each kind of use of the same parameters: a tied embedding has two


def shares_by_parameter(
    calls: Sequence[LayerCall], gradients: Sequence[Tensor], trainable: set[Tensor]
) -> dict[Key, Share]:
    """Factors of each weight and bias over all calls that use it; those with the same calls are taken together.

    Args:
        calls: usable layer calls.
        gradients: (R, N, ...) for each, of the first N samples of its output.
        trainable: parameters that count.

    Returns:
        Shares by their parameters: (weight, bias), or one of them. What a call cannot be cut for is left out.
    """
    cuts = [_cut(call, gradient) for call, gradient in zip(calls, gradients, strict=True)]
    uses: dict[nn.Parameter, list[tuple[int, str]]] = {}
    for index, call in enumerate(calls):
        for role in ("weight", "bias"):
            parameter, mask = parameter_of(call.module, role)
            if role == "bias" and mask is not None:
                continue  # it goes the general way
            if parameter is not None and parameter in trainable:
                uses.setdefault(parameter, []).append((index, role))
    together: dict[tuple[int, ...], dict[str, nn.Parameter]] = {}
    for parameter, found in uses.items():
        roles = {role for _, role in found}
        if len(roles) == 1:
            together.setdefault(tuple(index for index, _ in found), {})[roles.pop()] = parameter
    shares: dict[Key, Share] = {}
    for indices, own in together.items():
        if share := _share([cuts[index] for index in indices], own):
            shares[tuple(own[role] for role in ("weight", "bias") if role in own)] = share
    return shares


def _share(cuts: Sequence[Factors], own: Mapping[str, nn.Parameter]) -> Share:
    """The share of a weight and a bias with the same calls; empty where the calls do not fit together."""
    kinds = {cut.kind: [part for part in cuts if part.kind == cut.kind] for cut in cuts}
    if any(len({_shape(part) for part in parts}) > 1 for parts in kinds.values()):
        return ()
    if len(kinds) > 1 and ("diagonal" in kinds or "bias" in own):
        return ()
    weight, bias = own.get("weight"), own.get("bias")
    if weight is not None and not all(_same_mask(cut.mask, cuts[0].mask) for cut in cuts):
        return ()
    mask = cuts[0].mask if weight is not None else None
    return tuple(replace(_side_by_side(kinds[kind]), weight=weight, bias=bias, mask=mask) for kind in sorted(kinds))


def _same_mask(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _shape(cut: Factors) -> tuple[int, ...]:
    """Groups, k and O."""
    return cut.inputs.shape[0], cut.inputs.shape[2], cut.gradients.shape[3]


def _side_by_side(parts: Sequence[Factors]) -> Factors:
    """The positions of several calls, one after the other."""
    if len(parts) == 1:
        return parts[0]
    inputs = torch.cat([part.inputs for part in parts], dim=3)
    return Factors(inputs, torch.cat([part.gradients for part in parts], dim=4), parts[0].kind)


def _cut(call: LayerCall, gradients: Tensor) -> Factors:
    """One call, without its parameters; ``gradients`` is (R, N, ...), of the first N samples of the output."""
    module: Any = call.module
    patches = patches_of(call.module)
    assert patches is not None
    inputs = patches(module, call.input[: gradients.shape[1]])
    if isinstance(module, nn.Linear | nn.Embedding):
        width = module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
        gradients = gradients.reshape(*gradients.shape[:2], -1, width).transpose(2, 3)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        gradients = gradients.reshape(*gradients.shape[:2], -1, module.weight.numel()).transpose(2, 3)
    else:
        gradients = gradients.reshape(*gradients.shape[:3], -1)
    groups = inputs.shape[0]
    size = gradients.shape[2] // groups
    grouped = gradients.reshape(*gradients.shape[:2], groups, size, gradients.shape[3]).permute(2, 0, 1, 3, 4)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        grouped = grouped * (inputs != module.padding_idx)[:, None]
    kinds: dict[Any, Kind] = {norm_patches: "diagonal", lookup_patches: "lookup"}
    return Factors(inputs, grouped, kinds.get(patches, "dense"), mask=_mask(call.module, groups, size))


def _mask(module: nn.Module, groups: int, size: int) -> Tensor | None:
    """(groups, O, k); None where every entry is active, which costs what it does without a mask."""
    mask = parameter_of(module, "weight")[1]
    return None if mask is None or bool(mask.all()) else mask.reshape(groups, size, -1)


def concatenate(parts: Sequence[Share]) -> Share:
    """The share of the same parameters over several batches, as one batch.

    Batches of shorter sequences have fewer positions, and may have fewer columns: zeros in their place add nothing.
    """
    return tuple(_one_batch(same_kind) for same_kind in zip(*parts, strict=True))


def _one_batch(parts: Sequence[Factors]) -> Factors:
    if len(parts) == 1:
        return parts[0]
    length = max(part.inputs.shape[3] for part in parts)
    columns = max(part.gradients.shape[1] for part in parts)
    inputs = torch.cat([_padded_to(part.inputs, {3: length}) for part in parts], dim=1)
    gradients = torch.cat([_padded_to(part.gradients, {1: columns, 4: length}) for part in parts], dim=2)
    return replace(parts[0], inputs=inputs, gradients=gradients)


def _padded_to(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """Zeros appended until the given dimensions have the given sizes."""
    missing = [sizes.get(dim, size) - size for dim, size in enumerate(tensor.shape)]
    return F.pad(tensor, [amount for extra in reversed(missing) for amount in (0, extra)]) if any(missing) else tensor


def restricted(share: Share, parameters: set[Tensor]) -> Share:
    """The same without the parameters that are not among the given ones; empty when none is left."""
    found = tuple(
        replace(
            part,
            weight=part.weight if part.weight in parameters else None,
            bias=part.bias if part.bias in parameters else None,
        )
        for part in share
    )
    return tuple(part for part in found if part.weight is not None or part.bias is not None)


def contract(share: Share, mix: Tensor) -> list[Tensor]:
    """The gradient sum_{r,n} mix[r, n] row[r, n] of each parameter of the share's key, from the factors alone."""
    found = [_contract(part, mix) for part in share]
    return [torch.stack(same).sum(0) for same in zip(*found, strict=True)]


def _contract(part: Factors, mix: Tensor) -> list[Tensor]:
    g = torch.einsum("grnol,rn->gnol", part.gradients, mix.to(part.gradients.dtype))
    if part.kind == "lookup":
        assert part.weight is not None
        table = torch.zeros_like(part.weight, dtype=g.dtype)
        return [table.index_add_(0, part.inputs.flatten(), g[0].mT.flatten(0, 1))]
    out = []
    if part.weight is not None:
        pattern = "gnol,gnol->go" if part.kind == "diagonal" else "gnol,gnkl->gok"
        rows = torch.einsum(pattern, g, part.inputs)
        out.append((rows if part.mask is None else rows * part.mask).reshape(part.weight.shape))
    if part.bias is not None:
        out.append(g.sum(dim=(1, 3)).reshape(part.bias.shape))
    return out
