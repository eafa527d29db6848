"""Batches of any split are one batch; what counts as one."""

import pytest
import torch
from problems import cross_entropy, expanded, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum, ntk_spectrum

N, C = 11, 4
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 2, 2, 3, 0, 1])
REAL = torch.randn(N, C, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LOSSES = {
    "cross entropy": (F.cross_entropy, {}, LABELS),
    "class weights": (F.cross_entropy, {"weight": WEIGHTS}, LABELS),
    "ignore_index": (F.cross_entropy, {"ignore_index": 1}, LABELS),
    "smoothing": (F.cross_entropy, {"weight": WEIGHTS, "ignore_index": 3, "label_smoothing": 0.3}, LABELS),
    "probabilities": (F.cross_entropy, {"weight": WEIGHTS}, torch.softmax(REAL, 1)),
    "sum": (F.cross_entropy, {"reduction": "sum"}, LABELS),
    "weighted sum": (F.cross_entropy, {"reduction": "sum", "weight": WEIGHTS, "ignore_index": 0}, LABELS),
    "mse": (F.mse_loss, {}, REAL),
    "mse, sum": (F.mse_loss, {"reduction": "sum"}, REAL),
    "bce": (F.binary_cross_entropy_with_logits, {"pos_weight": WEIGHTS}, torch.sigmoid(REAL)),
    "bce, sum": (F.binary_cross_entropy_with_logits, {"reduction": "sum"}, torch.sigmoid(REAL)),
    "huber": (F.huber_loss, {"delta": 0.5}, REAL),
    "smooth l1, sum": (F.smooth_l1_loss, {"reduction": "sum"}, REAL),
}


def split(inputs, targets, *sizes):
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def inputs_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("function", [hessian_spectrum, ggn_spectrum, ntk_spectrum])
@pytest.mark.parametrize("name", LOSSES)
def test_uneven_batches_are_one_batch(name, function):
    loss, options, targets = LOSSES[name]
    net, inputs = mlp(5, 6, C), inputs_of(N, 5)
    loss_fn = lambda outputs, wanted: loss(outputs, wanted, **options)  # noqa: E731
    one = expanded(function(net, loss_fn, (inputs, targets)))
    several = expanded(function(net, loss_fn, split(inputs, targets, 7, 1, 3)))
    torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-13 * float(one.abs().max()))


@pytest.mark.parametrize("function", [hessian_spectrum, ggn_spectrum])
def test_nll_and_positions(function):
    net = nn.Sequential(*mlp(5, 6, C * 2), nn.Unflatten(1, (C, 2)), nn.LogSoftmax(1))
    targets = torch.stack([LABELS, LABELS.flip(0)], 1)
    targets[2, 1] = targets[8, 0] = -100
    loss_fn = lambda outputs, wanted: F.nll_loss(outputs, wanted, weight=WEIGHTS)  # noqa: E731
    inputs = inputs_of(N, 5)
    one = expanded(function(net, loss_fn, (inputs, targets)))
    two = expanded(function(net, loss_fn, split(inputs, targets, 8, 3)))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-13 * float(one.abs().max()))


@pytest.mark.parametrize("function", [hessian_spectrum, ggn_spectrum])
def test_an_unknown_loss_is_a_mean_over_samples(function):
    net, inputs = mlp(5, 6, C), inputs_of(N, 5)
    by_hand = lambda o, t: torch.logsumexp(o, 1).mean() - o.gather(1, t[:, None]).mean()  # noqa: E731
    one = expanded(function(net, by_hand, (inputs, LABELS)))
    two = expanded(function(net, by_hand, split(inputs, LABELS, 8, 3)))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-13 * float(one.abs().max()))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(5, 6, C)

    def forward(self, left, right):
        return self.net(torch.cat([left, right], 1))


@pytest.mark.parametrize("function", [hessian_spectrum, ggn_spectrum, ntk_spectrum])
def test_a_pair_with_several_inputs_is_one_batch(function):
    inputs = inputs_of(N, 5)
    left, right = inputs[:, :2], inputs[:, 2:]
    net = TwoInputs()
    expected = function(net.net, cross_entropy, (inputs, LABELS))
    as_dict = {"left": left, "right": right}
    several = [((left[:4], right[:4]), LABELS[:4]), ((left[4:], right[4:]), LABELS[4:])]
    for data in (((left, right), LABELS), (as_dict, LABELS), [((left, right), LABELS)], several, tuple(several)):
        found = function(net, cross_entropy, data)
        assert found.num_samples == N
        torch.testing.assert_close(expanded(found), expanded(expected), rtol=1e-9, atol=1e-13 * expected.max_abs)
    pairs = split(inputs, LABELS, 6, 5)
    for data in (pairs, tuple(pairs)):  # two pairs are not inputs and targets
        assert function(net.net, cross_entropy, data).num_samples == N


def test_a_dataset_is_refused_with_advice():
    dataset = TensorDataset(inputs_of(N, 5), LABELS)
    with pytest.raises(TypeError, match=r"data is a TensorDataset, which gives single samples; pass .*DataLoader\("):
        ggn_spectrum(mlp(5, 6, C), cross_entropy, dataset)
    assert ggn_spectrum(mlp(5, 6, C), cross_entropy, DataLoader(dataset, batch_size=4)).num_samples == N


@pytest.mark.parametrize("function", [ggn_spectrum, ntk_spectrum])
def test_few_rows_are_exact_by_default(function):
    net, data = mlp(5, 6, C), (inputs_of(N, 5), LABELS)
    auto, exact = (function(net, cross_entropy, data, method=method) for method in ("auto", "exact"))
    assert torch.equal(auto.eigenvalues, exact.eigenvalues)
    with pytest.raises(ValueError, match=r"method='gram', expected one of \('auto', 'exact', 'lanczos'\)"):
        function(net, cross_entropy, data, method="gram")
