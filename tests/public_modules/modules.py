"""LightningModules that others wrote and published, each with batches made here; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Public:
    """How to make a module and its loader, and what is to be expected of them.

    Attributes:
        make: returns (module, training loader), with equal weights and batches each time.
        requires: what to install for it, by import name.
        quantities: curvature matrices that its training step gives without help.
        features: whether it has hidden layers to find.
    """

    make: Callable[[], tuple[Any, Any]]
    requires: str
    quantities: tuple[str, ...] = ("ggn", "hessian")
    features: bool = True


def boring() -> tuple[Any, Any]:
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    return BoringModel(), DataLoader(RandomDataset(32, 24), batch_size=4)


def boring_manual() -> tuple[Any, Any]:
    from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel, RandomDataset

    return ManualOptimBoringModel(), DataLoader(RandomDataset(32, 24), batch_size=4)


def transformer() -> tuple[Any, Any]:
    """Lightning's language model, with attention and dropout, on random words."""
    from lightning.pytorch.demos import LightningTransformer, Transformer

    class Offline(LightningTransformer):
        def prepare_data(self) -> None:
            """Not the download of its usual text."""

    module = Offline(vocab_size=7)
    module.model = Transformer(vocab_size=7, ninp=2, nhead=1, nhid=3, nlayers=1)
    words = torch.randint(7, (8, 4))
    return module, DataLoader(TensorDataset(words, words.roll(-1, 1)), batch_size=4)


def mpnn() -> tuple[Any, Any]:
    """Chemprop's message passing on molecular graphs: batches are objects that hold graphs."""
    from chemprop import data, models, nn

    smiles = ["C", "CC", "CCO", "CCN", "C=C", "C#N", "CC(=O)O", "c1ccccc1", "CCl", "CBr", "COC", "CCCC"]
    points = [
        data.MoleculeDatapoint.from_smi(text, np.array([float(len(text)), float(index % 3)]))
        for index, text in enumerate(smiles)
    ]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False, num_workers=0)
    message_passing = nn.BondMessagePassing(d_h=3, depth=2)
    predictor = nn.RegressionFFN(input_dim=3, hidden_dim=4, n_tasks=2)
    return models.MPNN(message_passing, nn.MeanAggregation(), predictor), loader


def nbeats() -> tuple[Any, Any]:
    """N-BEATS of pytorch-forecasting: batches are (dict, (target, weight)), the loss is a torchmetrics Metric."""
    import pandas as pd
    from pytorch_forecasting import NBeats, TimeSeriesDataSet

    steps = np.arange(30)
    frame = pd.DataFrame({"t": steps, "value": np.sin(steps) + 2.0, "series": "one"})
    series = TimeSeriesDataSet(
        frame, time_idx="t", target="value", group_ids=["series"], time_varying_unknown_reals=["value"],
        max_encoder_length=6, min_encoder_length=6, max_prediction_length=2,
    )  # fmt: skip
    loader = series.to_dataloader(train=True, batch_size=8, num_workers=0, shuffle=False)
    module = NBeats.from_dataset(series, widths=[4, 4], num_blocks=[1, 1], num_block_layers=[1, 1], log_interval=-1)
    return module, loader


PUBLIC = {
    "boring": Public(boring, "lightning", features=False),
    "boring-manual": Public(boring_manual, "lightning", features=False),
    "transformer": Public(transformer, "lightning"),
    "mpnn": Public(mpnn, "chemprop"),
    "nbeats": Public(nbeats, "pytorch_forecasting", quantities=("hessian",)),
}


def made(public: Public) -> tuple[Any, Any]:
    """Module and loader from a fixed seed; what a package warns of while making them is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        np.random.seed(0)
        return public.make()
