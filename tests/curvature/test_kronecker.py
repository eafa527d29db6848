"""Kronecker factors against reference vectors, dense matrices, and one backend against the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_plasticity.curvature import (
    KroneckerSpectrum,
    MeasurementError,
    Spectrum,
    ggn_spectrum,
    kronecker_spectrum,
)
from lightning_plasticity.curvature.kronecker.hooks_route import hook_factors
from lightning_plasticity.linalg import (
    effective_rank,
    effective_rank_of,
    feature_rank,
    numerical_rank,
    participation_ratio,
    participation_ratio_of,
    singular_values,
    stable_rank,
    stable_rank_of,
)

Vectors = Callable[[str], dict[str, np.ndarray]]


def same_factors(left: KroneckerSpectrum, right: KroneckerSpectrum, tolerance: float = 1e-10) -> None:
    assert list(left.layers) == list(right.layers)
    for name, block in left.layers.items():
        for which in ("input_factor", "output_factor"):
            value, truth = getattr(block, which), getattr(right.layers[name], which)
            torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def backends(net: nn.Module, loss: Any, data: Any, **options: Any) -> tuple[KroneckerSpectrum, KroneckerSpectrum]:
    backpack = kronecker_spectrum(net, loss, data, **options)
    assert {block.source for block in backpack.layers.values()} == {"backpack:kflr"}, backpack.settings
    hooks = kronecker_spectrum(net, loss, data, backend="hooks", **options)
    assert {block.source for block in hooks.layers.values()} == {"hooks:kflr"}
    return backpack, hooks


def same_spectrum(value: Spectrum, truth: Spectrum, tolerance: float = 1e-10) -> None:
    def largest(spectrum: Spectrum) -> Tensor:
        values = spectrum.eigenvalues.repeat_interleave(spectrum.counts.round().long())
        return values.sort(descending=True).values

    torch.testing.assert_close(largest(value), largest(truth), rtol=1e-7, atol=tolerance * truth.max_abs)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.branch(x) + x)
        return self.head(torch.flatten(self.pool(x), 1))


def images(num_samples: int = 12, channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, channels, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (num_samples,), generator=generator)


def points(num_samples: int = 20, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_samples, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (num_samples,), generator=generator)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    deep = [nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, dilation=1), nn.Tanh(), nn.Flatten()]
    residual = Residual()
    residual.norm.running_var.uniform_(0.5, 2.0)
    nets = {
        "mlp": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
        "norm": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Dropout(), nn.Linear(8, 3)),
        "lone layer": nn.Linear(6, 3),
        "cnn": nn.Sequential(*conv),
        "deep cnn": nn.Sequential(*deep, nn.Linear(4, 3)),
        "residual": residual,
    }
    return {name: net.double() for name, net in nets.items()}


def data_for(name: str) -> tuple[Tensor, Tensor]:
    return images() if "cnn" in name or name == "residual" else points()


# Reference


@pytest.mark.parametrize("case", ["a_fresh", "a_dead", "b_fresh", "b_rank1", "c_fresh", "c_huge", "d_uneven_batch"])
def test_reference_factors(case: str, vectors: Vectors) -> None:
    arrays = vectors(f"hessian_{case}")
    params = [torch.from_numpy(arrays[f"param_{i}"]) for i in range(sum(key.startswith("param_") for key in arrays))]
    modules: list[nn.Module] = []
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.load_state_dict({"weight": weight, "bias": bias})
        modules += [layer, nn.ReLU()]
    net = nn.Sequential(*modules[:-1])
    data = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    for found in backends(net, nn.CrossEntropyLoss(), data):
        for index, block in enumerate(found.layers.values()):
            for value, key in ((block.input_factor, "A"), (block.output_factor, "B")):
                truth = torch.from_numpy(arrays[f"kfac_{key}_{index}"])
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


# Exact cases


@pytest.mark.parametrize("name", ["mlp", "norm", "lone layer"])
def test_one_sample_is_exact(name: str) -> None:
    net, (x, y) = networks()[name], points(1)
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y), check=True)
    for block in found.layers.values():
        exact = ggn_spectrum(net, nn.CrossEntropyLoss(), (x, y), params=block.parameters)
        same_spectrum(Spectrum.from_eigenvalues(block.eigenvalues(), block.num_params), exact)
    for name, error in found.errors.items():
        assert error.trace == pytest.approx(0.0, abs=1e-9)
        if name != "whole":  # which also has the blocks between layers
            assert error.lambda_max == pytest.approx(0.0, abs=1e-9)


def test_linear_model_with_squared_loss_is_exact() -> None:
    x, _ = points(30)
    net, targets = nn.Linear(6, 2).double(), torch.randn(30, 2, dtype=torch.float64)
    found = kronecker_spectrum(net, nn.MSELoss(), (x, targets), check=True)
    same_spectrum(found.spectrum(), ggn_spectrum(net, nn.MSELoss(), (x, targets)))
    assert list(found.layers) == ["root"]
    assert found.errors["whole"].trace == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("method", ["backpack", "hooks"])
def test_bias_of_a_convolution_is_exact(method: Any) -> None:
    # A is 1 for the bias whatever the positions do: averaged, not summed, over them.
    net, data = networks()["residual"], images()
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, params="stem.bias", backend=method)
    same_spectrum(found.spectrum(), ggn_spectrum(net, nn.CrossEntropyLoss(), data, params="stem.bias"))
    whole = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, params=["stem.*"], backend=method).layers["stem"]
    torch.testing.assert_close(whole.input_factor[-1, -1], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(whole.output_factor, found.layers["stem"].output_factor)
    assert whole.num_positions == 36


def test_convolution_on_a_constant_image_is_exact() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64).expand(1, 2, 6, 6).clone()
    data = x, torch.tensor([1])
    block = kronecker_spectrum(net, nn.CrossEntropyLoss(), data).layers["0"]
    exact = ggn_spectrum(net, nn.CrossEntropyLoss(), data, params=block.parameters)
    same_spectrum(Spectrum.from_eigenvalues(block.eigenvalues(), block.num_params), exact)


def test_input_factor_is_that_of_the_features() -> None:
    net, (x, y) = networks()["mlp"], points()
    with torch.no_grad():
        net[0].weight[2:] = net[0].weight[1].clone()  # six of eight units alike
        net[0].bias[2:] = net[0].bias[1].clone()
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y))
    features = torch.relu(net[0](x)).detach()
    torch.testing.assert_close(found.layers["2"].input_factor, features.T @ features / len(x))
    assert found.layers["2"].parameters == ("2.weight",)
    assert int((found.layers["2"].input_eigenvalues > 0).sum()) == int(numerical_rank(features)) == 2


def capture_features(net: nn.Sequential, x: Tensor) -> Tensor:
    """(N, D) what the last layer reads."""
    captured: list[Tensor] = []
    handle = net[-1].register_forward_hook(lambda module, inputs, output: captured.append(inputs[0].detach()))
    net(x)
    handle.remove()
    return captured[0]


@st.composite
def collapsing_layers(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """Features with dead units and copies, read by a layer with or without a bias, and a few samples."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    width, num_samples = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3, bias=draw(st.booleans())))
    with torch.no_grad():
        for unit in range(draw(st.integers(0, width))):  # copies of the last unit
            net[0].weight[unit], net[0].bias[unit] = net[0].weight[-1], net[0].bias[-1]
        for unit in range(draw(st.integers(0, width))):
            net[0].bias[unit] = -1e4  # dead
    return net, torch.randn(num_samples, 4)


