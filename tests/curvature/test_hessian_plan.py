"""What a budget chooses for the Hessian, in which order, and what a record says of it."""

import itertools
import time

import pytest
import torch
from problems import classes, cross_entropy, mlp
from torch import nn
from torch.nn import functional as F

from lightning_plasticity.curvature import Measured, MeasurementError, hessian_spectrum
from lightning_plasticity.curvature.budget import Budget
from lightning_plasticity.curvature.hessian import costs as hessian_costs
from lightning_plasticity.curvature.hessian import plan as hessian_plan
from lightning_plasticity.curvature.hessian.costs import Costs, Trial, counted, ladder
from lightning_plasticity.curvature.hessian.measure import measure_hessian
from lightning_plasticity.curvature.hessian.plan import HessianPlan, plan_hessian

MIB = 2**20
SAMPLES = 200


def problem(*sizes, samples=SAMPLES, batch=None, mode="frozen", loss=cross_entropy, activation=nn.Tanh):
    net = mlp(*sizes, activation=activation).float()
    inputs, targets = classes(samples, sizes[0], sizes[-1])
    size = batch or samples
    batches = list(zip(inputs.float().split(size), targets.split(size), strict=True))
    return Measured(net, batches, loss, mode=mode)


def planned(measured, num_steps=120, **bounds):
    return plan_hessian(measured, measured.parameters(), num_steps, Budget(**bounds))


@pytest.fixture
def no_range(monkeypatch):
    """Only products in parameter space, whose memory is known here."""
    monkeypatch.setattr("lightning_plasticity.curvature.hessian.problem.MIN_SPEEDUP", 1e9)


@pytest.fixture
def no_clock(monkeypatch):
    """A clock that must not be asked."""

    def refuse(*args, **options):
        raise AssertionError("a trial was made")

    monkeypatch.setattr(hessian_plan, "timed", refuse)
    monkeypatch.setattr(hessian_plan, "sweep_seconds", refuse)
    monkeypatch.setattr(time, "perf_counter", refuse)


def test_the_ladder_goes_down_to_the_least():
    assert list(ladder(512, 120)) == [
        (512, 120), (256, 120), (128, 120), (128, 60), (64, 60), (64, 30), (32, 30), (32, 20), (16, 20), (16, 20),
    ]  # fmt: skip
    for samples, steps in ((1, 1), (10, 300), (1000, 5), (130, 61)):
        found = list(ladder(samples, steps))
        assert found[0] == (samples, steps)
        assert found[-1] == (min(samples, 16), min(steps, 20))
        assert all(a >= c and b >= d for (a, b), (c, d) in itertools.pairwise(found))


def test_small_problems_are_done_as_asked_without_a_clock(no_clock):
    measured = problem(16, 20, 5)
    for bounds in ({}, {"max_seconds": 4.0}, {"max_seconds": 4.0, "max_memory": 64 * MIB}, {"max_memory": 8 * MIB}):
        plan = planned(measured, **bounds)
        assert (plan.num_samples, plan.num_steps, plan.basis, plan.chunk, plan.why) == (SAMPLES, 120, "full", None, "")
        assert plan.settings == {}
        assert plan == planned(measured, **bounds)


def test_less_memory_gives_up_one_thing_after_the_other(no_range):
    # 26 122 coordinates: 0.9 MiB of vectors, a basis of 12 MiB, graphs of 10 MiB.
    measured = problem(64, 128, 128, 10, samples=4000)
    found = [planned(measured, max_memory=size * MIB) for size in (64, 20, 15, 8, 4, 2, 1.2)]
    routes = [(plan.basis, plan.chunk is not None) for plan in found]
    assert routes[:4] == [("full", False), ("float16", False), ("full", True), ("float16", True)]
    assert routes[4:] == [("none", True)] * 3
    assert [plan.num_samples for plan in found] == [4000] * 7
    chunks = [plan.chunk for plan in found if plan.basis == "none"]
    assert chunks == sorted(chunks, reverse=True)
    for plan in found:
        for part, there in {
            "a basis in 16 bits": plan.basis == "float16",
            "no basis": plan.basis == "none",
            f"graphs of {plan.chunk} samples at a time": plan.chunk is not None,
        }.items():
            assert (part in plan.why) == there, plan.why
        assert plan.why.endswith("MiB") == (plan is not found[0])
    message = r"The Hessian of 26122 parameters takes 0\.9\d* MiB at least, and 0\.5 MiB are allowed"
    with pytest.raises(MeasurementError, match=message):
        planned(measured, max_memory=MIB / 2)


