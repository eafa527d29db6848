"""The Hessian in its range: all its eigenvalues against dense matrices, and None wherever it is not that of a stack."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Apply, classes, dense_hessian, from_vectors, mlp, trainable
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature.hessian.linear_stack import ACTIVATIONS
from lightning_plasticity.curvature.hessian.operator import HessianOperator
from lightning_plasticity.curvature.hessian.range_space import estimated_speedup, range_operator
from lightning_plasticity.curvature.layers import LayerTaps
from lightning_plasticity.linalg import lanczos

TINY = {torch.float64: 1e-13, torch.float32: 1e-6}  # rounding of an eigenvalue relative to the largest


def gaussian(size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(net, loss_fn, inputs, targets, parameters=None):
    """The operator, proved by a product of ordinary double backward; and that product's operator."""
    parameters = trainable(net) if parameters is None else parameters
    with LayerTaps(net) as taps:
        loss = loss_fn(net(inputs), targets)
    whole = HessianOperator([loss], [1.0], parameters)
    probe = gaussian(whole.num_params, dtype=inputs.dtype)
    return range_operator(loss, taps, parameters, probe, whole.matvec(probe)), whole


def squared(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, outputs.shape[1]).to(outputs.dtype))


def without_biases(net):
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.bias = None
    return net


def assert_whole_spectrum(operator, dense, dtype=torch.float64):
    """Its eigenvalues and ``num_params - dim`` zeros are those of the dense Hessian."""
    assert operator is not None
    assert operator.num_params == len(dense)
    truth = torch.linalg.eigvalsh(dense)
    found = torch.linalg.eigvalsh(operator.dense())
    assert len(found) == operator.dim <= operator.size
    padded = torch.cat([found, torch.zeros(operator.num_params - operator.dim, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(padded, truth, rtol=0, atol=TINY[dtype] * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, squared])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_every_eigenvalue_is_that_of_the_dense_hessian(activation, loss_fn, biases, dtype):
    net, (inputs, targets) = mlp(7, 9, 8, 9, 3, activation=activation), classes(4, 7, 3)
    net = net if biases else without_biases(net)
    dense = dense_hessian(net, loss_fn, inputs, targets)
    operator, _ = built(net.to(dtype), loss_fn, inputs.to(dtype), targets)
    assert_whole_spectrum(operator, dense, dtype)
    assert operator.dim < operator.num_params  # it does leave something out
    assert (operator.dtype, operator.device) == (dtype, inputs.device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_table(activation):
    net, (inputs, targets) = mlp(5, 7, 6, 3, activation=partial(Apply, activation)), classes(3, 5, 3)
    dense = dense_hessian(net, F.cross_entropy, inputs, targets)
    assert_whole_spectrum(built(net, F.cross_entropy, inputs, targets)[0], dense)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.0)),
        Apply(lambda z: z * torch.sigmoid(z)),  # a silu in other words, off by an ulp
        Apply(lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5))),
        nn.LeakyReLU(),
    ],
)
def test_activations_written_in_other_ways(module):
    net, (inputs, targets) = mlp(5, 7, 3), classes(3, 5, 3)
    net[1] = module
    dense = dense_hessian(net, F.cross_entropy, inputs, targets)
    assert_whole_spectrum(built(net, F.cross_entropy, inputs, targets)[0], dense)


def dead_units(net, inputs):
    net[0].bias.data[[1, 4]] = -100.0
    net[2].bias.data[0] = -100.0


def dead_layer(net, inputs):
    net[2].bias.data.fill_(-100.0)


def dead_network(net, inputs):
    net[0].bias.data.fill_(-100.0)


def rank_one_weights(net, inputs):
    for layer in net[::2]:
        layer.weight.data = torch.outer(layer.weight.data[:, 0], layer.weight.data[0])


def zero_weights(net, inputs):
    net[2].weight.data.zero_()


def huge_weights(net, inputs):
    for layer in net[::2]:
        layer.weight.data *= 30


