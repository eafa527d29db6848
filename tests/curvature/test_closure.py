"""Which loss is measured: the module's hooks, a loss function, or what its training step is seen to call."""

import re

import pytest
import torch
from problems import assert_same_eigenvalues, classes, dense_ggn, dense_hessian, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import LossClosure, MeasurementError, ggn_spectrum, hessian_spectrum, ntk_spectrum

DATA = classes(12, 4, 3)


class Module(nn.Module):
    """A network with a training step, given as a function of (module, batch)."""

    def __init__(self, step=None, **hooks):
        super().__init__()
        self.net, self.step = mlp(4, 5, 3), step
        for name, hook in hooks.items():
            object.__setattr__(self, name, lambda batch, hook=hook: hook(self, batch))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)


def outputs_of(module, batch):
    return module(batch[0])


def with_penalty(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1]) + 0.1 * module.net[0].weight.square().sum()


def logged_too(module, batch):
    """Two losses are computed, one is returned."""
    outputs = module(batch[0])
    F.mse_loss(outputs, torch.zeros_like(outputs))
    return F.cross_entropy(outputs, batch[1])


def computed_twice(module, batch):
    outputs = module(batch[0])
    F.cross_entropy(outputs, batch[1])
    return F.cross_entropy(outputs, batch[1])


# name: (step, name of the loss found)
FOUND = {
    "functional": (lambda m, b: F.cross_entropy(m(b[0]), b[1]), "cross_entropy"),
    "module": (lambda m, b: nn.CrossEntropyLoss()(m(b[0]), b[1]), "cross_entropy"),
    "keywords": (lambda m, b: F.cross_entropy(target=b[1], input=m(b[0])), "cross_entropy"),
    "dict": (lambda m, b: {"loss": F.cross_entropy(m(b[0]), b[1]), "more": 1}, "cross_entropy"),
    "none, then mean": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").mean(), "cross_entropy"),
    "nll": (lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), 1), b[1]), "nll_loss"),
    "logged too": (logged_too, "cross_entropy"),
    "computed twice": (computed_twice, "cross_entropy"),
    "shape (1,)": (lambda m, b: F.cross_entropy(m(b[0]), b[1])[None], "cross_entropy"),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_loss_of_a_training_step_is_found(name):
    step, found = FOUND[name]
    module = Module(step)
    evaluation = LossClosure(module)(DATA)
    assert evaluation.note == ""
    assert evaluation.output_loss.name == found
    assert evaluation.num_samples == 12
    assert evaluation.loss.item() == pytest.approx(F.cross_entropy(module(DATA[0]), DATA[1]).item())
    assert evaluation.output_loss.value(evaluation.output_loss.outputs).item() == pytest.approx(evaluation.loss.item())
    assert_same_eigenvalues(ggn_spectrum(module, None, DATA), dense_ggn(module, F.cross_entropy, [DATA]))
    truth = dense_hessian(module.net, F.cross_entropy, *DATA)
    assert_same_eigenvalues(hessian_spectrum(module, None, DATA), truth, rtol=1e-9)


def test_sum_is_found_with_its_scale():
    module = Module(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").sum())
    summed = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    assert_same_eigenvalues(ggn_spectrum(module, None, DATA), dense_ggn(module, summed, [DATA]))


def weighted_mean_by_hand(module, batch):
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    return F.cross_entropy(module(batch[0]), batch[1], weight=weight, reduction="none").mean()


# name: (step, what the note says)
NOT_FOUND = {
    "none": (lambda m, b: m(b[0]).logsumexp(1).mean(), r"calls no loss function that is known here \(binary_cross_"),
    "several": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + F.mse_loss(m(b[0]), b[0][:, :3]),
        r"several loss functions \(cross_entropy, mse_loss\); which one to take is unclear",
    ),
    "reduced by other weights": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").square().mean(),
        r"reduces cross_entropy in a way that is not a mean or a sum",
    ),
    # The function's own mean divides by the sum of the weights; taking it for this mean would scale the GGN wrongly.
    "a mean that is not the function's": (weighted_mean_by_hand, r"reduces cross_entropy in a way that is not"),
    "of detached outputs": (
        lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1]) + m(b[0]).square().mean(),
        r"calls no loss function that is known",
    ),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_not_found_says_what_to_do(name):
    step, message = NOT_FOUND[name]
    module = Module(step)
    hessian_spectrum(module, None, DATA)  # needs no outputs
    for function in (ggn_spectrum, ntk_spectrum):
        with pytest.raises(MeasurementError, match=f"(?s){message}.*Define curvature_outputs.*or pass loss_fn"):
            function(module, None, DATA)