@given(collapsing_layers(), st.sampled_from([torch.float64, torch.float32]))
def test_rank_of_the_features_is_the_rank_of_the_input_factor(
    drawn: tuple[nn.Sequential, Tensor], dtype: torch.dtype
) -> None:
    net, x = drawn[0].to(dtype), drawn[1].to(dtype)
    y = torch.arange(len(x)) % 3
    block = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y), backend="hooks").layers["2"]
    plain = capture_features(net, x)
    # The bias enters as one more feature that is 1 on every sample: at most one more rank.
    features = plain if net[2].bias is None else torch.cat([plain, torch.ones(len(x), 1, dtype=dtype)], dim=1)
    a = block.input_eigenvalues
    assert block.input_rank == int(numerical_rank(features))
    assert 0 <= block.input_rank - int(numerical_rank(plain)) <= int(net[2].bias is not None)
    squared = singular_values(features) ** 2 / len(x)
    top = float(squared[0])
    torch.testing.assert_close(a.flip(0)[: len(squared)], squared, rtol=1e-5, atol=1e-9 * top)
    for eps in (1e-3, 0.1, 0.9):  # a_i is compared with eps squared; the column of ones alone is at 1
        assert int((a > eps**2).sum()) == int(feature_rank(features, eps))
    if top:
        assert float(stable_rank_of(a.sqrt())) == pytest.approx(float(stable_rank(features)), rel=1e-5)
        assert float(participation_ratio_of(a)) == pytest.approx(float(participation_ratio(features)), rel=1e-5)
    # The effective rank of A is that of the squared singular values; squaring sharpens, so it is the smaller one.
    assert float(effective_rank_of(a)) == pytest.approx(float(effective_rank_of(squared)), rel=1e-5)
    assert float(effective_rank_of(a)) <= float(effective_rank(features)) * (1 + 1e-5)


