"""GGN and NTK of networks of every kind of layer, against dense Jacobians in float64."""

import pytest
import torch
from problems import Apply, assert_same_eigenvalues, cross_entropy, dense_ggn, dense_ntk, expanded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_plasticity.curvature import ggn_spectrum, ntk_spectrum
from lightning_plasticity.curvature.gram import shares


class Pooled(nn.Module):
    """The mean over positions of what an inner module puts out, then three classes."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 3)

    def forward(self, x):
        found = self.inner(x)
        found = found[0] if isinstance(found, tuple) else found
        return self.head(found.mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Tied(nn.Module):
    """Two layers that share one weight, by the same parameter in both."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


class TiedOutside(Tied):
    """A layer whose weight is also used without the layer, out of sight of its hooks."""

    def forward(self, x):
        return self.head(F.linear(torch.tanh(self.first(x)), self.first.weight))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class TwiceByKeyword(Twice):
    """Only one of the two calls can be seen."""

    def forward(self, x):
        return self.head(torch.tanh(self.layer(input=torch.tanh(self.layer(x)))))


class Unrolled(nn.Module):
    """A recurrent cell by hand: its layer is called once for each step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(7, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 3)
        for step in range(x.shape[1]):
            state = torch.tanh(self.layer(torch.cat([x[:, step], state], 1)))
        return self.head(state)


class TwoLengths(nn.Module):
    """One layer on six positions and on two."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        found = torch.tanh(self.layer(x))
        weights = torch.linspace(1, 2, 6, dtype=x.dtype)[None, :, None]
        return self.head(torch.tanh(self.layer((weights * found)[:, ::3])).mean(1))


class TwoStrides(nn.Module):
    """Two convolutions in groups that share their parameters and differ in stride and padding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.second, self.head = nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Linear(16, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))).flatten(1))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.head = norm, nn.Linear(4, 3)
        nn.init.normal_(norm.weight)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.norm(x)) ** 2).mean(1))


def NormTwice(make):  # noqa: N802
    return lambda: Normed(make())


class Autoencoder(nn.Module):
    """A weight and its transpose."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)))


class SharedBias(nn.Module):
    """One bias in two layers whose inputs differ in width."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class BilinearOfItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.layer(x, torch.tanh(x))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(input=x)))


class TimeFirst(nn.Module):
    """A linear layer on (T, N, D): its first dimension is not the samples."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        # Positions weigh differently: with a plain mean, time and samples could be swapped unnoticed.
        found = torch.tanh(self.layer(x.transpose(0, 1)))
        weights = torch.linspace(1, 2, len(found), dtype=x.dtype)
        return self.head((weights[:, None, None] * found).mean(0))