@pytest.mark.parametrize("step", [with_penalty, lambda m, b: 2 * F.cross_entropy(m(b[0]), b[1])])
def test_a_loss_that_is_only_a_part_is_noted(step):
    module = Module(step)
    spectrum = ggn_spectrum(module, None, DATA)
    assert_same_eigenvalues(spectrum, dense_ggn(module, F.cross_entropy, [DATA]))
    sentence, _, rest = spectrum.settings["note"].partition(". ")
    assert "is not just the value of its cross_entropy" in sentence
    assert not any(character.isdigit() for character in sentence)  # so that it warns once, whatever the loss
    assert re.search(r"\(loss [\d.]+, cross_entropy [\d.]+\)$", rest)
    assert "the GGN is that of the cross_entropy alone" in spectrum.settings["note"]
    # The Hessian is that of all of it.
    whole = hessian_spectrum(module, None, DATA).trace().value
    part = hessian_spectrum(module, F.cross_entropy, DATA).trace().value
    assert whole == pytest.approx(part + 0.1 * 2 * 20 if step is with_penalty else 2 * part, rel=1e-9)


def test_loss_fn_goes_before_the_training_step():
    module = Module(lambda m, b: m(b[0]).square().mean())
    spectrum = ggn_spectrum(module, F.cross_entropy, DATA)
    assert_same_eigenvalues(spectrum, dense_ggn(module, F.cross_entropy, [DATA]))


def test_a_loss_fn_of_several_terms_is_taken_as_it_is():
    loss_fn = lambda o, t: 2 * F.cross_entropy(o, t) + 0.1 * o.square().mean()  # noqa: E731
    spectrum = ggn_spectrum(Module(), loss_fn, DATA)
    assert "note" not in spectrum.settings
    assert_same_eigenvalues(spectrum, dense_ggn(Module(), loss_fn, [DATA]))


def test_curvature_loss_goes_before_everything():
    half = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / 2  # noqa: E731
    module = Module(lambda m, b: m(b[0]).mean(), curvature_loss=half)
    loss_fn = lambda o, t: F.cross_entropy(o, t, reduction="sum") / 2  # noqa: E731
    truth = dense_hessian(module.net, loss_fn, *DATA)
    assert_same_eigenvalues(hessian_spectrum(module, None, DATA), truth, rtol=1e-9)
    assert_same_eigenvalues(hessian_spectrum(module, F.mse_loss, DATA), truth, rtol=1e-9)


def test_curvature_loss_of_no_known_function_with_a_loss_fn():
    module = Module(curvature_loss=lambda m, b: m(b[0]).logsumexp(1).mean())
    with pytest.raises(MeasurementError, match="no loss function that is known"):
        ggn_spectrum(module, F.mse_loss, DATA)


def test_curvature_outputs_names_outputs_and_targets():
    module = Module(with_penalty, curvature_outputs=lambda m, b: (m(b[0]), b[1]))
    truth = dense_ggn(module, F.cross_entropy, [DATA])
    spectrum = ggn_spectrum(module, None, DATA)
    assert_same_eigenvalues(spectrum, truth)
    assert "note" not in spectrum.settings
    # With loss_fn, that is the loss in these outputs.
    module = Module(lambda m, b: m(b[0]).mean(), curvature_outputs=lambda m, b: (m(b[0]), b[1]))
    assert_same_eigenvalues(ggn_spectrum(module, F.cross_entropy, DATA), truth)
    with pytest.raises(MeasurementError, match=r"not the loss \(found: none\); pass loss_fn too"):
        ggn_spectrum(module, None, DATA)
    several = lambda m, b: F.cross_entropy(m(b[0]), b[1]) + F.mse_loss(m(b[0]), b[0][:, :3])  # noqa: E731
    module = Module(several, curvature_outputs=lambda m, b: (m(b[0]), b[1]))
    with pytest.raises(MeasurementError, match=r"\(found: cross_entropy, mse_loss\)"):
        ggn_spectrum(module, None, DATA)


class ByName(nn.Module):
    """A dict in, a dict out."""

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 5, 3)

    def forward(self, x, scale):
        return {"logits": self.net(x) * scale}


def test_dict_inputs_and_dict_outputs():
    batch = ({"x": DATA[0], "scale": torch.tensor(1.0, dtype=torch.float64)}, DATA[1])
    loss_fn = lambda outputs, targets: F.cross_entropy(outputs["logits"], targets)  # noqa: E731
    spectrum = ggn_spectrum(ByName(), loss_fn, batch)
    assert_same_eigenvalues(spectrum, dense_ggn(ByName().net, F.cross_entropy, [DATA]))
    # Without a known loss inside, there is nothing to differentiate in a dict.
    with pytest.raises(MeasurementError, match="no loss function that is known"):
        ggn_spectrum(ByName(), lambda outputs, targets: outputs["logits"].logsumexp(1).mean(), batch)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(4, 5, 3)

    def forward(self, left, right):
        return self.net(left + right)


def test_tuple_inputs_are_spread():
    batch = ((DATA[0], torch.zeros_like(DATA[0])), DATA[1])
    truth = dense_hessian(mlp(4, 5, 3), F.cross_entropy, *DATA)
    assert_same_eigenvalues(hessian_spectrum(Two(), F.cross_entropy, [batch]), truth, rtol=1e-9)