# One backend against the other


@pytest.mark.parametrize("name", list(networks()))
def test_backends_agree(name: str) -> None:
    same_factors(*backends(networks()[name], nn.CrossEntropyLoss(), data_for(name)))


def test_backends_agree_on_other_losses() -> None:
    net, (x, _) = networks()["mlp"], points()
    targets = torch.randn(len(x), 3, dtype=torch.float64)
    same_factors(*backends(net, nn.MSELoss(), (x, targets)))
    same_factors(*backends(net, nn.MSELoss(reduction="sum"), (x, targets)))
    one = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    same_factors(*backends(one, nn.BCEWithLogitsLoss(), (x, (targets[:, :1] > 0).double())))


def test_batches_add_up() -> None:
    net, (x, y) = networks()["mlp"], points()
    whole = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y))
    for found in backends(net, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])]):
        same_factors(found, whole)
        assert found.num_samples == 20


WEIGHTS = torch.tensor([1.0, 6.0, 0.2], dtype=torch.float64)
UNEVEN = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "ignored targets": nn.CrossEntropyLoss(ignore_index=1),
    "smoothed and weighted": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "a weighted sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "squared": nn.MSELoss(),
    "squared, summed": nn.MSELoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(5.0, dtype=torch.float64)),
    "huber": nn.HuberLoss(delta=2.0),
    "of one's own": lambda outputs, targets: ((outputs - targets) ** 4).mean(),
}