def duplicates(net, inputs):
    inputs[1:3] = inputs[0]


def zero_inputs(net, inputs):
    inputs.zero_()


def one_huge_sample(net, inputs):
    inputs[0] *= 1e6


def nearly_equal_samples(net, inputs):
    inputs[1:2] = inputs[0] * (1 + 1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("num_samples", [1, 5, 30])
@pytest.mark.parametrize(
    "spoil",
    [
        dead_units,
        dead_layer,
        dead_network,
        rank_one_weights,
        zero_weights,
        huge_weights,
        duplicates,
        zero_inputs,
        one_huge_sample,
        nearly_equal_samples,
    ],
)
def test_degenerate_networks_and_data(spoil, num_samples, activation):
    net, (inputs, targets) = mlp(6, 8, 7, 4, activation=activation), classes(num_samples, 6, 4)
    spoil(net, inputs)
    dense = dense_hessian(net, F.cross_entropy, inputs, targets)
    assert_whole_spectrum(built(net, F.cross_entropy, inputs, targets)[0], dense)


def test_units_without_values_or_derivatives_are_left_out():
    net, (inputs, targets) = mlp(6, 8, 7, 4, activation=nn.ReLU), classes(3, 6, 4)
    net[0].weight.data.abs_()
    net[0].bias.data.fill_(10.0)  # all on
    before, _ = built(net, F.cross_entropy, inputs, targets)
    dead_units(net, inputs)
    after, _ = built(net, F.cross_entropy, inputs, targets)
    assert after.size < before.size
    # A saturated unit has a value and no derivative: it is an input like the bias.
    net = mlp(6, 8, 4)
    net[0].bias.data[2] = 100.0
    dense = dense_hessian(net, F.cross_entropy, inputs, targets)
    assert_whole_spectrum(built(net, F.cross_entropy, inputs, targets)[0], dense)


@pytest.mark.parametrize("case", ["a_fresh", "a_dead", "b_fresh", "b_rank1", "c_fresh", "c_huge", "d_uneven_batch"])
def test_reference_products(vectors, case):
    arrays = vectors(f"hessian_{case}")
    net, (inputs, targets) = from_vectors(arrays)
    operator, _ = built(net, F.cross_entropy, inputs, targets)
    probe = torch.from_numpy(arrays["probe"])
    product = operator.expand(operator.matvec(operator.restrict(probe)))
    np.testing.assert_allclose(product, arrays["hvp_exact"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 4, 20])
def test_linear_model(num_samples):
    net, (inputs, targets) = mlp(6, 3), classes(num_samples, 6, 3)
    operator, _ = built(net, F.cross_entropy, inputs, targets)
    assert_whole_spectrum(operator, dense_hessian(net, F.cross_entropy, inputs, targets))
    assert operator.size == operator.dim == 3 * min(num_samples, 7)  # no B
    # Least squares in closed form: (2 / N C) x x^T, once for each output.
    operator, _ = built(without_biases(net), squared, inputs, targets)
    values = torch.linalg.svdvals(inputs).square() * (2 / (3 * num_samples))
    torch.testing.assert_close(torch.linalg.eigvalsh(operator.dense()), values.repeat_interleave(3).flip(0))


def pieces(num_samples=3, activation=nn.Tanh, dtype=torch.float64):
    net, (inputs, targets) = mlp(6, 8, 7, 4, activation=activation), classes(num_samples, 6, 4)
    dense = dense_hessian(net, F.cross_entropy, inputs, targets)
    return built(net.to(dtype), F.cross_entropy, inputs.to(dtype), targets)[0], dense


@pytest.mark.parametrize("num_samples", [1, 3, 30])
def test_the_projection(num_samples):
    operator, dense = pieces(num_samples)
    restrict = torch.stack([operator.restrict(unit) for unit in torch.eye(operator.num_params).double()], dim=1)
    expand = torch.stack([operator.expand(unit) for unit in operator.basis()], dim=1)  # (P, dim)
    projection = torch.stack([operator.expand(column) for column in restrict.T], dim=1)
    torch.testing.assert_close(projection, projection.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-13)
    assert float(projection.trace()) == pytest.approx(operator.dim, rel=1e-12)
    torch.testing.assert_close(projection @ dense, dense, rtol=0, atol=1e-13)  # the range is inside
    # The basis is orthonormal, in coordinates and in parameter space; restrict takes a Gaussian to a Gaussian on it.
    basis = operator.basis()
    assert basis.shape == (operator.dim, operator.size)
    identity = torch.eye(operator.dim).double()
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(expand.T @ expand, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(restrict @ restrict.T, basis.T @ basis, rtol=0, atol=1e-13)
    torch.testing.assert_close(restrict @ expand, basis.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products(dtype):
    operator, dense = pieces(dtype=dtype)
    u, v = (operator.restrict(gaussian(operator.num_params, seed, dtype)) for seed in (1, 2))
    before = v.clone()
    product = operator.matvec(v)
    assert torch.equal(v, before)
    assert operator.num_products == 1
    atol = TINY[dtype] * float(product.abs().max()) * 10
    expected = dense @ operator.expand(v).double()
    torch.testing.assert_close(operator.expand(product).double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(operator.restrict(operator.expand(product)), product, rtol=0, atol=atol)  # stays inside
    assert float(u @ product) == pytest.approx(float(v @ operator.matvec(u)), abs=atol * operator.size)
    torch.testing.assert_close(operator.matvec(2 * v - 3 * u), 2 * product - 3 * operator.matvec(u), rtol=0, atol=atol)
    assert torch.equal(operator.matvec(v), product)  # no state left behind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_stays_in_the_range(dtype):
    # The constraint on B is not enforced on what a product is given, so rounding could pile up outside.
    net, (inputs, targets) = mlp(20, 60, 50, 40, 4, activation=nn.ReLU), classes(8, 20, 4)
    operator, _ = built(net.to(dtype), F.cross_entropy, inputs.to(dtype), targets)
    start = operator.restrict(gaussian(operator.num_params, 3, dtype))
    run = lanczos(operator.matvec, start, 120, keep_basis=True)
    for vector in run.basis[::10]:
        drift = operator.restrict(operator.expand(vector)) - vector
        assert float(drift.norm()) < 100 * torch.finfo(dtype).eps
    _, whole = built(net.double(), F.cross_entropy, inputs, targets)
    truth = lanczos(whole.matvec, gaussian(whole.num_params), 120).ritz()[0]
    found, atol = run.ritz()[0], 10 * TINY[dtype] * np.abs(truth).max()
    np.testing.assert_allclose(found[-8:], truth[-8:], rtol=0, atol=atol)
    np.testing.assert_allclose(found[:4], truth[:4], rtol=0, atol=atol)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    num_samples=st.integers(1, 8),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.SiLU]),
    seed=st.integers(0, 1000),
)
def test_any_shape(sizes, num_samples, activation, seed):
    net = mlp(*sizes, activation=activation, seed=seed)
    inputs, targets = classes(num_samples, sizes[0], sizes[-1], seed)
    dense = dense_hessian(net, squared, inputs, targets)
    assert_whole_spectrum(built(net, squared, inputs, targets)[0], dense)


@pytest.mark.parametrize("chosen", [(0,), (2,), (4,), (0, 4), (2, 4), (0, 2)])
@pytest.mark.parametrize("frozen", [True, False])
def test_other_layers_only_pass_derivatives_on(chosen, frozen):
    net, (inputs, targets) = mlp(6, 8, 7, 4), classes(3, 6, 4)
    parameters = [parameter for index in chosen for parameter in net[index].parameters()]
    if frozen:
        for parameter in net.parameters():
            parameter.requires_grad_(any(parameter is own for own in parameters))
    slices = np.split(np.arange(151), [56, 119])
    index = np.concatenate([slices[i // 2] for i in chosen])
    full = mlp(6, 8, 7, 4)
    dense = dense_hessian(full, F.cross_entropy, inputs, targets)[index][:, index]
    assert_whole_spectrum(built(net, F.cross_entropy, inputs, targets, parameters)[0], dense)


def test_parameters_in_another_order():
    net, (inputs, targets) = mlp(6, 8, 4), classes(3, 6, 4)
    parameters = trainable(net)[::-1]
    operator, whole = built(net, F.cross_entropy, inputs, targets, parameters)
    probe = gaussian(operator.num_params, 3)
    product = operator.expand(operator.matvec(operator.restrict(probe)))
    torch.testing.assert_close(product, whole.matvec(probe), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, t: F.nll_loss(o.log_softmax(1), t),
        lambda o, t: F.cross_entropy(2 * o, t),  # what comes after the last layer is part of the loss
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1, reduction="sum"),
        lambda o, t: (o - o.mean(0)).square().sum() + o.pow(3).sum(),  # mixes samples, not convex
        lambda o, t: o.sum(),  # no curvature in the outputs
    ],
)
def test_any_loss_of_the_outputs(loss_fn):
    net, (inputs, targets) = mlp(6, 8, 7, 4), classes(3, 6, 4)
    dense = dense_hessian(net, loss_fn, inputs, targets)
    assert_whole_spectrum(built(net, loss_fn, inputs, targets)[0], dense)


def test_frozen_layers_of_other_kinds_before_the_stack():
    net = nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    inputs, targets = classes(3, 6, 4)
    net, inputs = net.double(), inputs[:, None]
    net[0].requires_grad_(False)
    assert_whole_spectrum(
        built(net, F.cross_entropy, inputs, targets)[0], dense_hessian(net, F.cross_entropy, inputs, targets)
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h + torch.relu(self.middle(h)))


class Skip(Residual):
    """A stack by its values; the outputs use a hidden layer once more."""

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.middle(h))) + h[:, :4]


