"""Training with L2 and the effective-rank step reproduces the reference traces, in a plain loop and under a Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import L2, EffectiveRank, L2ERMixin, Regularization
from lightning_plasticity.nn import FeatureTaps, named_layers
from lightning_plasticity.regularization import RegularizationEngine

Vectors = Callable[[str], dict[str, np.ndarray]]

# The traces were recorded in float64 by another program. Forty steps amplify rounding errors of 1e-16 by orders of
# magnitude (two independent implementations agree to 1e-9); measured here: 2e-14. A wrong sign, a missing bias in the
# L2 or an offset left out of the logarithm shows up as 1e-6 and more (see the last test).
TOLERANCE = 1e-10


class Trace:
    """One recorded run: its settings, data, starting weights and what was recorded of one optimizer."""

    def __init__(self, archive: dict[str, np.ndarray], optimizer: str) -> None:
        self.archive = archive
        self.name = optimizer
        self.config: dict[str, Any] = json.loads(str(archive["config"]))
        self.x, self.y = torch.from_numpy(archive["x"]), torch.from_numpy(archive["y"])
        minibatch, rounds, er_batch = (self.config[key] for key in ("minibatch", "rounds", "er_batch"))
        steps = rounds * er_batch
        self.batches = [
            (self.x[i : i + minibatch], self.y[i : i + minibatch]) for i in range(0, len(self.x), minibatch)
        ]
        assert len(self.batches) == steps

    def network(self) -> torch.nn.Sequential:
        values = [
            torch.from_numpy(self.archive[f"param_{i}"]) for i in range(6 if "param_6" not in self.archive else 8)
        ]
        layers: list[torch.nn.Module] = []
        for weight, bias in zip(values[::2], values[1::2], strict=True):
            layers += [torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64), torch.nn.ReLU()]
            layers[-2].load_state_dict({"weight": weight, "bias": bias})
        return torch.nn.Sequential(*layers[:-1])

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=self.config["lr_sgd"], momentum=self.config["momentum"] or 0.0)
        betas = tuple(self.config["betas"])
        return torch.optim.Adam(parameters, lr=self.config["lr_adam"], betas=betas, eps=self.config["adam_eps"])

    @property
    def layers(self) -> int | None:
        return None if self.config["er_layers"] == "all" else 2

    def recorded(self, quantity: str) -> np.ndarray:
        return self.archive[f"{self.name}_{quantity}"]

    def flat_keys(self) -> list[str]:
        prefix = f"{self.name}_"
        return [key.removeprefix(prefix) for key in self.archive if key.startswith(f"{prefix}flat_")]


@pytest.fixture(params=["sgd", "adam"])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def hidden_names(network: torch.nn.Sequential, last: int | None) -> list[str]:
    names = [name for name, child in network.named_children() if isinstance(child, torch.nn.ReLU)]
    return names if last is None else names[-last:]


def er_loss(network: torch.nn.Sequential, layers: list[str], batches: list[Any]) -> float:
    """Minus the mean effective rank, from PyTorch's own singular values."""
    with torch.no_grad(), FeatureTaps(network, named_layers(network, layers)) as taps:
        network(torch.cat([x for x, _ in batches]))
        ranks = []
        for features in taps.features.values():
            p = torch.linalg.svdvals(features)
            p = p / p.sum()
            ranks.append(torch.exp(-(p * torch.log(p + 1e-8)).sum()))
    return -float(torch.stack(ranks).mean())


