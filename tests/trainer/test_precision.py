"""Every precision of the Trainer: curvature and features in float32 or float64 all the same, and training unharmed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from runs import NETWORKS, Classifier, Make, conv, data, loader, mlp, monitors, same_with, trainer
from torch import nn

from lightning_plasticity import FeatureRankMonitor, HessianSpectrumMonitor, L2ERMixin, Regularization
from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum
from lightning_plasticity.nn import undisturbed
from lightning_plasticity.nn.precision import full_precision, match_precision

TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
EVERY = ("bf16-mixed", *TRUE)  # on the CPU Lightning replaces "16-mixed" by "bf16-mixed"


class Steady(Classifier):
    """Adam's epsilon is zero in float16, and its steps then NaN."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def failures(watching: list[Any]) -> list[Any]:
    return [record.failure for monitor in watching for record in monitor.records]


class Twins(L.Callback):
    """Keeps copies of the network as it is at each boundary."""

    def __init__(self) -> None:
        self.kept: list[nn.Module] = []

    def on_task_start(self, trainer: L.Trainer, pl_module: Any, task: int) -> None:
        self.kept.append(copy.deepcopy(pl_module.net))

    on_task_end = on_task_start


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_training_is_the_same(name: str, precision: Any) -> None:
    watching = monitors()
    told = same_with(lambda: Steady(NETWORKS[name]()), lambda: [loader(0), loader(1)], watching, precision=precision)
    assert told == []
    assert failures(watching) == [None] * 8


@pytest.mark.parametrize("precision", TRUE)
@pytest.mark.parametrize("make", [mlp, conv])
def test_numbers_are_those_of_a_copy(make: Any, precision: Any) -> None:
    hessian, features = HessianSpectrumMonitor(probe_samples=12, on_error="raise"), FeatureRankMonitor(on_error="raise")
    twins = Twins()
    trainer([hessian, features, twins], precision=precision).fit(Steady(make()), loader())
    high = torch.float64 if precision == "64-true" else torch.float32
    tolerance = 1e-9 if precision == "64-true" else 1e-4
    inputs, labels = data()
    pair = (inputs.to(TRUE[precision]).to(high), labels)  # training rounds them too
    assert next(twins.kept[0].parameters()).dtype is TRUE[precision]
    for twin, curvature, ranks in zip(twins.kept, hessian.records, features.records, strict=True):
        twin = twin.to(high)
        expected = {
            "ggn": ggn_spectrum(twin, nn.CrossEntropyLoss(), pair),
            "hessian": hessian_spectrum(twin, nn.CrossEntropyLoss(), pair),
        }
        for matrix, spectrum in expected.items():
            found = curvature.values[f"plasticity/{matrix}/lambda_max"].value
            assert found == pytest.approx(spectrum.lambda_max().value, rel=tolerance)
            found = curvature.values[f"plasticity/{matrix}/trace"].value
            assert found == pytest.approx(spectrum.trace().value, rel=tolerance, abs=tolerance)
            assert curvature.settings[matrix]["dtype"] == str(high).removeprefix("torch.")
        assert curvature.settings["dtype"] == ranks.settings["dtype"] == str(high).removeprefix("torch.")
        norm = np.sqrt(sum(float(p.detach().double().square().sum()) for p in twin.parameters() if p.ndim > 1))
        assert ranks.values["plasticity/weights/norm"].value == pytest.approx(norm, rel=1e-9)
        if make is mlp:
            hidden = twin[:2](pair[0]).double().detach()
            sigma = torch.linalg.svdvals(hidden) / torch.linalg.svdvals(hidden).sum()
            rank = float(torch.special.entr(sigma).sum().exp())
            assert ranks.values["plasticity/features/effective_rank/net.1"].value == pytest.approx(rank, rel=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_precision_is_measured_as_float32_is(name: str) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        watching: list[Any] = monitors(when="start")
        trainer(watching, precision=precision, max_steps=1).fit(Steady(NETWORKS[name]()), loader())
        found.append(repr([monitor.records[0].values for monitor in watching]))
    assert found[0] == found[1]


class Picky(Steady):
    """Makes tensors, asks for its dtype, and keeps a tensor that is no buffer."""

    def on_fit_start(self) -> None:
        self.mixing = torch.eye(16, dtype=self.dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].to(self.dtype) @ self.mixing + torch.zeros(len(batch[0]), 16) @ torch.ones(16, 16)
        assert torch.zeros(1).dtype is self.dtype is next(self.parameters()).dtype
        return super().training_step((x, batch[1]), batch_idx)


@pytest.mark.parametrize("precision", TRUE)
def test_steps_that_care_about_the_dtype(precision: Any) -> None:
    watching = monitors()
    assert same_with(lambda: Picky(mlp()), lambda: [loader()], watching, precision=precision) == []
    assert failures(watching) == [None] * 4


class OwnL2ER(L2ERMixin, Steady):
    rank_every_n_steps = 2


@pytest.mark.parametrize("mode", ["separate", "loss"])
@pytest.mark.parametrize("precision", EVERY)
def test_with_l2er(precision: Any, mode: Any) -> None:
    def mixed_in() -> L.LightningModule:
        module = OwnL2ER(mlp())
        module.rank_mode = mode
        return module

    def callback() -> list[L.Callback]:
        return [Regularization.l2er(rank_every_n_steps=2, rank_mode=mode)]

    def tasks() -> list[Any]:
        return [loader(samples=20)]

    assert same_with(mixed_in, tasks, own := monitors(), precision=precision) == []
    assert same_with(lambda: Steady(mlp()), tasks, added := monitors(), callback, precision=precision) == []
    assert failures([*own, *added]) == [None] * 8


# ---- without a Trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_in_one_call(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, (inputs, labels) = mlp().to(dtype), data()
    twin = copy.deepcopy(net).float()
    before = [(parameter, parameter.data_ptr(), parameter.detach().clone()) for parameter in net.parameters()]
    for spectrum in (hessian_spectrum, ggn_spectrum):
        found: Any = spectrum(net, nn.CrossEntropyLoss(), (inputs.to(dtype), labels))
        expected: Any = spectrum(twin, nn.CrossEntropyLoss(), (inputs.to(dtype).float(), labels))
        torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=0, atol=1e-6)
        assert (found.settings["dtype"], found.resolution) == ("float32", expected.resolution)
    for parameter, place, values in before:
        assert (parameter.dtype, parameter.data_ptr()) == (dtype, place)
        assert torch.equal(parameter, values)


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_and_tied_weights_come_back(fails: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).bfloat16()
    net[1].weight = net[0].weight
    net(torch.ones(2, 3).bfloat16()).sum().backward()
    weight, grad = net[0].weight, net[0].weight.grad
    assert grad is not None
    values = grad.clone()
    try:
        with undisturbed(net, full_precision=True):
            assert net[0].weight is net[1].weight is weight
            assert (weight.dtype, weight.grad) == (torch.float32, None)
            net(torch.ones(2, 3)).sum().backward()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert weight.dtype is torch.bfloat16
    assert weight.grad is grad
    assert torch.equal(grad, values)
    assert torch.get_default_dtype() is torch.float32


