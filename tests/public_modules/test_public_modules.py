"""Modules of other packages: monitors change no bit of their training, and measure what dense autograd gives."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from modules import PUBLIC, Public, made
from runs import leaves, outcome, trainer
from torch import Tensor

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor
from lightning_plasticity.nn.batches import tensors_of

pytestmark = [
    pytest.mark.public,
    # What these packages call is their affair; our own warnings are looked at below.
    pytest.mark.filterwarnings("ignore"),
]
SAMPLES = 24


class Witness(L.Callback):
    """Notes the batches that training sees, whatever they are, and the optimizers' state at the end."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.optimizers: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(leaves(tensors_of(batch)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.optimizers.append(leaves([o.state_dict() for o in trainer.optimizers]))


def trained(public: Public, used: Sequence[L.Callback]) -> tuple[dict[str, Any], list[str]]:
    """What two epochs leave behind, and what our callbacks warned of."""
    module, loader = made(public)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    witness = Witness()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = trainer([*used, witness], max_epochs=2)
        last.fit(module, loader)
    assert last.global_step > 0
    return outcome(module, witness, last), [str(w.message) for w in caught if "Monitor" in str(w.message)]


@pytest.fixture(params=PUBLIC)
def public(request: pytest.FixtureRequest) -> Public:
    found = PUBLIC[request.param]
    pytest.importorskip(found.requires, reason="pip install -e .[public]")
    return found


def test_monitors_change_no_bit_and_tell_what_they_cannot_measure(public: Public) -> None:
    used = [HessianSpectrumMonitor(max_seconds=None, probe_samples=8), FeatureRankMonitor(probe_samples=8)]
    plain, _ = trained(public, [])
    watched, told = trained(public, used)
    assert {key for key in plain if plain[key] != watched[key]} == set()
    curvature, features = (monitor.records for monitor in used)
    assert [record.phase for record in curvature] == [record.phase for record in features] == ["start", "end"]
    for record in curvature:
        measured = {key.split("/")[1] for key in record.values}
        assert measured == set(public.quantities)
    expected = []
    if "ggn" not in public.quantities:
        expected.append("could not measure ggn at the start of task 0: The training step calls no loss function")
    if not public.features:
        expected.append("could not measure features at the start of task 0: No hidden layer was found")
    assert all(any(text in message for message in told) for text in expected), told
    assert len(told) == len(expected), told  # once each, although the end fails for the same reason


def loss_of(module: Any, batch: Any) -> Tensor:
    """The loss of its own training step, with nothing logged, dropout off, and no optimizer moved."""
    losses: list[Tensor] = []
    module._trainer = SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TRAINING))  # some ask it for the stage
    module.log = module.log_dict = lambda *args, **kwargs: None
    if not module.automatic_optimization:
        still = torch.optim.SGD(module.parameters(), lr=0.0)
        module.optimizers = lambda: still
        module.manual_backward = losses.append
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout | torch.nn.MultiheadAttention):
            child.eval()
    found = module.training_step(batch, 0)
    if losses:
        return losses[0]
    return found["loss"] if isinstance(found, dict) else found


def flat(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(tensors, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])


def dense_hessian(module: Any, batch: Any) -> Tensor:
    """Row by row, by two backward passes."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = loss_of(module, batch)
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True), parameters)
        rows = [
            flat(torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True), parameters)
            if entry.requires_grad
            else torch.zeros_like(gradient)
            for entry in gradient
        ]
    return torch.stack(rows).detach().double()


def measured_at_start(public: Public, data: Any) -> dict[str, float]:
    module, loader = made(public)
    monitor = HessianSpectrumMonitor(
        public.quantities, when="start", data=data, probe_samples=SAMPLES, max_seconds=None, on_error="raise"
    )
    trainer([monitor], max_steps=1).fit(module, loader)
    (record,) = monitor.records
    return {key: estimate.value for key, estimate in record.values.items()}


@pytest.mark.parametrize("whole", [True, False], ids=["training-data", "one-batch"])
def test_hessian_is_that_of_dense_autograd(public: Public, whole: bool) -> None:
    module, loader = made(public)
    batches = list(loader) if whole else [next(iter(loader))]
    if whole and sum(len(batch) for batch in loader.batch_sampler) != len(loader.dataset):
        pytest.skip("the loader drops samples, which the probe data does not")
    values = measured_at_start(public, None if whole else batches[0])
    reference = torch.linalg.eigvalsh(torch.stack([dense_hessian(module, batch) for batch in batches]).mean(0))
    largest = float(reference.abs().max())
    for key, found in (("lambda_max", reference[-1]), ("lambda_min", reference[0]), ("trace", reference.sum())):
        assert values[f"plasticity/hessian/{key}"] == pytest.approx(float(found), rel=1e-4, abs=2e-5 * largest), key
    for eps in (1e-2, 1e-1):
        low, high = (int((reference.abs() > eps * factor).sum()) for factor in (1.001, 0.999))
        assert low <= values[f"plasticity/hessian/eps_rank_{eps}"] <= high


@pytest.mark.parametrize("name", ["boring", "boring-manual"])
def test_ggn_of_a_linear_module_is_its_hessian(name: str) -> None:
    values = measured_at_start(PUBLIC[name], None)
    for key in ("lambda_max", "trace"):
        assert values[f"plasticity/ggn/{key}"] == pytest.approx(values[f"plasticity/hessian/{key}"], rel=1e-5)


def test_ggn_of_the_molecules_is_that_of_the_jacobian() -> None:
    """Mean squared error over N molecules and C targets: GGN = 2 J^T J / (N C), eigenvalues through J J^T."""
    pytest.importorskip("chemprop", reason="pip install -e .[public]")
    module, loader = made(PUBLIC["mpnn"])
    parameters = list(module.parameters())
    rows = []
    for batch in loader:
        outputs = module(batch.bmg, batch.V_d, batch.X_d).reshape(-1)
        rows += [flat(torch.autograd.grad(o, parameters, retain_graph=True), parameters) for o in outputs]
    jacobian = torch.stack(rows).double()
    reference = torch.linalg.eigvalsh(2 * jacobian @ jacobian.T / len(jacobian))
    values = measured_at_start(PUBLIC["mpnn"], None)
    assert values["plasticity/ggn/lambda_max"] == pytest.approx(float(reference[-1]), rel=1e-4)
    assert values["plasticity/ggn/trace"] == pytest.approx(float(reference.sum()), rel=1e-4)
    assert values["plasticity/ggn/eps_rank_0.01"] == int((reference > 1e-2).sum())
