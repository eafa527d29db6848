"""What a budget chooses for the GGN and the NTK."""

import pytest
import torch
from problems import assert_same_eigenvalues, classes, cross_entropy, dense_ggn, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import Measured, MeasurementError, ggn_spectrum
from lightning_plasticity.curvature.budget import Budget
from lightning_plasticity.curvature.gram import plan as gram_plan
from lightning_plasticity.curvature.gram.estimate import gram_spectrum
from lightning_plasticity.curvature.gram.plan import plan_gram

MIB = 2**20


def problem(*sizes, samples=200, batch=None, mode="frozen"):
    net, (inputs, targets) = mlp(*sizes).float(), classes(samples, sizes[0], sizes[-1])
    size = batch or samples
    return Measured(
        net, list(zip(inputs.float().split(size), targets.split(size), strict=True)), cross_entropy, mode=mode
    )


def planned(measured, max_rows=1500, num_steps=60, **bounds):
    return plan_gram(measured, "ggn", measured.parameters(), max_rows, num_steps, Budget(**bounds))


def test_small_problems_are_done_as_asked_without_a_trial(monkeypatch):
    monkeypatch.setattr(gram_plan, "_trials", None)
    for bounds in ({}, {"max_seconds": 4.0}, {"max_seconds": 4.0, "max_memory": 128 * MIB}):
        plan = planned(problem(16, 20, 5), **bounds)
        assert (plan.exact, plan.num_samples, plan.why, plan.cut) == (True, 200, "", False)


def test_short_of_time_or_memory_samples_are_halved():
    measured = problem(64, 300, 10)
    found = [planned(measured, None, max_memory=size * MIB).num_samples for size in (400, 100, 30, 15)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 200 > found[-1]
    plan = planned(measured, None, max_seconds=1e-3)
    assert plan.num_samples == 6  # halved until 8 or fewer
    assert plan.why.startswith("6 of 200 samples, to stay within 0.001 s and")
    spectrum = gram_spectrum(measured, "ggn", method="exact", max_rows=None, num_steps=60, plan=plan)
    assert (spectrum.num_samples, spectrum.settings["budget"]) == (6, plan.why)
    net = measured.module.double()
    inputs, targets = measured.batches[0]
    truth = dense_ggn(mlp(64, 5, 10), cross_entropy, [(inputs[:6].double(), targets[:6])])
    found = ggn_spectrum(mlp(64, 5, 10), cross_entropy, (inputs[:6].double(), targets[:6]))
    assert_same_eigenvalues(found, truth)
    assert net is measured.module


@pytest.mark.parametrize("mode", ["as_is", "frozen"])
def test_batch_statistics_are_those_of_whole_batches(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 10))
    inputs, targets = classes(60, 64, 10)
    plan = planned(Measured(net, [(inputs.float(), targets)], cross_entropy, mode=mode), None, max_seconds=1e-3)
    assert plan.num_samples < 60
    assert plan.cut == (mode == "frozen")


def test_estimates_have_plans_too(monkeypatch):
    measured = problem(32, 64, 100, samples=300)  # 99 rows a sample: 15 samples fit
    whole = planned(measured)
    assert (whole.exact, whole.num_samples, whole.num_steps, whole.why) == (False, 300, 60, "")
    short = planned(measured, max_seconds=1e-3)
    assert (short.num_samples, short.num_steps, short.cut) == (16, 20, True)
    assert short.why.startswith("16 of 300 samples, 20 of 60 Lanczos steps, to stay within 0.001 s and")
    tight = planned(measured, max_memory=2 * MIB)
    assert tight.num_samples < 300 or tight.num_steps < 60
    for plan in (short, tight):
        spectrum = gram_spectrum(measured, "ggn", method="auto", max_rows=1500, num_steps=60, plan=plan)
        assert (spectrum.num_samples, spectrum.settings["num_steps"]) == (plan.num_samples, plan.num_steps)
        assert spectrum.settings["budget"] == plan.why
    clocked = gram_spectrum(
        measured, "ggn", method="lanczos", max_rows=1500, num_steps=60, budget=Budget(1e-4), plan=whole
    )
    assert clocked.settings["budget"] == "ended by the clock after 20 of 60 Lanczos steps"


