"""Which way the rows of a layer's Gram matrix are computed; what is computed must not depend on it."""

import pytest
import torch
from problems import Apply, assert_same_eigenvalues, cross_entropy, dense_ggn, dense_jacobian, expanded
from torch import nn

from lightning_plasticity.curvature import MeasurementError, ggn_spectrum, hessian_spectrum, ntk_spectrum
from lightning_plasticity.curvature.gram import matrix as gram
from lightning_plasticity.curvature.gram import shares


@pytest.mark.parametrize(("channels", "route"), [(64, "_add_pairs"), (2, "_add_rows")])
def test_both_routes_of_a_convolution(channels, route, monkeypatch):
    # Many inputs at few positions are summed over pairs of positions, the rest through explicit rows.
    taken = []
    for name in ("_add_pairs", "_add_rows"):
        function = getattr(shares, name)
        monkeypatch.setattr(shares, name, lambda *a, name=name, function=function: taken.append(name) or function(*a))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)).double()
    data = torch.randn(2, channels, 3, 3, dtype=torch.float64), torch.tensor([0, 2])
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert taken == [route]
    truth = torch.linalg.eigvalsh(dense_ggn(net, cross_entropy, [data]))
    torch.testing.assert_close(expanded(spectrum), truth, rtol=1e-10, atol=2e-14 * float(truth.max()))


class OneByOne(torch.autograd.Function):
    """x^3 with a backward that looks at its gradient, so that it cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        assert gradient.abs().max().item() >= 0
        return 3 * gradient * ctx.saved_tensors[0] ** 2


def test_rows_that_cannot_be_vectorised():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), Apply(OneByOne.apply), nn.Linear(5, 3)).double()
    net.append(nn.PReLU(3)).double()
    data = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert spectrum.settings["general_route"] == ["4.weight"]
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, [data]))
    hessian = dense_hessian_by_rows(net, data)
    assert_same_eigenvalues(hessian_spectrum(net, cross_entropy, data), hessian, rtol=1e-9)


def dense_hessian_by_rows(net, data):
    gradients = torch.autograd.grad(cross_entropy(net(data[0]), data[1]), list(net.parameters()), create_graph=True)
    return dense_jacobian(torch.cat([gradient.flatten() for gradient in gradients]), list(net.parameters()))


def test_layers_that_lose_their_shortcut_in_one_batch_only():
    torch.manual_seed(0)
    net = Branching().double()
    batches = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (7, 4, 5)]
    spectrum = ggn_spectrum(net, cross_entropy, batches)
    assert sorted(spectrum.settings["general_route"]) == ["layer.bias", "layer.weight"]
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, batches))


class Branching(nn.Module):
    """Uses its layer a second time on small batches, out of sight."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        found = torch.tanh(self.layer(x))
        return self.head(torch.tanh(found @ self.layer.weight) if len(x) < 5 else found)


def recurrent():
    torch.manual_seed(0)
    net = Recurrent().double()
    return net, [(torch.randn(n, 4, 3, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 2)]


class Recurrent(nn.Module):
    """Nothing in it but its head has a shortcut."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("columns", [1000, 50, 7])
def test_explicit_rows_are_held_a_few_coordinates_at_a_time(columns, monkeypatch):
    net, batches = recurrent()
    widths = []
    add_rows = gram.add_rows
    monkeypatch.setattr(gram, "add_rows", lambda g, rows: widths.append(rows.shape[-1]) or add_rows(g, rows))
    monkeypatch.setattr(gram, "MAX_ROW_BYTES", 14 * 8 * columns)  # 7 samples, two columns each, float64
    spectrum = ggn_spectrum(net, cross_entropy, batches)
    num_general = sum(parameter.numel() for parameter in net.cell.parameters())
    assert sum(widths) == num_general
    assert max(widths) == min(columns, num_general)
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, batches))


def test_explicit_rows_have_a_limit(monkeypatch):
    net, batches = recurrent()
    monkeypatch.setattr(gram, "MAX_ROW_BYTES", 14 * 8)
    with pytest.raises(MeasurementError, match=r"14 explicit gradient rows of 108 parameters.*Lower max_rows"):
        ggn_spectrum(net, cross_entropy, batches)
    ggn_spectrum(net, cross_entropy, batches, params="cell.bias_ih_l0")  # what it advises


def test_output_gradients_are_kept_of_the_samples_in_use_only(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    kept = []
    found = gram._output_gradients
    monkeypatch.setattr(gram, "_output_gradients", lambda *arguments: kept.extend(found(*arguments)) or list(kept))
    assert ggn_spectrum(net, cross_entropy, data, method="exact", max_rows=6).num_samples == 3
    assert [(gradient.shape[:2], gradient.untyped_storage().nbytes()) for gradient in kept] == [
        ((2, 3), 2 * 3 * 5 * 8),
        ((2, 3), 2 * 3 * 3 * 8),
    ]


@pytest.mark.parametrize("function", [ggn_spectrum, ntk_spectrum])
def test_max_rows_is_a_bound(function):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 30)).double()
    data = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 30, dtype=torch.float64)
    assert function(net, nn.MSELoss(), data, method="exact", max_rows=30).settings["rows"] == 30
    with pytest.raises(MeasurementError, match=r"One sample has 30 Gram rows.*max_rows=29\. Pass max_rows=30 or more"):
        function(net, nn.MSELoss(), data, method="exact", max_rows=29)


def test_max_rows_is_a_bound_when_later_samples_have_more_rows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Apply(lambda x: x.mT)).double()
    batches = [(torch.randn(3, length, 4, dtype=torch.float64), torch.randint(3, (3, length))) for length in (2, 4, 4)]
    spectrum = ggn_spectrum(net, cross_entropy, batches, method="exact", max_rows=40)
    assert (spectrum.num_samples, spectrum.settings["rows"]) == (5, 40)
    few = ggn_spectrum(
        net, cross_entropy, batches, method="exact", max_rows=16
    )  # the first batch; the second has no room
    assert (few.num_samples, few.settings["rows"]) == (3, 12)