@pytest.mark.parametrize("name", list(UNEVEN))
def test_uneven_batches_are_the_joined_data(name: str) -> None:
    # Sorted by label, so that the batches differ in classes and thus in what the loss divides by.
    net, (x, y) = networks()["mlp"], points()
    y = y.sort().values
    targets = y if isinstance(UNEVEN[name], nn.CrossEntropyLoss) else F.one_hot(y, 3).double()
    whole = kronecker_spectrum(net, UNEVEN[name], (x, targets))
    cuts = [(x[a:b], targets[a:b]) for a, b in ((0, 3), (3, 4), (4, 11), (11, 20))]
    cuts = [(a, b) for a, b in cuts if name != "ignored targets" or bool((b != 1).any())]
    if name == "ignored targets":  # a batch without any target has no loss; the whole must be of the same samples
        whole = kronecker_spectrum(net, UNEVEN[name], tuple(torch.cat(part) for part in zip(*cuts, strict=True)))
    found = kronecker_spectrum(net, UNEVEN[name], cuts)
    same_factors(found, whole)
    assert found.num_samples == whole.num_samples
    # The scale is that of the loss on all samples: at the last layer of this network A and B are nearly independent.
    exact = ggn_spectrum(net, UNEVEN[name], cuts, params="4.*")
    assert found.layers["4"].trace().value == pytest.approx(exact.trace().value, rel=0.3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", ["auto", "hooks"])
def test_linear_model_in_uneven_batches_is_exact(reduction: str, backend: Any) -> None:
    x, _ = points(30)
    net, targets, loss = nn.Linear(6, 2).double(), torch.randn(30, 2).double(), nn.MSELoss(reduction=reduction)
    found = kronecker_spectrum(net, loss, [(x[:1], targets[:1]), (x[1:], targets[1:])], backend=backend)
    same_spectrum(found.spectrum(), ggn_spectrum(net, loss, (x, targets)))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum", label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    ],
)
def test_one_weighted_sample_is_exact(loss: nn.Module) -> None:
    net, (x, _) = networks()["mlp"], points(1)
    found = kronecker_spectrum(net, loss, (x, torch.tensor([1])))
    for block in found.layers.values():
        exact = ggn_spectrum(net, loss, (x, torch.tensor([1])), params=block.parameters)
        same_spectrum(Spectrum.from_eigenvalues(block.eigenvalues(), block.num_params), exact)


def test_two_samples_without_a_loss_do_not_stop_the_measurement() -> None:
    # BackPACK is tried on the first two samples; here their mean cross-entropy is 0 / 0.
    net, (x, y) = networks()["mlp"], points()
    y[:2] = -100
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y))
    assert "could not be compared" in found.settings["backpack_refused"]
    same_factors(found, kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y), backend="hooks"))


def test_what_the_hooks_leave_out_is_not_left_to_backpack(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_plasticity.curvature.kronecker.spectrum as module

    def without_the_last(measured: Any, layers: Any) -> Any:
        sums = hook_factors(measured, layers)
        sums.skipped["4"] = "its parameters are used in another way too."
        del sums.inputs["4"]
        return sums

    monkeypatch.setattr(module, "hook_factors", without_the_last)
    found = kronecker_spectrum(networks()["mlp"], nn.CrossEntropyLoss(), points())
    assert "factors of 4, which our hooks leave out" in found.settings["backpack_refused"]
    assert list(found.layers) == ["0", "2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "hooks"])
def test_half_precision(dtype: torch.dtype, backend: Any) -> None:
    net, (x, y) = networks()["mlp"], points()
    rounded = copy.deepcopy(net).to(dtype)
    truth = kronecker_spectrum(copy.deepcopy(rounded).double(), nn.CrossEntropyLoss(), (x.to(dtype).double(), y))
    found = kronecker_spectrum(rounded, nn.CrossEntropyLoss(), (x.to(dtype), y), backend=backend)
    assert found.skipped == {}
    same_factors(found, truth, tolerance=0.03)  # eps is 0.008 for bfloat16, through three layers


def test_float32() -> None:
    net, data = networks()["residual"], images()
    truth = kronecker_spectrum(net, nn.CrossEntropyLoss(), data)
    single = copy.deepcopy(net).float(), nn.CrossEntropyLoss(), (data[0].float(), data[1])
    for found, dtype, resolution in zip(backends(*single), ("float64", "float32"), (1e-13, 1e-6), strict=True):
        # The weights are rounded to float32: 6e-8 each, through four layers.
        same_factors(found, truth, tolerance=1e-5)
        assert found.settings["dtype"] == dtype  # BackPACK's copy runs in float64, the hooks run the module as it is
        assert found.resolution == pytest.approx(resolution * found.max_abs)


def test_sampled_labels_come_to_the_exact_factor() -> None:
    net, data = networks()["mlp"], points()
    exact = kronecker_spectrum(net, nn.CrossEntropyLoss(), data)
    sampled = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, factors="kfac", mc_samples=4000)
    assert sampled.layers["0"].source == "backpack:kfac"
    # 80000 labels: a relative deviation of about 1 / sqrt(80000) = 0.4 % times a few for each of the traces.
    for name in exact.layers:
        assert sampled.layers[name].trace().value == pytest.approx(exact.layers[name].trace().value, rel=0.03)
    again = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, factors="kfac")
    assert again.trace() == kronecker_spectrum(net, nn.CrossEntropyLoss(), data, factors="kfac").trace()
    assert again.trace() != kronecker_spectrum(net, nn.CrossEntropyLoss(), data, factors="kfac", seed=1).trace()