class Branches(Residual):
    """Both layers on the same input."""

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * torch.relu(self.middle(x)))


class Temperature(Residual):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x))))) * self.temperature


class Tied(Residual):
    def __init__(self):
        super().__init__()
        self.middle.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class Twice(Residual):
    def forward(self, x):
        return self.last(torch.relu(self.first(torch.relu(self.first(x)))))


class Transposed(Residual):
    """Uses a weight once more, away from its layer."""

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x))))) + x @ self.last.weight.T


def between(module):
    return nn.Sequential(nn.Linear(6, 6), module, nn.Linear(6, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        Residual,
        Skip,
        Branches,
        Temperature,
        Tied,
        Twice,
        Transposed,
        lambda: between(nn.Dropout(0.5)),  # in training mode
        lambda: between(nn.BatchNorm1d(6)),
        lambda: between(nn.BatchNorm1d(6, affine=False).eval()),
        lambda: between(nn.LayerNorm(6, elementwise_affine=False)),
        lambda: between(Apply(torch.sin)),
        lambda: between(nn.LeakyReLU(0.2)),
        lambda: between(Apply(lambda z: z.flip(1).relu())),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
        lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten()),
    ],
)
def test_other_networks_are_refused(make, dtype):
    torch.manual_seed(0)
    inputs, targets = classes(5, 6, 4)
    assert built(make().to(dtype), F.cross_entropy, inputs.to(dtype), targets)[0] is None


