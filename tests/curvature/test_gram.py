"""GGN and NTK: every loss against autograd, the reference vectors, and what is refused."""

import numpy as np
import pytest
import torch
from losses import LABELS, LOSSES, REAL, SHARES, WEIGHTS, C, N, loss_of, problem
from problems import assert_same_eigenvalues, classes, cross_entropy, dense_ggn, dense_ntk, expanded, from_vectors, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import (
    LossClosure,
    MeasurementError,
    OutputLoss,
    ggn_spectrum,
    hessian_spectrum,
    ntk_spectrum,
)

CASES = ("a_fresh", "a_dead", "b_fresh", "b_rank1", "c_fresh", "c_huge", "d_uneven_batch")


@pytest.mark.parametrize("name", LOSSES)
def test_ggn_of_every_loss(name):
    net, loss_fn, data = problem(name)
    truth = dense_ggn(net, loss_fn, [data])
    if name.startswith("nll"):  # its GGN is taken through the softmax, as that of the same cross-entropy
        weight = WEIGHTS if "weights" in name else None
        truth = dense_ggn(net, loss_of(F.cross_entropy, weight=weight), [data])
    assert_same_eigenvalues(ggn_spectrum(net, loss_fn, data), truth)
    # The kernel is that of the outputs that the loss function sees.
    seen = nn.Sequential(net, nn.LogSoftmax(1)) if name.startswith("nll") else net
    assert_same_eigenvalues(ntk_spectrum(net, loss_fn, data), dense_ntk(seen, [data]))


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("nll")])
def test_output_factor_is_a_square_root_of_the_hessian(name):
    net, loss_fn, data = problem(name)
    output_loss = LossClosure(net, loss_fn)(data).output_loss
    outputs = output_loss.outputs.detach()
    factor = output_loss.hessian_root().columns()
    assert factor.shape[1:] == outputs.shape
    # Each column belongs to one sample: between samples there is nothing.
    flat = factor.reshape(len(factor), N, -1)
    blocks = torch.einsum("rni,rnj->nij", flat, flat)
    truth = torch.autograd.functional.hessian(lambda values: loss_fn(values, data[1]), outputs)
    truth = truth.reshape(N, flat.shape[2], N, flat.shape[2])
    expected = torch.zeros_like(truth)
    for sample, block in enumerate(blocks):
        expected[sample, :, sample] = block
    # The generic route takes the root of a matrix: errors of 1e-16 in its eigenvalues, relative to the largest.
    torch.testing.assert_close(expected, truth, rtol=1e-10, atol=1e-14)


def test_softmax_needs_one_column_less_than_classes():
    net, loss_fn, data = problem("cross entropy")
    assert len(LossClosure(net, loss_fn)(data).output_loss.hessian_root().columns()) == C - 1
    assert ggn_spectrum(net, loss_fn, data).settings["rows"] == N * (C - 1)


def test_losses_in_float32():
    # Losses that hold float32 tensors of their own, and those whose float32 targets meet float64 outputs.
    net = mlp(5, 6, C).float()
    inputs = torch.randn(N, 5, generator=torch.Generator().manual_seed(2))
    weight = WEIGHTS.float()
    cases = {
        "huber": (F.huber_loss, REAL.float()),
        "bce of probabilities": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), SHARES.float()),
        "own tensor": (lambda o, t: 2 * F.cross_entropy(o, t, weight=weight), LABELS),
    }
    for loss_fn, targets in cases.values():
        spectrum = ggn_spectrum(net, loss_fn, (inputs, targets))
        truth = torch.linalg.eigvalsh(dense_ggn(net, loss_fn, [(inputs, targets)]).double())
        torch.testing.assert_close(expanded(spectrum), truth, rtol=0, atol=2e-6 * float(truth.max()))


# All that is left of p - p^2 is rounding, of either sign and not symmetric: not a reason to call the loss concave, the
# samples mixed, or a layer wrong.
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, lambda o, t: -F.log_softmax(o, 1).gather(1, t[:, None]).mean()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_over_confident_networks_are_not_refused(loss_fn, dtype, seed):
    net = mlp(3, 8, 4, activation=nn.ReLU, seed=seed)
    for parameter in net.parameters():
        parameter.data *= 50
    inputs, _ = classes(20, 3, 4)
    net, inputs = net.to(dtype), inputs.to(dtype)
    data = (inputs, net(inputs).argmax(1))
    largest = float(ntk_spectrum(net, loss_fn, data).lambda_max().value)
    assert ggn_spectrum(net, loss_fn, data).max_abs < 1e-2 * largest
    assert hessian_spectrum(net, loss_fn, data).max_abs < 1e-2 * largest