def test_batches_do_not_share_their_sampled_labels() -> None:
    # 300 batches of the same one sample: with the same labels in all of them the average would be that of one draw.
    net, (x, y) = networks()["mlp"], points(1)
    exact = kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y))
    sampled = kronecker_spectrum(net, nn.CrossEntropyLoss(), [(x, y)] * 300, factors="kfac")
    for name in exact.layers:  # a relative deviation of about 1 / sqrt(300) = 6 %
        assert sampled.layers[name].trace().value == pytest.approx(exact.layers[name].trace().value, rel=0.25)


def test_kfra_averages_over_all_batches() -> None:
    net, (x, y) = networks()["mlp"], points()
    whole = kronecker_spectrum(net, F.cross_entropy, (x, y), factors="kfra")
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    same_factors(kronecker_spectrum(net, F.cross_entropy, parts, factors="kfra"), whole)
    sizes = [(images()[0], y[:12]), (images()[0][..., 1:], y[:12])]
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    with pytest.raises(MeasurementError, match="do not fit in one"):
        kronecker_spectrum(conv, F.cross_entropy, sizes, factors="kfra")


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_kfra(loss: str) -> None:
    net, (x, y) = networks()["mlp"], points()
    targets = y if loss == "cross_entropy" else torch.randn(len(x), 3, dtype=torch.float64)
    found = kronecker_spectrum(net, getattr(F, loss), (x, targets), factors="kfra")
    exact = kronecker_spectrum(net, getattr(F, loss), (x, targets))
    # At the last layer nothing has been averaged yet.
    torch.testing.assert_close(found.layers["4"].output_factor, exact.layers["4"].output_factor)
    assert found.layers["0"].trace().value == pytest.approx(exact.layers["0"].trace().value, rel=0.1)
    with pytest.raises(MeasurementError, match=r"no kfra factors of Residual.*falls back"):
        kronecker_spectrum(networks()["residual"], F.cross_entropy, images(), factors="kfra")


# Where BackPACK refuses


