"""Rank metrics: equal to the functions on joined data, however it is split, merged or gathered."""

import copy
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_plasticity import linalg
from lightning_plasticity.metrics import (
    ApproximateRank,
    EffectiveRank,
    FeatureRank,
    NumericalRank,
    SRank,
    StableRank,
)

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "features.npz", allow_pickle=False)
NAMES = [str(name) for name in VECTORS["names"]]
FUNCTIONS = {
    EffectiveRank: linalg.effective_rank,
    StableRank: linalg.stable_rank,
    SRank: linalg.srank,
    ApproximateRank: linalg.approximate_rank,
    FeatureRank: linalg.feature_rank,
    NumericalRank: linalg.numerical_rank,
}
METRICS = list(FUNCTIONS)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(metric_class, *batches, **kwargs):
    metric = metric_class(**kwargs)
    for batch in batches:
        metric.update(batch)
    return metric


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_function_on_the_vectors(metric_class, name):
    matrix = torch.from_numpy(VECTORS[f"X_{name}"])
    expected = FUNCTIONS[metric_class](matrix).item()
    if metric_class is NumericalRank:
        # At the precision of float32, 40 * eps32 = 4.8e-6, which ends inside the spectrum of ill_conditioned.
        sigma = torch.from_numpy(VECTORS[f"sv_{name}"])
        expected = int((sigma > max(matrix.shape) * torch.finfo(torch.float32).eps * sigma[0]).sum())
    value = filled(metric_class, *matrix.split(7))
    # An eigenvalue has an error of eps64 * sigma_1^2, which moves a sigma of 1e-3 sigma_1 by 1e-13 and reaches the rank
    # with a factor of log. Below 1e-7 sigma_1 singular values are set to zero; ill_conditioned has 6 down to 1e-9, each
    # worth 1e-7 * log(1e7).
    tolerance = 1e-5 if name == "ill_conditioned" else 1e-11
    assert value.compute().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("metric_class", METRICS)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 6),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_any_split_and_merge_order(metric_class, rows, columns, seed, cuts):
    matrix = gaussian(rows, columns, seed)
    # Sums in another order: eps64 on the eigenvalues; a random matrix has sigma above 1e-4 sigma_1, so 1e-8 at most.
    expected = pytest.approx(filled(metric_class, matrix).compute().item(), rel=1e-8)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    batches = [matrix[start:stop] for start, stop in itertools.pairwise(edges)]  # some are empty
    assert filled(metric_class, *batches).compute().item() == expected
    for order in (batches, batches[::-1]):
        merged = filled(metric_class, order[0])
        for batch in order[1:]:
            merged.merge_state(filled(metric_class, batch))
        assert merged.compute().item() == expected