def test_sequences_are_refused():
    net, targets = mlp(6, 8, 4), torch.tensor([0, 1])
    inputs = gaussian(2 * 3 * 6).view(2, 3, 6)
    assert built(net, lambda o, t: F.cross_entropy(o.mean(1), t), inputs, targets)[0] is None


class StraightThrough(torch.autograd.Function):
    """The values of a relu and the derivative of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Damped(torch.autograd.Function):
    """The values of a relu, and nearly its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0) * 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.relu().detach(),
        lambda z: z.relu().detach() + z.tanh() - z.tanh().detach(),
        StraightThrough.apply,
        Damped.apply,
    ],
)
def test_right_values_of_another_graph_are_refused(function, dtype):
    inputs, targets = classes(5, 6, 4)
    for position in (1, 3):
        net = mlp(6, 8, 7, 4, activation=nn.ReLU)
        net[position] = Apply(function)
        assert built(net.to(dtype), F.cross_entropy, inputs.to(dtype), targets)[0] is None
        net[position] = nn.ReLU()  # that was the reason
        assert built(net, F.cross_entropy, inputs.to(dtype), targets)[0] is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_that_see_more_than_the_outputs_are_refused(dtype):
    net, (inputs, targets) = mlp(6, 8, 7, 4).to(dtype), classes(5, 6, 4)
    decay = lambda o, t: F.cross_entropy(o, t) + 5e-3 * net[2].weight.square().sum()  # noqa: E731
    assert built(net, decay, inputs.to(dtype), targets)[0] is None
    blind = lambda o, t: (net[0].weight ** 3).sum() + 0 * o.detach().sum()  # noqa: E731
    assert built(net, blind, inputs.to(dtype), targets)[0] is None