class Signature(nn.Module):
    """A training step of any signature, which notes what it was called with."""

    def __init__(self, make):
        super().__init__()
        self.net, self.seen = mlp(4, 5, 3), []
        object.__setattr__(self, "training_step", make(self))

    def loss(self, batch, *indices):
        self.seen.append(indices)
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("make", "indices"),
    [
        (lambda m: lambda batch: m.loss(batch), ()),
        (lambda m: lambda batch, batch_idx: m.loss(batch, batch_idx), (7,)),
        (lambda m: lambda batch, batch_idx, dataloader_idx: m.loss(batch, batch_idx, dataloader_idx), (7, 0)),
        (lambda m: lambda batch, batch_idx=None: m.loss(batch, batch_idx), (7,)),
        (lambda m: lambda batch, batch_idx, dataloader_idx=3: m.loss(batch, batch_idx, dataloader_idx), (7, 0)),
        (lambda m: lambda batch, *args, **kwargs: m.loss(batch, *args), (7,)),
        (lambda m: lambda batch, batch_idx, *, flag=True: m.loss(batch, batch_idx), (7,)),
    ],
)
def test_signatures_of_training_steps(make, indices):
    module = Signature(make)
    assert torch.isfinite(LossClosure(module)(DATA, 7).loss)
    assert module.seen == [indices]


def test_dataloader_iter_is_refused():
    module = Signature(lambda m: lambda dataloader_iter: None)
    with pytest.raises(MeasurementError, match=r"takes a dataloader_iter.*define curvature_loss\(batch\)"):
        LossClosure(module)(DATA)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda m, b: None, r"training_step returned no loss.*define curvature_loss"),
        (lambda m, b: {"value": 1}, r"returned no loss.*a dict with 'loss'"),
        (lambda m, b: m(b[0]), r"returned \(12, 3\), expected a scalar loss; reduce it with \.mean\(\)"),
        (lambda m, b: 0.5, r"returned float, expected a scalar loss"),
        (lambda m, b: m(b[0]).sum().detach(), r"under no_grad, through \.item\(\) or \.detach\(\)"),
        (lambda m, b: m(b[0]).sum() / 0.0, r"loss on the probe data is (-?inf|nan)"),
    ],
)
def test_unusable_losses_say_what_to_do(step, message):
    with pytest.raises(MeasurementError, match=message):
        hessian_spectrum(Module(step), None, DATA)


def test_what_is_missing_is_named():
    with pytest.raises(MeasurementError, match=r"Sequential has no training_step; pass loss_fn"):
        hessian_spectrum(mlp(4, 3), None, DATA)
    with pytest.raises(MeasurementError, match=r"got tuple of 3 items; define curvature_loss"):
        hessian_spectrum(mlp(4, 3), F.cross_entropy, [(*DATA, DATA[1])])
    with pytest.raises(MeasurementError, match=r"got dict; define curvature_loss"):
        hessian_spectrum(mlp(4, 3), F.cross_entropy, [{"x": DATA[0], "y": DATA[1]}])


def test_collected_losses_of_a_manual_step_are_summed():
    collected = []
    module = Module(lambda m, b: collected.extend([m(b[0]).square().mean(), F.cross_entropy(m(b[0]), b[1])]))
    closure = LossClosure(module, collected=collected)
    expected = (module(DATA[0]).square().mean() + F.cross_entropy(module(DATA[0]), DATA[1])).item()
    for _ in range(2):  # what an earlier call left does not count
        assert closure(DATA).loss.item() == pytest.approx(expected)


def test_watching_stops_after_the_call():
    closure = LossClosure(Module(lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    first = closure(DATA)
    F.cross_entropy(DATA[0], DATA[1].clamp(max=3))
    assert first.loss.item() == pytest.approx(closure(DATA).loss.item())
    assert closure(DATA).output_loss.name == "cross_entropy"


def test_run_only_runs():
    closure = LossClosure(mlp(4, 3), lambda outputs, targets: outputs.sum() * float("nan"))
    closure.run(DATA)  # any loss will do
    with pytest.raises(MeasurementError):
        closure(DATA)


def test_a_sum_of_manual_losses_says_so() -> None:
    module, collected = torch.nn.Linear(2, 1), []

    def training_step(batch: torch.Tensor) -> None:
        collected.extend([module(batch).square().mean(), module(batch).abs().mean()][: len(batch)])

    module.training_step = training_step  # type: ignore[assignment]
    closure = LossClosure(module, collected=collected)
    both = closure(torch.ones(2, 2))
    assert "sum of all" in both.loss_note
    assert "(2 losses)" in both.loss_note
    one = closure(torch.ones(1, 2))
    assert one.loss_note == ""
    assert torch.equal(one.loss, collected[0])
