"""Which way the rows of a layer's Gram matrix are computed; what is computed must not depend on it."""

import pytest
import torch
from problems import Apply, assert_same_eigenvalues, cross_entropy, dense_ggn, dense_jacobian, expanded
from torch import nn

from lightning_plasticity.curvature import ggn_spectrum, hessian_spectrum, layers


@pytest.mark.parametrize(("channels", "route"), [(64, "_add_pairs"), (2, "_add_rows")])
def test_both_routes_of_a_convolution(channels, route, monkeypatch):
    # Many inputs at few positions are summed over pairs of positions, the rest through explicit rows.
    taken = []
    for name in ("_add_pairs", "_add_rows"):
        function = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, name=name, function=function: taken.append(name) or function(*a))
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
    assert spectrum.settings["general_route"] == ["1.weight", "4.weight"]
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
    """Uses its layer twice on small batches."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        found = torch.tanh(self.layer(x))
        return self.head(torch.tanh(self.layer(found)) if len(x) < 5 else found)