def plain_loop(trace: Trace, regularizers: list[Any], after: bool) -> dict[str, np.ndarray]:
    """What a person without a Trainer writes; everything that the trace recorded."""
    network = trace.network()
    optimizer = trace.optimizer(network.parameters())
    engine = RegularizationEngine(regularizers)
    layers = hidden_names(network, trace.layers)
    n, er_step = trace.config["er_batch"], trace.config["er_step"]
    found: dict[str, list[Any]] = {name: [] for name in ("losses", "acc", "norms", "er_losses", "norms_after_er")}
    flats: dict[str, np.ndarray] = {}

    def run(batch: Any) -> None:
        network(batch[0])

    def norms() -> list[float]:
        return [float(p.detach().norm()) for p in network.parameters()]

    def flat() -> np.ndarray:
        return parameters_to_vector(network.parameters()).detach().numpy().copy()

    def separate(batches: list[Any], step: Callable[[], None]) -> None:
        found["er_losses"].append(er_loss(network, layers, batches))
        step()
        found["norms_after_er"].append(norms())

    flats["flat_step0"] = flat()
    for first in range(0, len(trace.batches), n):
        window = trace.batches[first : first + n]
        if not after:
            for _ in range(er_step):
                separate(window, partial(engine.separate_steps, network, window, run))
        for index, (x, y) in enumerate(window, start=first):
            if after:
                engine.remember((x, y))
            outputs = network(x)
            loss = torch.nn.functional.cross_entropy(outputs, y)
            found["losses"].append(float(loss.detach()))
            found["acc"].append(float((outputs.argmax(1) == y).double().mean()))
            optimizer.zero_grad()
            loss.backward()
            engine.add_gradients(network.parameters())
            optimizer.step()
            found["norms"].append(norms())
            if after and index == first + n - 1:
                separate(window, partial(engine.after_step, network, run))
            elif after:
                engine.after_step(network, run)
        flats[f"flat_round{first // n + 1}"] = flat()
    flats["flat_final"] = flat()
    return {name: np.asarray(values) for name, values in found.items()} | flats


def regularizers_of(trace: Trace) -> list[Any]:
    config = trace.config
    rank = EffectiveRank(config["er_lr"], layers=trace.layers, every_n_steps=config["er_batch"])
    return [rank, L2(config["weight_decay"])]


@pytest.mark.parametrize("name", ["after_all", "before_last2"])
def test_every_recorded_number_comes_out_again(name: str, optimizer: str, vectors: Vectors) -> None:
    trace = Trace(vectors(f"l2er_trace_{name}"), optimizer)
    found = plain_loop(trace, regularizers_of(trace), after=trace.config["schedule"] == "after")
    assert len(trace.flat_keys()) == 5
    for quantity in ("losses", "norms", "er_losses", "norms_after_er", *trace.flat_keys()):
        expected = trace.recorded(quantity)
        np.testing.assert_allclose(found[quantity], expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=quantity)
    # Accuracies were recorded in float32.
    np.testing.assert_array_equal(found["acc"].astype(np.float32), trace.recorded("acc").astype(np.float32))


class Net(L.LightningModule):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.net = trace.network()
        self.trace = trace
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(float(loss.detach()))  # the rank step runs this too, and puts the list back
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.trace.optimizer(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.trace.x, self.trace.y), batch_size=self.trace.config["minibatch"])


class RegularizedNet(L2ERMixin, Net):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.rank_strength, self.rank_every_n_steps = trace.config["er_lr"], trace.config["er_batch"]
        self.l2_strength = trace.config["weight_decay"]


@pytest.mark.parametrize("how", ["mixin", "callback"])
def test_a_trainer_gives_the_same_trace(how: str, optimizer: str, vectors: Vectors) -> None:
    trace = Trace(vectors("l2er_trace_after_all"), optimizer)
    net = RegularizedNet(trace) if how == "mixin" else Net(trace)
    callbacks = [] if how == "mixin" else [Regularization(regularizers_of(trace))]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net.double())
    final = parameters_to_vector(net.parameters()).detach().numpy()
    np.testing.assert_allclose(net.losses, trace.recorded("losses"), rtol=TOLERANCE)
    np.testing.assert_allclose(final, trace.recorded("flat_final"), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_trace_would_notice_small_mistakes(vectors: Vectors) -> None:
    trace = Trace(vectors("l2er_trace_after_all"), "adam")
    rank, l2 = regularizers_of(trace)
    n = trace.config["er_batch"]
    wrong = {
        "no rank step": [l2],
        "no L2": [rank],
        "the last layer only": [EffectiveRank(rank.strength, layers=1, every_n_steps=n), l2],
        "one per cent stronger": [EffectiveRank(1.01 * rank.strength, every_n_steps=n), l2],
        "half as often": [EffectiveRank(rank.strength, every_n_steps=2 * n), l2],
    }
    for what, regularizers in wrong.items():
        final = plain_loop(trace, regularizers, after=True)["flat_final"]
        assert np.abs(final - trace.recorded("flat_final")).max() > 1000 * TOLERANCE, what
