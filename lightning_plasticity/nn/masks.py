"""Weights under a mask: how a mask is held, and where a module has masked weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """Parametrization that multiplies a weight by a mask; register it with ``torch.nn.utils.parametrize``.

    The weight's parameter is then ``parametrizations.weight.original``, its mask a buffer beside it, and the gradient
    of masked entries is zero.

    Args:
        mask: bool, of the weight's shape; True where an entry is active.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where masked, whatever is kept there."""
        return weight.masked_fill(~self.mask, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is kept of a weight that is assigned."""
        return weight.masked_fill(~self.mask, 0.0)


def find_masks(module: nn.Module) -> dict[str, Tensor]:
    """Active entries of all masked parameters: bool tensors by the parameter's name in ``named_parameters``.

    Knows ``Mask`` and ``torch.nn.utils.prune``. Parameters without a mask are left out, and so are those with a further
    parametrization, whose entries are not the weight's entries.
    """
    masks: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if parametrize.is_parametrized(child):
            for name, chain in child.parametrizations.items():
                if len(chain) == 1 and isinstance(chain[0], Mask):
                    masks[f"{dot}parametrizations.{name}.original"] = chain[0].mask
        buffers = dict(child.named_buffers(recurse=False))
        for name, _ in child.named_parameters(recurse=False):
            mask = buffers.get(f"{name.removesuffix('_orig')}_mask")
            if name.endswith("_orig") and mask is not None:
                masks[f"{dot}{name}"] = mask.bool()
    return masks