def test_the_refusal_helps():
    with pytest.raises(MeasurementError, match=r"Raise max_memory, choose params=.*, or measure the GGN only"):
        hessian_spectrum(mlp(300, 300, 10).float(), cross_entropy, _single(300, 10), max_memory=MIB)


def _single(features, num_classes, samples=40):
    inputs, targets = classes(samples, features, num_classes)
    return inputs.float(), targets


def test_one_mebibyte_is_enough_for_a_small_network():
    spectrum = hessian_spectrum(mlp(8, 16, 4).float(), cross_entropy, _single(8, 4), max_memory=MIB)
    assert spectrum.num_samples == 40  # the whole matrix does not fit, all of the basis does
    assert hessian_spectrum(mlp(8, 16, 4), cross_entropy, classes(40, 8, 4), max_memory=MIB).num_samples == 40


@pytest.mark.parametrize("basis", ["full", "float16", "none"])
def test_records_say_what_was_done(basis):
    measured = problem(16, 40, 30, 5, samples=60)
    plan = HessianPlan(60, 50, basis, 25, why="reasons")
    spectrum = measure_hessian(measured, method="lanczos", plan=plan)
    expected = {"budget": "reasons", "graph_samples": 25, "num_steps": 50} | (
        {} if basis == "full" else {"basis": basis}
    )
    assert expected.items() <= spectrum.settings.items()
    exact = hessian_spectrum(measured.module, cross_entropy, measured.batches, method="exact")
    for rho in (0.3, 0.1, 0.03):
        count = spectrum.epsilon_rank(rho, relative=True)
        assert count.lower <= exact.epsilon_rank(rho, relative=True).value <= count.upper
    assert spectrum.lambda_max().value == pytest.approx(exact.lambda_max().value, rel=1e-4)


def test_more_steps_than_live_coordinates():
    measured = problem(4, 6, 3)
    assert planned(measured, 1000).num_steps == 1000
    for basis in ("full", "float16", "none"):
        found = measure_hessian(measured, method="lanczos", plan=HessianPlan(SAMPLES, 1000, basis))
        assert found.settings["num_steps"] <= 51
        assert "budget" not in found.settings  # complete, not short


def test_a_few_milliseconds(no_range):
    measured = problem(64, 200, 200, 10, samples=2000)
    plan = planned(measured, max_seconds=2e-3)
    assert (plan.num_samples, plan.num_steps, plan.basis, plan.chunk) == (16, 20, "full", None)  # memory is no matter
    assert "to stay within 0.002 s and" in plan.why
    started = time.perf_counter()
    spectrum = hessian_spectrum(measured.module, cross_entropy, measured.batches, max_seconds=2e-3)
    assert time.perf_counter() - started < 5  # on a busy machine, too; all samples and steps take longer
    assert (spectrum.num_samples, spectrum.settings["num_steps"]) == (16, 20)


def test_the_clock_ends_a_run_and_says_so():
    measured = problem(16, 60, 30, 5)
    spectrum = measure_hessian(measured, method="lanczos", budget=Budget(1e-3), plan=HessianPlan(SAMPLES, 100, why="x"))
    assert spectrum.settings["num_steps"] == 20
    assert spectrum.settings["budget"] == "x; ended by the clock after 20 of 100 Lanczos steps"