class Tokens(nn.Module):
    """Embedding, attention, norms and a shared weight: nothing that BackPACK does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.down(F.gelu(self.up(x)))
        x = self.twice(torch.tanh(self.twice(x)))
        x = x + self.tied(x).mean(-1, keepdim=True)
        return self.head(x.mean(1))


def test_hooks_stand_in_and_say_why() -> None:
    torch.manual_seed(0)
    net, data = Tokens().double(), (torch.randint(10, (7, 5)), torch.randint(3, (7,)))
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, check=True)
    assert list(found.layers) == ["up", "down", "head"]
    assert found.layers["up"].num_positions == 5
    assert "BackPACK" not in found.settings["backpack_refused"]
    for name, reason in {
        "embed": "Embedding has no",
        "attention": "MultiheadAttention has no",
        "attention.out_proj": "never called",
        "norm": "LayerNorm has no",
        "twice": "called 2 times",
        "tied": "shares parameters with embed",
    }.items():
        assert reason in found.skipped[name]
    # Nothing comes before the head's own weights but positions that are already averaged.
    one = kronecker_spectrum(net, nn.CrossEntropyLoss(), (data[0][:1], data[1][:1]), check=True)
    assert one.errors["head"].trace == pytest.approx(0.0, abs=1e-9)


def test_linear_on_sequences_by_hand() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(4, 5, 3, dtype=torch.float64), nn.Linear(3, 2).double()
    target = torch.zeros(4, 5, 2, dtype=torch.float64)
    block = kronecker_spectrum(net, nn.MSELoss(), (x, target)).layers["root"]
    with_ones = torch.cat([x, torch.ones(4, 5, 1, dtype=torch.float64)], dim=2).reshape(20, 4)
    torch.testing.assert_close(block.input_factor, with_ones.T @ with_ones / 20)
    # Each of 40 outputs has the second derivative 2 / 40; the 20 of a unit are added up.
    torch.testing.assert_close(block.output_factor, torch.eye(2, dtype=torch.float64))


def test_grouped_convolution() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    net = nn.Sequential(grouped, nn.Flatten(), nn.Linear(96, 3)).double()
    data = images(10, channels=4)
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, check=True)
    assert list(found.layers) == ["0.group0", "0.group1", "2"]
    assert found.num_params == sum(parameter.numel() for parameter in net.parameters())
    assert found.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert set(found.errors) == {"0", "2", "whole"}
    half = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)).double()
    with torch.no_grad():  # the same function of the first two channels as a plain convolution
        half[0].weight.copy_(grouped.weight[:3])
        half[0].bias.copy_(grouped.bias[:3])
    alone = kronecker_spectrum(half, nn.CrossEntropyLoss(), (data[0][:, :2], data[1]))
    torch.testing.assert_close(found.layers["0.group0"].input_factor, alone.layers["0"].input_factor)


def test_weights_of_the_loss_go_through_the_hooks() -> None:
    net, data = networks()["mlp"], points()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    found = kronecker_spectrum(net, weighted, data, check=True)
    assert "with weight" in found.settings["backpack_refused"]
    assert found.errors["4"].trace == pytest.approx(0.0, abs=0.2)
    with pytest.raises(MeasurementError, match="gives no kflr factors of Sequential"):
        kronecker_spectrum(net, weighted, data, backend="backpack")


def test_functional_activations_are_not_taken_for_nothing() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)))

    torch.manual_seed(0)
    net, data = Functional().double(), points()
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), data)
    assert "Encountered node" in found.settings["backpack_refused"]
    modules = nn.Sequential(net.first, nn.ReLU(), net.last)
    other = kronecker_spectrum(modules, nn.CrossEntropyLoss(), data)
    for mine, its in zip(found.layers.values(), other.layers.values(), strict=True):
        torch.testing.assert_close(mine.output_factor, its.output_factor)


def test_padding_that_backpack_does_not_know() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    net = nn.Sequential(nn.Conv2d(2, 2, 1), conv, nn.Flatten(), nn.Linear(144, 3)).double()
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), images())
    same_factors(found, kronecker_spectrum(net, nn.CrossEntropyLoss(), images(), backend="hooks"))


def test_a_scaled_output_is_found_out() -> None:
    net, data = networks()["mlp"], points()
    found = kronecker_spectrum(net, lambda out, y: F.cross_entropy(out / 2, y), data)
    assert "puts out something else" in found.settings["backpack_refused"]


def test_mixing_samples_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    found = kronecker_spectrum(net, nn.CrossEntropyLoss(), points(), mode="as_is")
    assert list(found.layers) == ["2"]
    assert "samples mix" in found.skipped["0"]


def test_a_training_step_is_enough() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks()["mlp"]

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Stepping()
    found = kronecker_spectrum(module, None, points())
    plain = kronecker_spectrum(module.net, nn.CrossEntropyLoss(), points(), backend="hooks")
    assert list(found.layers) == ["net.0", "net.2", "net.4"]
    assert found.trace().value == pytest.approx(plain.trace().value, rel=1e-12)


def test_a_lightning_module_with_weights_in_its_loss() -> None:
    class Weighted(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = networks()["mlp"], nn.CrossEntropyLoss(weight=WEIGHTS)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Tensor]:
            loss = self.loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return {"loss": loss}

    module, (x, y) = Weighted(), points()
    found = kronecker_spectrum(module, None, [(x[:5], y[:5]), (x[5:], y[5:])])
    plain = kronecker_spectrum(module.net, module.loss, (x, y))
    for name, block in plain.layers.items():
        torch.testing.assert_close(found.layers[f"net.{name}"].output_factor, block.output_factor)


# Selection, degenerate cases, refusals


def test_params_choose() -> None:
    net, data = networks()["mlp"], points()
    every = kronecker_spectrum(net, nn.CrossEntropyLoss(), data)
    for backend in ("backpack", "hooks"):
        weight = kronecker_spectrum(net, nn.CrossEntropyLoss(), data, params="4.weight", backend=backend)  # type: ignore[arg-type]
        assert list(weight.layers) == ["4"]
        assert weight.num_params == 15
        torch.testing.assert_close(weight.layers["4"].input_factor, every.layers["4"].input_factor[:-1, :-1])
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    assert list(kronecker_spectrum(net, nn.CrossEntropyLoss(), data).layers) == ["2", "4"]


def test_dead_layer() -> None:
    net, data = networks()["mlp"], points()
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    for found in backends(net, nn.CrossEntropyLoss(), data):
        assert found.layers["0"].trace().value == 0.0
        assert found.layers["2"].rank == 0
        assert found.layers["4"].rank == 2  # only the bias learns: one input, two free logits
        assert found.effective_rank().value > 0
        exact = ggn_spectrum(net, nn.CrossEntropyLoss(), data)
        assert found.rank == exact.epsilon_rank(1e-12, relative=True).value


def test_one_sample_and_one_unit() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    data = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for found in backends(net, nn.MSELoss(), data):
        assert found.num_params == 4


def test_nan_is_a_measurement_error() -> None:
    net, (x, y) = networks()["mlp"], points()
    x[0, 0] = torch.nan
    with pytest.raises(MeasurementError, match="loss on the probe data is nan"):
        kronecker_spectrum(net, nn.CrossEntropyLoss(), (x, y))


def test_no_layer_is_a_measurement_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(6))
    with pytest.raises(MeasurementError, match=r"No layer has Kronecker factors.*BatchNorm1d"):
        kronecker_spectrum(net, nn.CrossEntropyLoss(), (torch.randn(4, 6), torch.randint(6, (4,))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": "kron"}, "factors='kron', expected one of"),
        ({"backend": "jax"}, "backend='jax', expected one of"),
        ({"mc_samples": 0}, "mc_samples=0, expected at least 1"),
        ({"params": "no.such"}, "match nothing"),
    ],
)
def test_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kronecker_spectrum(networks()["mlp"], nn.CrossEntropyLoss(), points(), **options)


def test_check_on_too_many_samples_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_plasticity.curvature.kronecker.spectrum as module

    monkeypatch.setattr(module, "CHECK_ROWS", 10)
    with pytest.raises(ValueError, match="which is 5 samples here; got 20"):
        kronecker_spectrum(networks()["mlp"], nn.CrossEntropyLoss(), points(), check=True)


# Undisturbed


@pytest.mark.parametrize("backend", ["auto", "hooks"])
@pytest.mark.parametrize("name", ["norm", "residual"])
def test_module_is_left_as_it_was(name: str, backend: Any) -> None:
    net = networks()[name].float()
    x, y = data_for(name)
    data = x.float(), y
    F.cross_entropy(net(data[0]), y).backward()
    before = copy.deepcopy(net.state_dict())
    gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    attributes = {key: set(module.__dict__) for key, module in net.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    kronecker_spectrum(net, nn.CrossEntropyLoss(), data, backend=backend, check=True)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True))
    assert attributes == {key: set(module.__dict__) for key, module in net.named_modules()}
    assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in net.modules()]
    assert all(not hasattr(parameter, "kflr") for parameter in net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert all(module.training for module in net.modules())
