"""Run a kind of module with and without callbacks, and its curvature by dense second derivatives in float64."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from runs import run_tasks
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from zoo.base import Hand, Kind

QUANTITIES = ("ggn", "hessian")


@dataclass
class Run:
    """What two tasks left behind, what was warned of, and the module."""

    outcome: dict[str, Any]
    told: list[str]
    module: Any


def run(kind: Kind, callbacks: Sequence[L.Callback] = (), make_module: Any = None, **settings: Any) -> Run:
    """Train on both tasks from a fixed seed."""
    made: list[Any] = []

    def make() -> Any:
        made.append((make_module or kind.make_module)())
        return made[-1]

    outcome, told = run_tasks(make, kind.make_loaders(), list(callbacks), **kind.expectation.settings, **settings)
    return Run(outcome, told, made[-1])


def cheap_monitors(directory: Path, **settings: Any) -> tuple[HessianSpectrumMonitor, FeatureRankMonitor]:
    """Both monitors, exact, without calibration, on all samples."""
    save_dir = str(directory)
    hessian = HessianSpectrumMonitor(QUANTITIES, max_seconds=None, max_memory=2**28, save_dir=save_dir, **settings)
    return hessian, FeatureRankMonitor(save_dir=save_dir, **settings)


def probed(loader: DataLoader[Any]) -> Any:
    """All samples of a task in one batch, in the order in which monitors take them."""
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return (loader.collate_fn or default_collate)([loader.dataset[int(index)] for index in order])


def initial(kind: Kind) -> Any:
    """The module as a run starts with it."""
    torch.manual_seed(0)
    return kind.make_module()


def reference(hand: Hand, module: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The eigenvalues of GGN and Hessian on the trainable parameters, ascending, (P,) float64."""
    module = module.double()
    torch.manual_seed(0)  # what the step draws, it draws from this seed
    outputs, loss_of = hand(module, doubled(batch))
    parameters = [p for p in module.parameters() if p.requires_grad]
    jacobian = derivative(outputs.reshape(-1), parameters)
    values = outputs.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss_of(values), values, create_graph=True)
    curvature = derivative(slope.reshape(-1), [values])
    slopes = torch.autograd.grad(loss_of(outputs), parameters, create_graph=True, allow_unused=True)
    flat = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, slopes, strict=True)]
    hessian = derivative(torch.cat([part.reshape(-1) for part in flat]), parameters)
    torch.testing.assert_close(hessian, hessian.T)
    matrices = {"ggn": jacobian.T @ curvature @ jacobian, "hessian": hessian}
    return {name: torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)) for name, matrix in matrices.items()}


def derivative(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """(K, P) of (K,) values, row by row."""
    sizes = [parameter.numel() for parameter in parameters]
    rows = torch.zeros(len(values), sum(sizes), dtype=torch.float64)
    for row, value in zip(rows, values, strict=True):
        if not value.requires_grad:
            continue
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for part, into in zip(found, row.split(sizes), strict=True):
            if part is not None:
                into.copy_((part.to_dense() if part.is_sparse else part).reshape(-1))
    return rows


def doubled(batch: Any) -> Any:
    """A nested batch with its floating-point tensors in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: doubled(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [doubled(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch):
        twin = copy(batch)
        for each in fields(batch):
            object.__setattr__(twin, each.name, doubled(getattr(batch, each.name)))
        return twin
    return batch
