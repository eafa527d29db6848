"""Products on graphs that are made anew, joined and cut batches: the same Hessian, and nothing is disturbed."""

import pytest
import torch
from problems import CubeNet, CubeOnce, classes, cross_entropy, dense_hessian, mlp
from states import state
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import Measured, MeasurementError, measure_hessian
from lightning_plasticity.curvature.hessian import measure as hessian_measure
from lightning_plasticity.curvature.hessian.plan import HessianPlan
from lightning_plasticity.curvature.hessian.problem import cut, joined, opened
from lightning_plasticity.nn.undisturbed import is_measuring


def generator():
    return torch.Generator().manual_seed(0)


def products(measured, chunk, count=3):
    """A few products, the probe's among them."""
    parameters = measured.parameters()
    vectors = torch.randn(count, sum(p.numel() for p in parameters), generator=generator())
    vectors = vectors.to(parameters[0].dtype)
    with opened(measured, parameters, generator(), chunk=chunk) as problem:
        found = torch.stack([problem.product, *(problem.operator.matvec(vector) for vector in vectors)])
        assert problem.num_samples == sum(len(batch[1]) for batch in measured.batches)
        return found, vectors, problem.probe


def split(data, *sizes):
    return list(zip(*(part.split(sizes) for part in data), strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 7, 13, 99])
@pytest.mark.parametrize("sizes", [(20,), (13, 7), (3, 8, 9)])
def test_rebuilt_products_are_those_of_the_dense_hessian(sizes, chunk):
    net, data = mlp(4, 6, 5, 3), classes(20, 4, 3)
    dense = dense_hessian(net, F.cross_entropy, *data)
    found, vectors, probe = products(Measured(net, split(data, *sizes), cross_entropy), chunk)
    torch.testing.assert_close(found, torch.stack([probe, *vectors]) @ dense, rtol=1e-9, atol=1e-12)
    kept, _, _ = products(Measured(net, split(data, *sizes), cross_entropy), None)
    torch.testing.assert_close(found, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["weights", "ignored", "sum", "mse sum"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_losses_that_are_not_plain_means(name, chunk):
    net, (inputs, labels) = mlp(4, 6, 3), classes(20, 4, 3)
    weight = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
    labels[:9] = 1  # a chunk whose samples are all ignored, or all of one weight
    loss, targets = {
        "weights": (lambda o, t: F.cross_entropy(o, t, weight=weight), labels),
        "ignored": (lambda o, t: F.cross_entropy(o, t, ignore_index=2), labels),
        "sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), labels),
        "mse sum": (lambda o, t: F.mse_loss(o, t, reduction="sum"), torch.randn(20, 3, dtype=torch.float64)),
    }[name]
    dense = dense_hessian(net, loss, inputs, targets)
    found, vectors, probe = products(Measured(net, split((inputs, targets), 13, 7), loss), chunk)
    torch.testing.assert_close(found, torch.stack([probe, *vectors]) @ dense, rtol=1e-9, atol=1e-11)


def contrastive(outputs, targets):
    """Couples all samples of a batch."""
    return torch.logsumexp(outputs @ outputs.T, 1).mean() + outputs.mean()


def test_batches_are_joined_and_cut_only_where_the_loss_stays_the_same():
    net, data = mlp(4, 6, 3), classes(20, 4, 3)
    parts, whole = split(data, 13, 7), [data]
    plain = Measured(net, parts, cross_entropy)
    assert [len(batch[1]) for batch in joined(plain).batches] == [20]
    assert [len(batch[1]) for batch in cut(plain, 6).batches] == [6, 6, 1, 6, 1]
    assert cut(plain, 13) is plain
    for mixing in (Measured(net, parts, contrastive), Measured(net, parts, cross_entropy, mode="as_is")):
        assert joined(mixing) is mixing
        assert cut(mixing, 6) is mixing
    # Kept or rebuilt, such a loss is the weighted mean of its batches'.
    dense = sum(len(y) / 20 * dense_hessian(net, contrastive, x, y) for x, y in parts)
    for chunk in (None, 4):
        found, vectors, probe = products(Measured(net, parts, contrastive), chunk)
        torch.testing.assert_close(found, torch.stack([probe, *vectors]) @ dense, rtol=1e-8, atol=1e-11)
    assert joined(Measured(net, whole, contrastive)).batches is whole


class FixedSize(nn.Module):
    """A step with the batch size written into it."""

    def __init__(self, size, net):
        super().__init__()
        self.size, self.net = size, net

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]).reshape(self.size, 3), batch[1])


def test_a_step_that_insists_on_its_batch_size():
    net, data = mlp(4, 6, 3), classes(20, 4, 3)
    measured = Measured(FixedSize(10, net), split(data, 10, 10))
    assert joined(measured) is measured
    assert cut(measured, 3) is measured
    dense = dense_hessian(net, F.cross_entropy, *data)
    for chunk in (None, 3):
        found, vectors, probe = products(measured, chunk)
        torch.testing.assert_close(found, torch.stack([probe, *vectors]) @ dense, rtol=1e-9, atol=1e-12)


class Stateful(nn.Module):
    """Carries a hidden state from batch to batch, and a running average of its weights."""

    def __init__(self):
        super().__init__()
        self.inner = mlp(6, 5, 3)
        self.register_buffer("state", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def training_step(self, batch):
        x, y = batch
        outputs = self.inner(torch.cat([x, self.state.expand(len(x), 2)], 1))
        self.state = 0.5 * self.state + x.mean(0)[:2]
        self.average.lerp_(self.inner[0].weight.detach().mean(), 0.1)
        return F.cross_entropy(outputs, y) * (1 + self.average)


def noisy(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))
    return net.to(dtype)