def trained_statistics(norm):
    """A norm with running statistics, scale and shift that are not those it starts with."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def frozen(module, *names):
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def image(*layers, width):
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten(), nn.Linear(width, 3))


def conv(kind, *arguments, **options):
    return lambda: kind(*arguments, **options)


# name: (make the network, shape of one input, parameters that go the general way)
NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), ()),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)), (4,), ()),
    "linear on sequences": (lambda: Pooled(nn.Linear(4, 5), 5), (6, 4), ()),
    "linear on grids": (
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 3, 4),
        (),
    ),
    "conv1d": (image(conv(nn.Conv1d, 2, 3, 3, padding=1), nn.ReLU, width=21), (2, 7), ()),
    "conv1d same, even kernel": (image(conv(nn.Conv1d, 2, 3, 4, padding="same", dilation=2), width=21), (2, 7), ()),
    "conv1d valid": (image(conv(nn.Conv1d, 2, 3, 3, padding="valid"), width=15), (2, 7), ()),
    "conv2d": (image(conv(nn.Conv2d, 2, 3, 3, padding=1), nn.Tanh, width=48), (2, 4, 4), ()),
    "conv2d stride": (image(conv(nn.Conv2d, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), width=24), (2, 4, 5), ()),
    "conv2d dilation": (image(conv(nn.Conv2d, 2, 3, 2, dilation=2, bias=False), width=12), (2, 4, 4), ()),
    "conv2d groups": (image(conv(nn.Conv2d, 4, 6, 3, groups=2), nn.ReLU, width=24), (4, 4, 4), ()),
    "conv2d depthwise": (image(conv(nn.Conv2d, 3, 6, 2, groups=3), nn.ReLU, width=54), (3, 4, 4), ()),
    "conv2d circular": (
        image(conv(nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode="circular"), width=72),
        (2, 4, 4),
        (),
    ),
    "conv2d reflect": (image(conv(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="reflect"), width=48), (2, 4, 4), ()),
    "conv2d replicate": (
        image(conv(nn.Conv2d, 2, 3, 2, padding="same", padding_mode="replicate"), width=48),
        (2, 4, 4),
        (),
    ),
    "conv3d": (image(conv(nn.Conv3d, 2, 3, 2, stride=(1, 2, 1)), nn.Tanh, width=12), (2, 3, 4, 2), ()),
    "conv to one position": (image(conv(nn.Conv2d, 2, 5, 4), nn.Tanh, width=5), (2, 4, 4), ()),
    "two convs": (
        image(conv(nn.Conv2d, 1, 3, 3), nn.ReLU, conv(nn.MaxPool2d, 2), conv(nn.Conv2d, 3, 4, 2), width=16),
        (1, 8, 8),
        (),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), trained_statistics(nn.BatchNorm1d(5)), nn.ReLU(), nn.Linear(5, 3)),
        (4,),
        (),
    ),
    "batch norm 2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), trained_statistics(nn.BatchNorm2d(3)), nn.Flatten(), nn.Linear(27, 3)
        ),
        (2, 4, 4),
        (),
    ),
    "layer norm": (lambda: Pooled(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), 5), (6, 4), ()),
    "layer norm of two axes": (lambda: Pooled(nn.LayerNorm((3, 4), bias=False), 4), (3, 4), ()),
    "group norm": (image(conv(nn.Conv2d, 2, 6, 2), conv(nn.GroupNorm, 3, 6), nn.ReLU, width=54), (2, 4, 4), ()),
    "lstm": (
        lambda: Pooled(nn.LSTM(4, 3, batch_first=True), 3),
        (5, 4),
        ("inner.weight_ih_l0", "inner.weight_hh_l0", "inner.bias_ih_l0", "inner.bias_hh_l0"),
    ),
    "attention": (
        lambda: Pooled(Attention(), 4),
        (5, 4),
        (
            "inner.attention.in_proj_weight",
            "inner.attention.in_proj_bias",
            "inner.attention.out_proj.weight",
            "inner.attention.out_proj.bias",
        ),
    ),
    "tied": (Tied, (4,), ()),
    "tied outside": (TiedOutside, (4,), ("first.weight", "first.bias", "second.bias")),
    "twice": (Twice, (4,), ()),
    "twice, one call by keyword": (TwiceByKeyword, (4,), ("layer.weight", "layer.bias")),
    "unrolled": (Unrolled, (5, 4), ()),
    "positions of two lengths": (TwoLengths, (6, 4), ()),
    "conv at two strides": (TwoStrides, (4, 6, 6), ()),
    "layer norm twice": (NormTwice(lambda: nn.LayerNorm(4)), (5, 4), ()),
    "batch norm twice": (NormTwice(lambda: trained_statistics(nn.BatchNorm1d(5))), (5, 4), ()),
    "autoencoder": (Autoencoder, (4,), ("encoder.weight", "encoder.bias")),
    "tied, frozen bias": (lambda: frozen(Tied(), "second.bias"), (4,), ()),
    "tied, frozen weight": (lambda: frozen(Tied(), "first.weight"), (4,), ()),
    "bias of two shapes of layers": (SharedBias, (4,), ("first.bias",)),
    "rms norm": (lambda: Pooled(nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5)), 5), (6, 4), ()),
    "instance norm": (
        image(conv(nn.Conv2d, 2, 3, 2), conv(nn.InstanceNorm2d, 3, affine=True), width=27),
        (2, 4, 4),
        (),
    ),
    "instance norm, running": (
        image(
            conv(nn.Conv2d, 2, 3, 2),
            lambda: trained_statistics(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
            width=27,
        ),
        (2, 4, 4),
        (),
    ),
    "transposed conv": (
        image(conv(nn.ConvTranspose2d, 2, 3, 2, stride=2), nn.Tanh, width=108),
        (2, 3, 3),
        ("0.weight", "0.bias"),
    ),
    "bilinear": (BilinearOfItself, (4,), ("layer.weight", "layer.bias")),
    "conv3d groups, dilated": (
        image(conv(nn.Conv3d, 4, 2, 2, groups=2, dilation=(1, 2, 1), stride=(2, 1, 1)), width=8),
        (4, 3, 4, 3),
        (),
    ),
    "conv1d groups, dilated": (
        image(conv(nn.Conv1d, 4, 6, 3, groups=2, dilation=2, stride=2), nn.Tanh, width=18),
        (4, 9),
        (),
    ),
    "by keyword": (ByKeyword, (4,), ("layer.weight", "layer.bias")),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
        ("0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
    "in-place relu": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 3)),
        (4,),
        (),
    ),
    "frozen weight": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), "0.weight", "2.bias"),
        (4,),
        (),
    ),
    "frozen conv weight": (
        lambda: frozen(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)), "0.weight"),
        (2, 4, 4),
        (),
    ),
    "frozen norm scale": (
        lambda: frozen(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), "1.weight"),
        (4,),
        (),
    ),
    "time first": (TimeFirst, (4, 4), ("layer.weight", "layer.bias")),
    "time first, T == N": (TimeFirst, (7, 4), ("layer.weight", "layer.bias")),
    "a layer that nothing uses": (
        lambda: nn.Sequential(nn.Linear(4, 3), Apply(lambda x: x)).append(nn.Identity()),
        (4,),
        (),
    ),
}


def problem(name, num_samples=7):
    make, shape, general = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    return net, (torch.randn(num_samples, *shape, dtype=torch.float64), torch.randint(3, (num_samples,))), general


@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_and_ntk_of_every_layer(name):
    net, data, general = problem(name)
    ggn, ntk = ggn_spectrum(net, cross_entropy, data), ntk_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(ggn, dense_ggn(net, cross_entropy, [data]))
    assert_same_eigenvalues(ntk, dense_ntk(net, [data]))
    # Which route was taken: a layer that loses its shortcut is still right, but slow.
    assert sorted(ggn.settings.get("general_route", ())) == sorted(general)
    assert sorted(ntk.settings.get("general_route", ())) == sorted(general)


@pytest.mark.parametrize("name", ["conv2d groups", "batch norm", "lstm", "twice", "time first, T == N"])
def test_batches_and_the_first_samples(name):
    net, _, _ = problem(name)
    batches = [problem(name, num_samples)[1] for num_samples in (7, 3, 7)]
    batches = [(inputs + index, targets) for index, (inputs, targets) in enumerate(batches)]
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches), dense_ggn(net, cross_entropy, batches))
    # 18 rows are 9 samples of two columns each: the first batch and two of the second.
    first = ggn_spectrum(net, cross_entropy, batches, method="exact", max_rows=18)
    used = [batches[0], (batches[1][0][:2], batches[1][1][:2])]
    assert first.num_samples == 9
    assert_same_eigenvalues(first, dense_ggn(net, cross_entropy, used))
    assert_same_eigenvalues(
        ntk_spectrum(net, cross_entropy, batches, method="exact", max_rows=27), dense_ntk(net, used)
    )


def test_embedding():
    torch.manual_seed(0)
    net = Pooled(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh()), 5).double()
    data = torch.randint(9, (6, 5)), torch.randint(3, (6,))
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, [data]))
    assert "general_route" not in spectrum.settings
    assert_same_eigenvalues(ntk_spectrum(net, cross_entropy, data), dense_ntk(net, [data]))


def test_embedding_with_padding_and_repeated_tokens():
    torch.manual_seed(0)
    net = Pooled(nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 5), nn.Tanh()), 5).double()
    batches = [
        (torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0], [3, 2, 1, 3]]), torch.tensor([0, 2, 1])),
        (torch.tensor([[2, 2], [0, 3]]), torch.tensor([1, 0])),
    ]
    spectrum = ggn_spectrum(net, cross_entropy, batches)
    assert "general_route" not in spectrum.settings
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, batches))
    assert_same_eigenvalues(ntk_spectrum(net, cross_entropy, batches), dense_ntk(net, batches))
    embedding_only = dense_ggn(net, cross_entropy, batches, [net.inner[0].weight])
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches, params="inner.0.*"), embedding_only)


class TiedHead(nn.Module):
    """Token embeddings that are also the weights of the output head, over a layer in between."""

    def __init__(self, padding_idx=None, bias=True, positions=False):
        super().__init__()
        self.table, self.body = nn.Embedding(5, 3, padding_idx=padding_idx), nn.Linear(3, 3)
        self.head, self.positions = nn.Linear(3, 5, bias=bias), positions
        self.head.weight = self.table.weight

    def forward(self, tokens):
        found = torch.tanh(self.body(self.table(tokens)))
        return self.head(found).mT if self.positions else self.head(found.mean(1))


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"padding_idx": 2}])
def test_tied_embedding(options, positions, monkeypatch):
    torch.manual_seed(0)
    net = TiedHead(**options, positions=positions).double()
    batches = [(torch.randint(5, (n, 4)), torch.randint(5, (n, 4) if positions else (n,))) for n in (6, 4)]
    spectrum, kernel = ggn_spectrum(net, cross_entropy, batches), ntk_spectrum(net, cross_entropy, batches)
    assert "general_route" not in spectrum.settings
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, batches))
    assert_same_eigenvalues(kernel, dense_ntk(net, batches))
    table = dense_ggn(net, cross_entropy, batches, [net.table.weight])
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches, params="table.*"), table)
    monkeypatch.setattr(shares, "ROW_CHUNK", 3)  # a sample at a time
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches, params="table.*"), table)


def test_tied_embedding_that_renormalises_goes_the_general_way():
    torch.manual_seed(0)
    net = TiedHead().double()
    net.table.max_norm = 0.5
    data = torch.randint(5, (6, 4)), torch.randint(5, (6,))
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert "table.weight" in spectrum.settings["general_route"]
    net(data[0])  # renormalises
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, [data]))


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_embeddings_that_do_more_than_look_up_go_the_general_way(options):
    torch.manual_seed(0)
    net = Pooled(nn.Sequential(nn.Embedding(4, 3, **options), nn.Linear(3, 5), nn.Tanh()), 5).double()
    data = torch.tensor([[1, 1, 2], [0, 3, 3]]), torch.tensor([0, 2])
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert spectrum.settings["general_route"] == ["inner.0.weight"]
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, [data]))


def test_batch_norm_that_mixes_samples():
    # With batch statistics a sample's output depends on the others: no layer before the norm has rows of its own.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    spectrum = ggn_spectrum(net, cross_entropy, data, mode="as_is")
    assert spectrum.settings["general_route"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert_same_eigenvalues(spectrum, dense_ggn(net, cross_entropy, [data]))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("0.weight", ["0.weight"]),
        (["*.bias"], ["0.bias", "3.bias", "5.bias"]),
        (["3.*", "0.bias"], ["0.bias", "3.weight", "3.bias"]),
    ],
)
def test_a_subset_of_the_parameters(params, names):
    net, data, _ = problem("two convs")
    truth = dense_ggn(net, cross_entropy, [data], [net.get_parameter(name) for name in names])
    assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, data, params=params), truth)


def test_sequences_of_several_lengths():
    # Shorter sequences have fewer positions in every layer, and fewer columns where each position is an output.
    torch.manual_seed(0)
    tagger = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3), Apply(lambda x: x.mT)).double()
    pooled = Pooled(nn.Linear(4, 5), 5).double()
    lengths = (4, 6, 3)
    inputs = [torch.randn(3, length, 4, dtype=torch.float64) for length in lengths]
    # A mean over the targets: batches of longer sequences weigh more in the tagger.
    for net, targets in (
        (tagger, [torch.randint(3, (3, length)) for length in lengths]),
        (pooled, [torch.randint(3, (3,)) for _ in lengths]),
    ):
        batches = list(zip(inputs, targets, strict=True))
        total = sum(target.numel() for target in targets)
        dense = sum(batch[1].numel() / total * dense_ggn(net, cross_entropy, [batch]) for batch in batches)
        assert_same_eigenvalues(ggn_spectrum(net, cross_entropy, batches), dense)


def test_float32_agrees_to_its_resolution():
    net, data, _ = problem("two convs")
    truth = expanded(ggn_spectrum(net, cross_entropy, data))
    single = ggn_spectrum(net.float(), cross_entropy, (data[0].float(), data[1]))
    assert single.settings["dtype"] == "float32"
    assert single.resolution == pytest.approx(1e-6 * float(truth.max()), rel=1e-3)
    assert float((expanded(single) - truth).abs().max()) < single.resolution


def test_outputs_of_another_precision_than_the_layers():
    net, data, _ = problem("mlp")
    truth = expanded(ggn_spectrum(net, cross_entropy, data))
    mixed = nn.Sequential(net.float(), Apply(lambda x: x.double()))
    spectrum = ggn_spectrum(mixed, cross_entropy, (data[0].float(), data[1]))
    assert "general_route" not in spectrum.settings
    assert spectrum.settings["dtype"] == "float32"
    assert float((expanded(spectrum) - truth).abs().max()) < spectrum.resolution
