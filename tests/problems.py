"""Small networks, data, and what their curvature is by brute force: dense matrices in float64, no shortcut."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_plasticity.curvature import Spectrum

Loss = Callable[[Any, Any], Tensor]


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    """A float64 multilayer perceptron with weights of its own seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(sizes):
            layers += [nn.Linear(width, following), activation()]
        return nn.Sequential(*layers[:-1]).double()


def classes(num_samples: int, num_features: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian inputs with random labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(num_classes, (num_samples,), generator=generator)


def from_vectors(arrays: dict[str, np.ndarray]) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """The network and the data of a `hessian_*` file."""
    weights = [torch.from_numpy(arrays[f"param_{i}"]) for i in range(sum(key.startswith("param_") for key in arrays))]
    layers: list[nn.Module] = []
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]), (torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def dense_jacobian(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """(outputs, P), one backward pass for each output."""
    rows = []
    for output in outputs.flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def dense_ggn(
    module: nn.Module, loss_fn: Loss, batches: Sequence[Any], parameters: Sequence[Tensor] | None = None
) -> Tensor:
    """(P, P): J^T (d2 loss / d outputs2) J, batches weighted by their size."""
    parameters = trainable(module) if parameters is None else parameters
    total, result = sum(len(targets) for _, targets in batches), 0.0
    for inputs, targets in batches:
        outputs = module(inputs)
        jacobian = dense_jacobian(outputs, parameters)
        loss_of = lambda values, targets=targets: loss_fn(values, targets)  # noqa: E731
        curvature = torch.autograd.functional.hessian(loss_of, outputs.detach()).reshape(len(jacobian), -1)
        result = result + jacobian.T @ curvature @ jacobian * (len(targets) / total)
    return result


def dense_ntk(module: nn.Module, batches: Sequence[Any], parameters: Sequence[Tensor] | None = None) -> Tensor:
    """(P, P): J^T J / N, which has the nonzero eigenvalues of J J^T / N."""
    parameters = trainable(module) if parameters is None else parameters
    jacobian = torch.cat([dense_jacobian(module(inputs), parameters) for inputs, _ in batches])
    return jacobian.T @ jacobian / sum(len(targets) for _, targets in batches)


def dense_hessian(module: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> Tensor:
    """(P, P) by forward-over-reverse differentiation, in the order of `parameters_to_vector`."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shapes, sizes = [p.shape for p in named.values()], [p.numel() for p in named.values()]

    def loss_of(flat: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return loss_fn(torch.func.functional_call(module, dict(zip(named, parts, strict=True)), (inputs,)), targets)

    with warnings.catch_warnings():  # forward mode compiles a few formulas, by a function that torch has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return torch.func.hessian(loss_of)(torch.cat([p.detach().flatten() for p in named.values()]))


def expanded(spectrum: Spectrum) -> Tensor:
    """All P eigenvalues of an exact spectrum, ascending."""
    return spectrum.eigenvalues.repeat_interleave(spectrum.counts.round().long())


def assert_same_eigenvalues(spectrum: Spectrum, matrix: Tensor, rtol: float = 1e-10) -> None:
    """Every eigenvalue to a relative 1e-10; those within 1e-14 of the largest of zero are rounding of `eigvalsh`."""
    truth = torch.linalg.eigvalsh(matrix)
    top = float(truth.abs().max())
    assert spectrum.num_params == len(truth)
    torch.testing.assert_close(expanded(spectrum), truth, rtol=rtol, atol=2e-14 * max(top, 1e-300))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """As users write it: a function of outputs and targets."""
    return F.cross_entropy(outputs, targets)


class Cube(torch.autograd.Function):
    """x^3, right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


class CubeOnce(Cube):
    """x^3, whose backward cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


class CubeNet(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.second(self.function.apply(self.first(x)))