def test_time_that_is_short_takes_samples_before_steps():
    trial = Trial(64, 0.0, 1e-3, 1e3)
    costs = Costs([trial], 10**5, 4)
    assert costs.seconds(512, 120, "full", None) == pytest.approx(120 * 8e-3)
    assert costs.seconds(512, 120, "full", 64) > costs.seconds(512, 120, "full", None)
    swept = Costs([trial], 10**5, 4, sweep=1e-9)
    assert swept.seconds(64, 120, "none", None) < swept.seconds(64, 120, "full", None)
    assert swept.seconds(64, 120, "full", None) < swept.seconds(64, 120, "float16", None)


def test_a_convolution_is_not_small_for_having_few_weights(monkeypatch):
    # 168 weights, each used at 24 x 24 places: it is the operations that count.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 1, 3), nn.Flatten(), nn.Linear(24 * 24, 2))
    data = Measured(net, [(torch.randn(100, 1, 28, 28), torch.randint(2, (100,)))], cross_entropy)
    trial = counted(data)
    forward = 2 * (26 * 26 * 72 + 24 * 24 * 72 + 24 * 24 * 2)
    assert trial.product * hessian_costs.SLOW_RATE / trial.samples >= forward
    calls = []
    timed = hessian_plan.timed
    monkeypatch.setattr(hessian_plan, "timed", lambda *a: calls.append(a) or timed(*a))
    planned(data, max_seconds=1e-3)
    assert calls
    # Its graphs count against the memory as well, small as the basis is.
    tight = planned(data, max_memory=3 * MIB)
    assert tight.chunk or tight.num_samples < 100


def test_recurrent_networks_are_timed():
    lstm = nn.LSTM(4, 5, batch_first=True)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    measured = Measured(Last(), [(torch.randn(30, 6, 4), torch.randint(5, (30,)))], cross_entropy)
    assert counted(measured).product == float("inf")
    assert planned(measured, max_seconds=60.0).num_samples == 30


class FixedSize(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size, self.net = size, mlp(64, 200, 10).float()

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]).reshape(self.size, 10), batch[1])


def test_a_step_of_one_batch_size_only_is_measured_on_whole_batches():
    inputs, targets = classes(900, 64, 10)
    batches = list(zip(inputs.float().split(90), targets.split(90), strict=True))
    measured = Measured(FixedSize(90), batches)
    plan = planned(measured, max_seconds=1e-3)
    assert plan.num_samples == 90
    assert measure_hessian(measured, budget=Budget(1e-3), plan=plan).num_samples == 90
    assert planned(measured).num_samples == 900
    # Where graphs do not fit, they are made batch by batch if one of those fits, else on fewer samples.
    for size in (12, 8):
        plan = planned(measured, max_memory=size * MIB)
        assert measure_hessian(measured, plan=plan).num_samples % 90 == 0


def test_first_samples_that_the_loss_ignores():
    # The mean over no sample is nan: that is not the loss on all of them.
    net, (inputs, targets) = mlp(64, 200, 10).float(), classes(300, 64, 10)
    targets[:70] = -100
    data = inputs.float(), targets
    spectrum = hessian_spectrum(net, cross_entropy, data, num_steps=20, max_seconds=1e-3)
    assert spectrum.num_samples == 300
    assert hessian_spectrum(net, cross_entropy, data, num_steps=20).num_samples == 300