def contrastive(outputs, targets):
    return torch.logsumexp(outputs @ outputs.T, 1).mean()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, t: torch.cos(o).mean(), r"is not convex in the outputs .*Measure the Hessian: hessian_spectrum"),
        (contrastive, r"mixes samples .*Measure the Hessian: hessian_spectrum"),
        (lambda o, t: (o * REAL).mean(), r"is linear in the outputs.*Measure the Hessian: hessian_spectrum"),
        (lambda o, t: F.nll_loss(o, t), r"not log-probabilities.*Call cross_entropy on the logits"),
    ],
)
def test_losses_without_a_ggn_are_refused_with_advice(loss_fn, message):
    net, _, data = problem("cross entropy")
    with pytest.raises(MeasurementError, match=f"(?s){message}"):
        ggn_spectrum(net, loss_fn, data)
    hessian_spectrum(net, loss_fn, data)  # what the message advises


@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
def test_one_sample_without_a_batch_dimension(function):
    net = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(0))
    with pytest.raises(MeasurementError, match=r"outputs of shape \(4,\).*unsqueeze\(0\)"):
        ggn_spectrum(net, function, (torch.ones(3), torch.tensor(1)))


def test_one_class_has_no_curvature():
    net = mlp(3, 4, 1)
    data = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    spectrum = ggn_spectrum(net, cross_entropy, data)
    assert (spectrum.num_params, spectrum.max_abs, spectrum.num_samples) == (21, 0.0, 5)
    assert_same_eigenvalues(ntk_spectrum(net, cross_entropy, data), dense_ntk(net, [data]))


def test_targets_in_a_dict_are_cut_with_the_samples():
    net, _, (inputs, targets) = problem("cross entropy")
    nested = {"label": targets, "scale": torch.tensor(2.0, dtype=torch.float64)}
    loss_fn = lambda o, t: t["scale"] * F.cross_entropy(o, t["label"])  # noqa: E731
    spectrum = ggn_spectrum(net, loss_fn, [(inputs, nested)], method="exact", max_rows=2 * C)
    assert spectrum.num_samples == 2
    doubled = lambda o, t: 2 * F.cross_entropy(o, t)  # noqa: E731
    assert_same_eigenvalues(spectrum, dense_ggn(net, doubled, [(inputs[:2], targets[:2])]))


def test_first_samples_keep_their_own_weights():
    targets, weight = SHARES, REAL.abs()
    loss = OutputLoss(F.binary_cross_entropy_with_logits, REAL, targets, {"weight": weight, "reduction": "mean"})
    first = loss.first(2)
    expected = F.binary_cross_entropy_with_logits(REAL[:2], targets[:2], weight=weight[:2])
    assert first.num_samples == 2
    assert float(first.value(first.outputs)) == pytest.approx(float(expected))
    assert loss.first(N) is loss.first(N + 1) is loss


@pytest.mark.parametrize("case", CASES)
def test_reference_spectra(vectors, case):
    arrays = vectors(f"hessian_{case}")
    net, data = from_vectors(arrays)
    ggn, ntk = ggn_spectrum(net, cross_entropy, data), ntk_spectrum(net, cross_entropy, data)
    # c_huge: its outputs are so sure that the GGN is rounding, of curvatures of 1e-16 times the NTK; so absolutely.
    floor = 1e-16 * arrays["ntk_gram_eigs"].max() if case == "c_huge" else 1e-13 * arrays["ggn_eigs"].max()
    np.testing.assert_allclose(expanded(ggn), np.sort(arrays["ggn_eigs"]), rtol=1e-9, atol=floor)
    num_params = ggn.num_params
    gram = np.sort(arrays["loss_weighted_gram_eigs"])[-num_params:]
    np.testing.assert_allclose(expanded(ggn)[-len(gram) :], gram, rtol=1e-9, atol=floor)
    kernel = np.sort(arrays["ntk_gram_eigs"])[-num_params:]
    np.testing.assert_allclose(expanded(ntk)[-len(kernel) :], kernel, rtol=1e-9, atol=1e-13 * kernel.max())
    # theory: the rank is at most N (C - 1), and the softmax's shifts of the last layer are lost.
    num_classes = len(arrays["param_" + str(sum(k.startswith("param_") for k in arrays) - 1)])
    shifts = net[-1].in_features + 1
    assert ggn.epsilon_rank(1e-10, relative=True).value <= min(num_params - shifts, len(data[1]) * (num_classes - 1))


def test_two_uneven_batches_are_one(vectors):
    arrays = vectors("hessian_d_uneven_batch")
    net, (inputs, targets) = from_vectors(arrays)
    batches = [(inputs[:100], targets[:100]), (inputs[100:], targets[100:])]
    for function in (ggn_spectrum, ntk_spectrum, hessian_spectrum):
        one, two = (expanded(function(net, cross_entropy, data)) for data in ((inputs, targets), batches))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13 * float(one.max()))
    # Not the mean of the batches' GGNs: that one is further off than any of the tolerances here.
    equal = 0.5 * sum(dense_ggn(net, cross_entropy, [batch]) for batch in batches)
    assert (
        float((torch.linalg.eigvalsh(equal) - expanded(ggn_spectrum(net, cross_entropy, batches))).abs().max()) > 1e-3
    )


def test_the_same_seed_gives_the_same_spectrum():
    net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, C)).double()
    data = problem("cross entropy")[2]
    first, second, other = (ggn_spectrum(net, cross_entropy, data, mode="as_is", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert not torch.equal(first.eigenvalues, other.eigenvalues)
