"""Layer by layer: each spectrum against the dense diagonal block of its parameters."""

import pytest
import torch
from problems import assert_same_eigenvalues, classes, cross_entropy, dense_ggn, dense_hessian, dense_ntk, expanded, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import layer_spectra
from lightning_plasticity.curvature.gram import matrix as gram


class Shared(nn.Module):
    """A parameter of its own, an embedding tied to the head, and a layer without a shortcut."""

    def __init__(self):
        super().__init__()
        self.scale, self.table = nn.Parameter(torch.tensor(0.5)), nn.Embedding(5, 3)
        self.body, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 5)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.scale * self.head(self.body(self.table(tokens))[0][:, -1])


def shared():
    torch.manual_seed(0)
    data = [(torch.randint(5, (n, 4)), torch.randint(5, (n,))) for n in (6, 4)]
    return Shared().double(), data


def dense_block(matrix, net, batches, parameters):
    if matrix == "ggn":
        return dense_ggn(net, cross_entropy, batches, parameters)
    return dense_ntk(net, batches, parameters)


@pytest.mark.parametrize("matrix", ["ggn", "ntk"])
def test_blocks_of_ggn_and_ntk(matrix):
    net, batches = shared()
    spectra = layer_spectra(net, cross_entropy, batches, matrix=matrix)
    layers = {
        "": [net.scale],
        "table": [net.table.weight],  # and not the head's, which has its bias only
        "body": list(net.body.parameters()),
        "head": [net.head.bias],
    }
    assert list(spectra) == list(layers)
    for name, parameters in layers.items():
        assert_same_eigenvalues(spectra[name], dense_block(matrix, net, batches, parameters))
        assert (spectra[name].matrix, spectra[name].num_samples) == (matrix, 10)


def test_blocks_of_the_hessian():
    net, data = mlp(4, 5, 3), classes(9, 4, 3)
    matrix = dense_hessian(net, cross_entropy, *data)
    spectra = layer_spectra(net, cross_entropy, data, matrix="hessian")
    assert_same_eigenvalues(spectra["0"], matrix[:25, :25], rtol=1e-9)
    assert_same_eigenvalues(spectra["2"], matrix[25:, 25:], rtol=1e-9)


def test_piecewise_linear_layers_have_the_same_hessian_and_ggn():
    net, data = mlp(4, 6, 6, 3, activation=nn.ReLU), classes(9, 4, 3)
    ggn, hessian = (layer_spectra(net, cross_entropy, data, matrix=matrix) for matrix in ("ggn", "hessian"))
    for name in ggn:
        largest = ggn[name].max_abs
        torch.testing.assert_close(expanded(ggn[name]), expanded(hessian[name]), rtol=1e-9, atol=1e-14 * largest)


def test_one_set_of_backward_passes(monkeypatch):
    calls = []
    found = gram._output_gradients
    monkeypatch.setattr(gram, "_output_gradients", lambda *arguments: calls.append(1) or found(*arguments))
    net, data = mlp(4, 5, 5, 3), classes(9, 4, 3)
    spectra = layer_spectra(net, cross_entropy, data, max_rows=8)
    assert len(calls) == 1
    assert [spectrum.num_samples for spectrum in spectra.values()] == [4, 4, 4]
    first = (data[0][:4], data[1][:4])
    assert_same_eigenvalues(spectra["2"], dense_ggn(net, cross_entropy, [first], list(net[2].parameters())))


def test_chosen_parameters_only():
    net, data = mlp(4, 5, 5, 3), classes(9, 4, 3)
    spectra = layer_spectra(net, cross_entropy, data, params=["2.*", "4.bias"])
    assert {name: spectrum.num_params for name, spectrum in spectra.items()} == {"2": 30, "4": 3}
    assert_same_eigenvalues(spectra["4"], dense_ggn(net, cross_entropy, [data], [net[4].bias]))


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_names_with_wildcards_in_them(matrix):
    net = nn.ModuleDict({"a*": nn.Linear(3, 2), "ab": nn.Linear(2, 2)})
    net.forward = lambda x: net["ab"](torch.tanh(net["a*"](x)))
    data = torch.randn(5, 3), torch.randint(2, (5,))
    spectra = layer_spectra(net, cross_entropy, data, matrix=matrix)
    assert {name: spectrum.num_params for name, spectrum in spectra.items()} == {"a*": 8, "ab": 6}


def test_unknown_matrix():
    with pytest.raises(ValueError, match=r"matrix='fisher', expected one of \('ggn', 'ntk', 'hessian'\)"):
        layer_spectra(mlp(3, 2), cross_entropy, classes(4, 3, 2), matrix="fisher")


class Shifted(nn.Module):
    """Attention with a bias on its keys, and a bias before a batch norm: both leave the outputs as they are."""

    def __init__(self):
        super().__init__()
        self.query, self.keys, self.shift = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(4))
        self.last, self.norm, self.head = Shift(), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        tokens = torch.stack([x, 2 * x, x.flip(1)], 1)
        weights = torch.softmax(self.query(tokens) @ (self.keys(tokens) + self.shift).transpose(1, 2), -1)
        return self.head(torch.tanh(self.norm(self.last((weights @ tokens).mean(1)))))


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x + self.bias


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda o, t: F.cross_entropy(o, t) * 1.5], ids=["known", "scaled"])
def test_blocks_that_vanish_leave_the_others(loss):
    # In exact arithmetic the blocks of the two shifts are zero: what is left of them is rounding, and not symmetric.
    torch.manual_seed(0)
    net, data = Shifted(), (torch.randn(20, 4), torch.randint(3, (20,)))
    spectra = layer_spectra(net, loss, data, matrix="hessian", mode="as_is")
    assert max(spectra[name].max_abs for name in ("", "last")) < 1e-6
    truth = layer_spectra(net.double(), loss, (data[0].double(), data[1]), matrix="hessian", mode="as_is")
    for name in set(truth) - {"", "last"}:
        top = truth[name].max_abs
        assert top > 1e-3
        assert spectra[name].max_abs == pytest.approx(top, rel=1e-4)