def test_the_refusals_help():
    with pytest.raises(MeasurementError, match=r"The ggn of .* parameters takes .* at least.*, or choose"):
        ggn_spectrum(mlp(300, 300, 10).float(), cross_entropy, problem(300, 4, 10).batches, max_memory=MIB)
    with pytest.raises(MeasurementError, match=r"The ggn of .*Raise max_memory"):
        planned(problem(300, 300, 100), max_memory=MIB)


def test_first_samples_that_the_loss_ignores():
    net, (inputs, targets) = mlp(64, 300, 10).float(), classes(100, 64, 10)
    targets[:70] = -100
    for bounds in ({}, {"max_seconds": 1e-3}):
        spectrum = ggn_spectrum(net, cross_entropy, (inputs.float(), targets), max_rows=None, **bounds)
        assert spectrum.num_params == 64 * 300 + 300 + 3010


@pytest.mark.parametrize("bounds", [{}, {"max_seconds": 1e-3}, {"max_memory": 40 * MIB}])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_a_loss_that_is_not_finite_has_its_usual_message(bounds, num_classes):
    data = problem(64, 300, num_classes).batches[0]
    data[0][5] = float("nan")
    with pytest.raises(MeasurementError, match="The loss on the probe data is nan; look for NaN or inf"):
        ggn_spectrum(mlp(64, 300, num_classes).float(), cross_entropy, data, max_rows=1500, **bounds)


class FixedSize(nn.Module):
    def __init__(self, size, num_classes):
        super().__init__()
        self.size, self.net = size, mlp(64, 300, num_classes).float()

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]).reshape(self.size, -1), batch[1])


@pytest.mark.parametrize("num_classes", [10, 100])
def test_a_step_of_one_batch_size_only(num_classes):
    batches = problem(64, 4, num_classes, batch=50).batches
    measured = Measured(FixedSize(50, num_classes), batches)
    plan = planned(measured, max_seconds=1e-3)
    spectrum = gram_spectrum(measured, "ggn", method="auto", max_rows=1500, num_steps=60, plan=plan)
    assert spectrum.num_samples == plan.num_samples < 200


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_few_samples(samples):
    for num_classes in (3, 100):
        measured = problem(64, 300, num_classes, samples=samples, batch=1)
        for bounds in ({}, {"max_seconds": 1e-3}):
            assert 1 <= planned(measured, **bounds).num_samples <= samples


class Tokens(nn.Module):
    """A loss at every position of a sequence: as one sample of many positions, or each position as a sample."""

    def __init__(self, flat):
        super().__init__()
        self.flat = flat
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 20))

    def training_step(self, batch):
        logits, targets = self.net(batch)[:, :-1], batch[:, 1:]
        if self.flat:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return F.cross_entropy(logits.transpose(1, 2), targets)


def test_a_sequence_is_a_sample_also_where_the_step_makes_a_sample_of_each_token():
    """A budget that counted tokens took all sequences and said otherwise."""
    batches = list(torch.randint(20, (200, 9), generator=torch.Generator().manual_seed(0)).split(50))
    by_form = [Measured(Tokens(flat), batches) for flat in (False, True)]
    for max_rows in (1500, 6000):  # 19 rows for each of 8 tokens: 9 sequences fit, or 39
        plain, flat = (planned(measured, max_rows) for measured in by_form)
        assert plain == flat
        assert (plain.exact, plain.num_samples) == ((True, 39) if max_rows == 6000 else (False, 200))
    flat = by_form[1]
    for bounds in ({"max_seconds": 1e-3}, {"max_memory": MIB}):
        plan = planned(flat, **bounds)
        assert plan.num_samples < 200
        spectrum = gram_spectrum(flat, "ggn", method="auto", max_rows=1500, num_steps=60, plan=plan)
        assert (spectrum.num_samples, spectrum.settings["rows"]) == (8 * plan.num_samples, 8 * 19 * plan.num_samples)
        cut = flat.first(plan.num_samples)
        whole = gram_spectrum(cut, "ggn", method="lanczos", max_rows=None, num_steps=plan.num_steps)
        assert abs(whole.lambda_max().value - spectrum.lambda_max().value) < 1e-5 * whole.lambda_max().value