@pytest.mark.parametrize("case", ["state", "dropout", "frozen"])
def test_rebuilt_products_are_kept_ones_bit_for_bit(case):
    # In the same batches: one context for all of them, so that state and random draws go on from batch to batch.
    batches = split(classes(20, 4, 3), 13, 7)
    net = Stateful() if case == "state" else noisy()
    loss_fn, mode = None if case == "state" else cross_entropy, "frozen" if case == "frozen" else "as_is"
    if case == "frozen":
        batches = [classes(20, 4, 3)]
    before = state(net)
    measured = Measured(net, batches, loss_fn, mode=mode, seed=5)
    kept, vectors, _ = products(measured, None)
    rebuilt, _, _ = products(measured, 99)
    assert torch.equal(kept, rebuilt)
    assert state(net) == before
    # One fixed draw: the operator is symmetric.
    left, right = float(kept[1] @ vectors[1]), float(kept[2] @ vectors[0])
    assert left == pytest.approx(right, rel=1e-9)


class FailsLater(nn.Module):
    """Fails in the forward pass after a number of them, in the middle of changing itself."""

    def __init__(self, after):
        super().__init__()
        self.net, self.norm, self.after, self.count = mlp(4, 5, 3), nn.BatchNorm1d(4).double(), after, 0

    def training_step(self, batch):
        counts.append(1)
        self.count += 1
        self.net[0].weight.data.mul_(1.1)
        if len(counts) > self.after:
            raise ZeroDivisionError
        return F.cross_entropy(self.net(self.norm(batch[0])), batch[1])


counts = []


@pytest.mark.parametrize("chunk", [None, 99])
@pytest.mark.parametrize("after", range(9))
def test_an_error_leaves_the_module_as_it_was(after, chunk):
    counts.clear()
    net = FailsLater(after)
    before = state(net)
    measured = Measured(net, split(classes(20, 4, 3), 13, 7), mode="as_is")
    if chunk is None and after >= 2:
        return
    with pytest.raises(ZeroDivisionError):
        products(measured, chunk, count=5)
    assert state(net) == before
    assert not is_measuring()


def test_an_error_in_the_backward_pass_of_a_rebuilt_product():
    net = CubeNet(Failing).double()
    before = state(net)
    measured = Measured(net, [classes(20, 4, 3)], cross_entropy)
    Failing.left = 3
    with pytest.raises(ZeroDivisionError):
        products(measured, 99)
    assert state(net) == before
    assert not is_measuring()


class Failing(torch.autograd.Function):
    """x^3, whose backward pass fails after a while."""

    left = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        Failing.left -= 1
        if not Failing.left:
            raise ZeroDivisionError
        return 3 * gradient * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("dead", [0, 2, 6])
def test_dead_coordinates_are_left_out_of_the_vectors(dead):
    net, data = mlp(4, 8, 3, activation=nn.ReLU), classes(30, 4, 3)
    net[0].bias.data[:dead] = -100.0
    dense = dense_hessian(net, F.cross_entropy, *data)
    live = (dense != 0).any(1)
    with opened(Measured(net, [data], cross_entropy), list(net.parameters()), generator()) as problem:
        assert torch.equal(problem.live, live)
        matvec, start, product = problem.on_live()
        short = float(live.double().mean()) < 0.8
        assert len(start) == (int(live.sum()) if short else len(live))
        torch.testing.assert_close(matvec(start), product, rtol=1e-10, atol=1e-13)
        vector = torch.randn(len(start), generator=generator(), dtype=torch.float64)
        part = dense[live][:, live] if short else dense
        torch.testing.assert_close(matvec(vector), part @ vector, rtol=1e-9, atol=1e-12)
        again = matvec(vector).clone()
        assert torch.equal(matvec(vector), again)  # what is kept between products is overwritten
        problem.forget_vectors()
        assert (problem.num_live, len(problem.probe)) == (int(live.sum()), 0)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("basis", ["full", "float16", "none"])
def test_wrong_double_backward_is_refused_on_every_route(basis, chunk):
    torch.manual_seed(0)
    inputs, targets = classes(30, 4, 3)
    measured = Measured(CubeNet(CubeOnce), [(inputs.float(), targets)], cross_entropy)
    with pytest.raises(MeasurementError, match="not symmetric"):
        measure_hessian(measured, method="lanczos", plan=HessianPlan(30, 20, basis, chunk))


@pytest.mark.parametrize("chunk", [None, 8])
def test_a_hessian_of_nothing_but_rounding_is_not_called_asymmetric(chunk, monkeypatch):
    # An over-confident network that fits its data: whatever its asymmetry, it is below what rounding makes of |J|^2.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    inputs = torch.randn(300, 4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 30
        logits = net(inputs)
        margins = logits.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
        sure = margins.argsort(descending=True)[(margins > 14).sum() - 30 :][:30]
    inputs, labels = inputs[sure], logits[sure].argmax(1)
    found = hessian_measure.lanczos
    monkeypatch.setattr(hessian_measure, "lanczos", lambda *a, **k: _asymmetric(found(*a, **k)))
    measured = Measured(net, [(inputs, labels)], cross_entropy)
    with opened(measured, list(net.parameters()), generator(), chunk=chunk) as problem:
        margin = problem.size / problem._loss_rounding()
    if margin < 10:
        measure_hessian(measured, method="lanczos", plan=HessianPlan(30, 20, "full", chunk))
    else:
        pytest.fail(f"the premise does not hold: {margin}")


def _asymmetric(run):
    return type(run)(run.alpha, run.beta, run.breakdown, None, run.num_products, asymmetry=0.5)
