"""What a user hands over as data, as probe batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_plasticity.curvature.errors import MeasurementError
from lightning_plasticity.nn.batches import map_tensors


def as_batches(data: Any, model: nn.Module) -> list[Any]:
    """The probe batches on the model's device.

    Raises:
        MeasurementError: when there is none.
        TypeError: for data that holds no batches.
    """
    if isinstance(data, Dataset):
        raise TypeError(
            f"data is a {type(data).__name__}, which gives single samples; pass "
            "torch.utils.data.DataLoader(data, batch_size=...)."
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data is {type(data).__name__}, expected (inputs, targets) or an iterable of such pairs.")
    if _is_one_pair(data):
        data = [data]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches = [map_tensors(batch, lambda tensor: tensor.to(device)) for batch in data]
    if not batches:
        raise MeasurementError("data holds no batch; pass (inputs, targets) or a non-empty iterable of such pairs.")
    return batches


def _is_one_pair(data: Any) -> bool:
    """``(inputs, targets)``, where several inputs are a tuple or a dict; targets that are a tuple are a second pair."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not isinstance(data[1], Tensor | dict):
        return False
    inputs = data[0]
    return isinstance(inputs, Tensor | dict) or (
        isinstance(inputs, tuple | list) and all(isinstance(part, Tensor) for part in inputs)
    )