def test_half_a_layer_and_other_dtypes_are_refused():
    net, (inputs, targets) = mlp(6, 8, 7, 4), classes(5, 6, 4)
    assert built(net, F.cross_entropy, inputs, targets, [net[0].weight, *net[2].parameters()])[0] is None
    assert built(net, F.cross_entropy, inputs, targets, [net[4].bias])[0] is None
    assert built(net.bfloat16(), F.cross_entropy, inputs.bfloat16(), targets)[0] is None


def test_several_batches_and_broken_products_are_refused():
    net, (inputs, targets) = mlp(6, 8, 4), classes(5, 6, 4)
    parameters, probe = trainable(net), gaussian(92)
    with LayerTaps(net) as taps:
        loss = F.cross_entropy(net(inputs), targets)
    good = HessianOperator([loss], [1.0], parameters).matvec(probe)
    assert range_operator(loss, taps, parameters, probe, good) is not None
    assert range_operator(loss, taps, parameters, probe, good * float("nan")) is None
    assert range_operator(loss, taps, parameters, probe * float("inf"), good) is None
    assert range_operator(loss, taps, parameters, probe, good * (1 + 1e-7)) is None
    assert range_operator(loss, taps, [], probe, good) is None
    with LayerTaps(net) as taps:
        loss = F.cross_entropy(net(inputs), targets) + F.cross_entropy(net(inputs), targets)
    assert range_operator(loss, taps, parameters, probe, 2 * good) is None
    assert estimated_speedup(taps, parameters) == 0.0


def test_the_module_is_left_alone():
    net, (inputs, targets) = mlp(6, 8, 7, 4, activation=nn.ReLU), classes(5, 6, 4)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    operator, _ = built(net, F.cross_entropy, inputs, targets)
    operator.dense()
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
    assert not any(layer._forward_hooks for layer in net)


def test_the_speedup_is_told_from_shapes():
    def speedup(num_samples, *sizes):
        net = mlp(*sizes, activation=nn.ReLU)
        with LayerTaps(net) as taps, torch.no_grad():
            net(torch.zeros(num_samples, sizes[0], dtype=torch.float64))
        return estimated_speedup(taps, trainable(net))

    assert 3 < speedup(100, 784, 1000, 1000, 1000, 10) < 4.5  # measured 3.7
    assert speedup(50, 784, 1000, 1000, 1000, 10) > speedup(100, 784, 1000, 1000, 1000, 10)
    assert speedup(1000, 784, 1000, 1000, 1000, 10) < 1
    # Where nothing is saved but what autograd costs by itself: a small network, measured 3, and a large one.
    assert 2 < speedup(40, 10, 12, 12, 4) < 4
    assert 1 <= speedup(5000, 784, 1000, 1000, 1000, 10) < 1.01