@pytest.mark.parametrize("metric_class", METRICS)
def test_forward_reset_and_copies(metric_class):
    first, second = gaussian(9, 4, 1), gaussian(5, 4, 2)
    function, metric = FUNCTIONS[metric_class], metric_class()
    # Random spectra: the error of an eigenvalue, eps64, divided by its relative size of at least 1e-3.
    assert metric(first).item() == pytest.approx(function(first).item(), rel=1e-11)
    assert metric(second).item() == pytest.approx(function(second).item(), rel=1e-11)
    both = function(torch.cat([first, second])).item()
    for same in (metric, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert same.compute().item() == pytest.approx(both, rel=1e-11)
    metric.reset()
    metric.update(gaussian(5, 3))  # after a reset another number of features is fine
    assert metric.compute().item() == pytest.approx(function(gaussian(5, 3)).item(), rel=1e-11)
    assert metric.compute().dtype == torch.float64


def test_collection_shares_one_state():
    kwargs = {"conv": "flatten"}
    collection = MetricCollection([metric_class(**kwargs) for metric_class in METRICS])
    batches = gaussian(12, 8).reshape(12, 2, 2, 2).split(5)
    for _ in range(2):  # again after a reset
        for batch in batches:
            collection.update(batch)
        assert len(collection.compute_groups) == 1
        values = collection.compute()
        for metric_class, function in FUNCTIONS.items():
            assert values[metric_class.__name__].item() == pytest.approx(function(gaussian(12, 8)).item(), rel=1e-11)
        collection.reset()


@pytest.mark.parametrize("metric_class", METRICS)
def test_gathers_from_processes(metric_class):
    # A process without batches has no shape of its own: num_features gives it one.
    mine, other = gaussian(6, 4), metric_class(num_features=4)

    def gather(state, group):
        theirs = other.num_samples if state.ndim == 0 else other.second_moment
        assert theirs.shape == state.shape
        return [state, theirs]

    metric = metric_class(num_features=4, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(mine)
    # Same sums, in another order, as in the test of splits.
    assert metric.compute().item() == pytest.approx(FUNCTIONS[metric_class](mine).item(), rel=1e-11)
    other.update(gaussian(3, 4, 1))
    metric.update(mine[:0])  # clears the cached value
    joined = torch.cat([mine, gaussian(3, 4, 1)])
    assert metric.compute().item() == pytest.approx(FUNCTIONS[metric_class](joined).item(), rel=1e-11)


@pytest.mark.parametrize("metric_class", METRICS)
def test_layouts(metric_class):
    images = gaussian(4, 3 * 10).reshape(4, 3, 2, 5)
    function = FUNCTIONS[metric_class]
    positions = images.permute(0, 2, 3, 1).reshape(40, 3)
    assert filled(metric_class, images).compute().item() == pytest.approx(function(positions).item(), rel=1e-11)
    # 4 samples of 30 features: 26 eigenvalues are noise, cut by min(N, D).
    flat = filled(metric_class, images, conv="flatten").compute().item()
    assert flat == pytest.approx(function(images.flatten(1)).item(), rel=1e-11)
    last = filled(metric_class, images.movedim(1, -1), channel_dim=-1).compute().item()
    assert last == pytest.approx(function(positions).item(), rel=1e-11)


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_features(metric_class, dtype):
    assert filled(metric_class, torch.zeros(5, 3, dtype=dtype)).compute().item() == 0.0
    for single in (torch.ones(1, 3), torch.ones(3, 1), torch.full((50, 30), 0.7)):
        # Rank one: noise of the eigenvalues is cut, so that only float64 rounding is left.
        assert filled(metric_class, single.to(dtype)).compute().item() == pytest.approx(1.0, rel=1e-12)
    for bad in (math.nan, math.inf):
        matrix = torch.ones(4, 3, dtype=dtype)
        matrix[1, 2] = bad
        metric = filled(metric_class, torch.ones(4, 3, dtype=dtype), matrix)
        assert math.isnan(metric.compute().item())


@pytest.mark.parametrize("metric_class", [metric for metric in METRICS if metric is not FeatureRank])
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scale(metric_class, scale):
    features = gaussian(9, 4).float()
    expected = FUNCTIONS[metric_class](features).item()
    # The product is rounded to float32: eps32 on each entry.
    assert filled(metric_class, features * scale).compute().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_of_a_long_stream(rank):
    # Noise must not add up to rank over many batches. The product is rounded to float32, a rank of noise below
    # eps32 * sigma_1 per direction: 60 of them are worth 60 * 1e-7 * log(1e7) at most.
    features = (gaussian(20_000, rank) @ gaussian(rank, 64, 1)).float()
    batches = features.split(64)
    exact = linalg.effective_rank(features.double()).item()
    assert filled(EffectiveRank, *batches).compute().item() == pytest.approx(exact, rel=1e-4)
    assert filled(NumericalRank, *batches).compute().item() == rank


def test_no_samples_is_nan_with_one_warning():
    for metric in (EffectiveRank(), EffectiveRank(num_features=3)):
        with pytest.warns(UserWarning, match="before the ``update`` method") as record:
            assert math.isnan(metric.compute().item())
        assert len(record) == 1
    assert math.isnan(filled(EffectiveRank, torch.ones(0, 3)).compute().item())


def test_inference_mode_autocast_and_gradients():
    metric, features = EffectiveRank(), gaussian(8, 4).float()
    with torch.inference_mode():
        metric.update(features[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(features[4:].requires_grad_())
        value = metric.compute()
    assert not value.requires_grad
    # Bfloat16 products would be wrong in the third digit.
    assert value.item() == pytest.approx(linalg.effective_rank(features.double()).item(), rel=1e-11)


def test_settings_act():
    features = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    assert filled(SRank, features, delta=0.25).compute().item() == 2  # 6 of 8
    assert filled(SRank, features, delta=0.1).compute().item() == 4
    assert filled(ApproximateRank, features, delta=0.1).compute().item() == 2  # 20 of 22
    assert filled(FeatureRank, features, eps=0.75).compute().item() == 2  # divided by sqrt(4)
    tall = torch.cat([features, torch.zeros(12, 4)])
    assert filled(FeatureRank, tall, eps=0.75).compute().item() == 1  # divided by sqrt(16): 1, 0.5, 0.25, 0.25


def test_errors_say_what_to_do():
    metric = filled(EffectiveRank, torch.ones(2, 3))
    with pytest.raises(ValueError, match="with 4 features; expected 3 as before"):
        metric.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="with 2 features; expected 3"):
        EffectiveRank(num_features=3).update(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"20000 features; expected 1 to 16384.*conv='positions'"):
        EffectiveRank().update(torch.ones(1, 20_000))
    for build in (
        lambda: EffectiveRank(num_features=20_000),
        lambda: EffectiveRank(num_features=0),
        lambda: EffectiveRank(conv="channels"),
        lambda: SRank(delta=0.0),
        lambda: ApproximateRank(delta=1.0),
        lambda: FeatureRank(eps=-0.1),
    ):
        with pytest.raises(ValueError, match=r"expected|is not in"):
            build()


@pytest.mark.parametrize("metric_class", METRICS)
def test_declarations(metric_class):
    metric = metric_class()
    assert metric.is_differentiable is False
    assert metric.higher_is_better is True
    assert metric.full_state_update is False
    assert metric.second_moment.dtype == torch.float64
