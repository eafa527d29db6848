"""SpectralNorm: the reference vectors, closed forms, and weights of every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity import SpectralNorm
from lightning_plasticity.linalg import largest_singular_value
from lightning_plasticity.regularization import RegularizationEngine

Vectors = Callable[[str], dict[str, np.ndarray]]


def value(module: nn.Module, **settings: Any) -> float:
    found = SpectralNorm(1.0, **settings).penalty(module, {})
    assert found is not None
    return found.item()


def gradients(regularizer: SpectralNorm, module: nn.Module) -> list[Tensor]:
    module.zero_grad()
    penalty = regularizer.penalty(module, {})
    assert penalty is not None
    return list(torch.autograd.grad(penalty, list(module.parameters())))


def test_reference_vectors(vectors: Vectors) -> None:
    """Value and gradients of another program, in float64."""
    archive = {name: torch.from_numpy(array) for name, array in vectors("spectral_reg").items()}
    starts = iter([archive[f"start_{i}"] for i in range(3)])

    class Given(SpectralNorm):
        def start(self, matrix: Tensor) -> Tensor:
            return next(starts)

    layers = []
    for i in range(0, 6, 2):
        rows, columns = archive[f"param_{i}"].shape
        layers.append(nn.Linear(columns, rows, dtype=torch.float64))
        layers[-1].load_state_dict({"weight": archive[f"param_{i}"], "bias": archive[f"param_{i + 1}"]})
    net = nn.Sequential(*layers)
    penalty = Given(0.1, k=2, target=2, bias_exponent=2, eps=1e-6).penalty(net, {})
    assert penalty is not None
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), archive["value"], rtol=1e-12, atol=0)
    for i, parameter in enumerate(net.parameters()):
        torch.testing.assert_close(parameter.grad, archive[f"grad_{i}"], rtol=1e-10, atol=1e-12)
    for i in range(3):
        weight, start = archive[f"param_{2 * i}"], archive[f"start_{i}"]
        sigma = largest_singular_value(weight, start, 10, eps=1e-6)
        torch.testing.assert_close(sigma, archive["power_sigma_10"][i], rtol=1e-12, atol=0)
        exact = largest_singular_value(weight, start, 2000)
        torch.testing.assert_close(exact, archive["exact_sigma_max"][i], rtol=1e-9, atol=0)


def diagonal(*entries: float) -> nn.Linear:
    layer = nn.Linear(len(entries), len(entries), dtype=torch.float64)
    layer.weight.data.copy_(torch.diag(torch.tensor(entries)))
    layer.bias.data.zero_()
    return layer


@pytest.mark.parametrize("num_iterations", [200, None])
def test_by_hand(num_iterations: int | None) -> None:
    layer = diagonal(3.0, 2.0)
    layer.bias.data.copy_(torch.tensor([3.0, 4.0]))
    # (3^2 - 1)^2 + 5^4; d/dsigma = 2 (9 - 1) 2 * 3 at (0, 0); d/db = 4 * 5^2 b.
    assert value(layer, num_iterations=num_iterations) == pytest.approx(64 + 625)
    weight, bias = gradients(SpectralNorm(1.0, num_iterations=num_iterations), layer)
    torch.testing.assert_close(weight, torch.diag(torch.tensor([96.0, 0.0], dtype=torch.float64)), atol=1e-8, rtol=0)
    torch.testing.assert_close(bias, torch.tensor([300.0, 400.0], dtype=torch.float64))
    # k = 1, target 2, plain squares of biases.
    settings: dict[str, Any] = {"k": 1, "target": 2.0, "bias_exponent": 2, "num_iterations": num_iterations}
    assert value(layer, **settings) == pytest.approx(1 + 25)


def test_the_gradient_through_the_iterations_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    regularizer = SpectralNorm(0.7, num_iterations=2)

    def penalty(weight: Tensor, bias: Tensor) -> Tensor:
        layer.weight.data, layer.bias.data = weight.data, bias.data
        found = regularizer.penalty(layer, {})
        assert found is not None
        return found

    (weight, bias) = gradients(regularizer, layer)
    for parameter, gradient in ((layer.weight, weight), (layer.bias, bias)):
        for index in range(parameter.numel()):
            flat, eps = parameter.data.view(-1), 1e-6
            flat[index] += eps
            above = penalty(layer.weight, layer.bias).item()
            flat[index] -= 2 * eps
            below = penalty(layer.weight, layer.bias).item()
            flat[index] += eps
            assert (above - below) / (2 * eps) == pytest.approx(float(gradient.reshape(-1)[index]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 5, 2, bias=False), nn.ConvTranspose2d(5, 3, 2, bias=False), nn.Embedding(6, 4), nn.Bilinear(2, 3, 4)],
)
def test_kernels_are_matrices_of_outputs_and_the_rest(layer: nn.Module) -> None:
    weight: Any = layer.weight
    rows = weight.detach().numpy()
    rows = rows.swapaxes(0, 1) if isinstance(layer, nn.ConvTranspose2d) else rows
    sigma = np.linalg.svd(rows.reshape(len(rows), -1), compute_uv=False)[0]
    expected = (sigma**2 - 1) ** 2 + (float(layer.bias.detach().norm()) ** 4 if isinstance(layer, nn.Bilinear) else 0)
    assert value(layer, num_iterations=500) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.LayerNorm((2, 2))])
def test_norm_scales_are_drawn_to_one_and_their_shifts_to_zero(norm: nn.Module) -> None:
    assert value(norm) == 0.0
    scale, shift = norm.parameters()
    scale.data.fill_(1.5)
    shift.data.fill_(0.5)
    assert value(norm) == pytest.approx(2 * (4 * 0.25) ** 2)
    assert value(norm, bias_exponent=2) == pytest.approx(2 * 4 * 0.25)


def test_a_class_of_ones_own_that_says_norm_has_a_scale() -> None:
    class RootMeanSquareNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    assert value(RootMeanSquareNorm()) == 0.0
    assert value(nn.Sequential(RootMeanSquareNorm(), diagonal(1.0, 0.5))) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("num_iterations", [10, None])
def test_zero_weights_and_biases_have_a_finite_gradient(num_iterations: int | None) -> None:
    layer = diagonal(0.0, 0.0)
    assert value(layer, num_iterations=num_iterations) == 1.0
    found = gradients(SpectralNorm(num_iterations=num_iterations), layer)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)


def test_no_random_state_is_touched_and_values_repeat() -> None:
    layer, before = nn.Linear(5, 4), torch.get_rng_state()
    assert value(layer) == value(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_chosen_frozen_and_lazy_parameters() -> None:
    net = nn.Sequential(diagonal(2.0), diagonal(2.0), nn.LazyLinear(3))
    assert value(net) == pytest.approx(18.0)
    assert value(net, params=["0.*"]) == pytest.approx(9.0)
    net[:2].requires_grad_(False)
    assert SpectralNorm(1.0).penalty(net, {}) is None
    assert SpectralNorm(0.0).penalty(net, {}) is None


def test_autocast_and_half_weights_do_not_lower_the_precision() -> None:
    layer = nn.Linear(20, 30)
    plain = RegularizationEngine([SpectralNorm(1.0)]).penalty(layer)
    with torch.autocast("cpu", torch.bfloat16):
        cast = RegularizationEngine([SpectralNorm(1.0)]).penalty(layer)
    assert plain is not None
    assert cast is not None
    assert torch.equal(plain, cast)
    half = RegularizationEngine([SpectralNorm(1.0)]).penalty(layer.bfloat16())
    assert half is not None
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"strength": -1.0}, ValueError, "strength=-1.0"),
        ({"target": float("nan")}, ValueError, "target=nan"),
        ({"k": 0.5}, ValueError, "k=0.5, expected a number of at least 1"),
        ({"bias_exponent": 0}, ValueError, "bias_exponent=0"),
        ({"num_iterations": 0}, ValueError, "num_iterations=0, expected a whole number >= 1, or None"),
        ({"num_iterations": 2.5}, ValueError, "num_iterations=2.5"),
        ({"params": "net"}, TypeError, "params='net', expected a list"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SpectralNorm(**settings)


def test_power_iteration_needs_an_iteration() -> None:
    with pytest.raises(ValueError, match="num_iterations=0"):
        largest_singular_value(torch.eye(2), torch.ones(2), 0)