def test_batches_follow_the_module() -> None:
    batch = {"x": torch.ones(2).half(), "y": torch.ones(2, dtype=torch.int32), "z": torch.ones(2).double()}
    assert match_precision(nn.Linear(2, 2).bfloat16(), batch) is batch
    found = match_precision(nn.Linear(2, 2), batch)
    assert [value.dtype for value in found.values()] == [torch.float32, torch.int32, torch.float64]


def test_a_float32_module_keeps_the_users_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with full_precision(nn.Linear(2, 2, dtype=torch.float32)):
            assert torch.zeros(1).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_precision_whose_gradients_are_joined_is_refused(tmp_path: Path) -> None:
    """Changing the dtype would cut the hooks of DistributedDataParallel, and training would go on without them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net, pair = mlp().bfloat16(), (data()[0].bfloat16(), data()[1])
        hessian_spectrum(net, nn.CrossEntropyLoss(), pair)
        parallel = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(RuntimeError, match=r"half precision under DistributedDataParallel.*'bf16-mixed'"):
            hessian_spectrum(net, nn.CrossEntropyLoss(), pair)
        hessian_spectrum(net.float(), nn.CrossEntropyLoss(), pair)
        assert parallel.module is net
    finally:
        torch.distributed.destroy_process_group()


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", [*EVERY, "16-mixed"])
def test_on_a_gpu(precision: Any) -> None:
    make: Make = lambda: Steady(NETWORKS["conv"]())  # noqa: E731
    watching = monitors()
    settings: dict[str, Any] = {"precision": precision, "accelerator": "gpu", "devices": 1, "deterministic": True}
    assert same_with(make, lambda: [loader(0), loader(1)], watching, **settings) == []
    assert failures(watching) == [None] * 8