@pytest.mark.parametrize("bounds", [{}, {"max_seconds": 1e-3}, {"max_memory": 8 * MIB}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_has_its_usual_message(value, bounds):
    net, data = mlp(64, 200, 10).float(), _single(64, 10, 300)
    data[0][5] = value
    with pytest.raises(MeasurementError, match="The loss on the probe data is nan; look for NaN or inf"):
        hessian_spectrum(net, cross_entropy, data, **bounds)


def test_what_a_module_raises_is_raised():
    def broken(outputs, targets):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        planned(problem(16, 20, 5, loss=broken), max_seconds=1e-3)


@pytest.mark.parametrize("mode", ["as_is", "frozen"])
def test_batches_that_cannot_be_divided_are_not_planned_in_parts(mode, no_range):
    def coupled(outputs, targets):
        return torch.logsumexp(outputs @ outputs.T, 1).mean()

    loss = cross_entropy if mode == "as_is" else coupled
    measured = problem(64, 128, 128, 10, samples=1000, mode=mode, loss=loss)
    plan = planned(measured, max_memory=3 * MIB)
    assert plan.chunk is None
    assert plan.num_samples < 1000
    split = problem(64, 128, 128, 10, samples=1000, batch=50, mode=mode, loss=loss)
    assert planned(split, max_memory=3 * MIB).num_samples >= plan.num_samples


@pytest.mark.parametrize("samples", [1, 2, 17])
@pytest.mark.parametrize("batch", [1, 5])
def test_few_samples(samples, batch):
    measured = problem(64, 200, 10, samples=samples, batch=batch)
    for bounds in ({}, {"max_seconds": 1e-3}, {"max_memory": 4 * MIB}):
        plan = planned(measured, 30, **bounds)
        assert 1 <= plan.num_samples <= samples
        assert measure_hessian(measured, plan=plan).num_samples == plan.num_samples


def test_one_parameter():
    net = nn.Linear(1, 1, bias=False)
    data = torch.ones(3, 1), torch.zeros(3, 1)
    for basis in ("full", "float16", "none"):
        measured = Measured(net, [data], F.mse_loss)
        found = measure_hessian(measured, method="lanczos", plan=HessianPlan(3, 120, basis))
        assert found.lambda_max().value == pytest.approx(2.0)


@pytest.mark.parametrize("basis", ["full", "float16", "none"])
def test_bfloat16_modules(basis):
    net, data = mlp(8, 30, 4), _single(8, 4)
    exact = hessian_spectrum(net, cross_entropy, (data[0].double(), data[1]))
    measured = Measured(net.bfloat16(), [(data[0].bfloat16(), data[1])], cross_entropy)
    found = measure_hessian(measured, method="lanczos", plan=HessianPlan(40, 20, basis, 15))
    assert found.lambda_max().value == pytest.approx(exact.lambda_max().value, rel=0.05)
    assert planned(measured, max_memory=MIB).num_samples == 40


def test_the_exact_route_is_bounded_too(monkeypatch):
    measured = problem(16, 20, 5)  # 445 coordinates: 200 samples of them are a second on a slow core
    roomy, tight = planned(measured), planned(measured, max_memory=MIB)
    assert (roomy.exact_limit, roomy.at_once) == (1000, 32)
    assert tight.at_once < 32
    assert 8 * 4 * tight.exact_limit**2 <= MIB
    hurried = planned(measured, 20, max_seconds=0.03)
    assert hurried.exact_limit < 445
    assert not measure_hessian(measured, num_steps=20, plan=hurried).exact
    calls = []
    operator = hessian_plan.HessianPlan(SAMPLES, 120, at_once=3)
    from lightning_plasticity.curvature import HessianOperator

    matmat = HessianOperator.matmat
    monkeypatch.setattr(HessianOperator, "matmat", lambda self, v: calls.append(len(v)) or matmat(self, v))
    assert measure_hessian(measured, plan=operator).exact
    assert max(calls) == 3
    with pytest.raises(MeasurementError, match="Use method='lanczos', choose params"):
        measure_hessian(measured, method="exact", budget=Budget(max_memory=MIB))


def test_plans_survive_a_checkpoint():
    from dataclasses import asdict

    plan = planned(problem(64, 128, 10, samples=300), max_memory=8 * MIB)
    torch.save(asdict(plan), "plan.pt")
    assert HessianPlan(**torch.load("plan.pt", weights_only=True)) == plan
