"""Unit metrics: equal to the functions on joined data, however it is split, merged or gathered."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_plasticity.linalg import as_feature_matrix, dead_units, dormant_units
from lightning_plasticity.metrics import DeadUnitRatio, DormantUnitRatio, EffectiveRank

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "features.npz", allow_pickle=False)
NAMES = [str(name) for name in VECTORS["names"]]
METRICS = [DormantUnitRatio, DeadUnitRatio]


def layer(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rectified features of very different size per unit, some of them dead."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.relu(torch.randn(rows, columns, generator=generator, dtype=torch.float64) - 0.5)
    return features * torch.logspace(0, -4, columns, dtype=torch.float64)


def filled(metric_class, *batches, **kwargs):
    metric = metric_class(**kwargs)
    for batch in batches:
        metric.update(batch)
    return metric


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_vectors(name):
    # Counts over D: the quotient of two whole numbers is rounded once.
    matrix, row = torch.from_numpy(VECTORS[f"X_{name}"]), VECTORS["own_f64"][NAMES.index(name)]
    columns = list(VECTORS["own_columns"])
    for tau in ("0", "0.025", "0.1"):
        ratio = filled(DormantUnitRatio, *matrix.split(7), tau=float(tau)).compute().item()
        assert ratio == pytest.approx(row[columns.index(f"dormant_{tau}")] / matrix.shape[1], rel=1e-15)
    dead = VECTORS["authors_f64"][NAMES.index(name), list(VECTORS["authors_columns"]).index("dead")]
    ratio = filled(DeadUnitRatio, *matrix.split(7)).compute().item()
    assert ratio == pytest.approx(dead / matrix.shape[1], rel=1e-15)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 8),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_any_split_and_merge_order(rows, columns, seed, cuts):
    # Exactly equal: a score of random numbers is never within rounding of tau.
    features = layer(rows, columns, seed)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    batches = [features[start:stop] for start, stop in itertools.pairwise(edges)]  # some are empty
    for metric_class, units in ((DormantUnitRatio, dormant_units(features)), (DeadUnitRatio, dead_units(features))):
        expected = units.double().mean().item()
        assert filled(metric_class, *batches).compute().item() == expected
        for order in (batches, batches[::-1]):
            merged = filled(metric_class, order[0])
            for batch in order[1:]:
                merged.merge_state(filled(metric_class, batch))
            assert merged.compute().item() == expected


def test_forward_reset_and_collection():
    features = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.01, 0.0, 0.0]])
    metric = DeadUnitRatio()
    assert metric(features[:1]).item() == 0.75  # of the batch
    assert metric(features[1:]).item() == 0.5
    assert metric.compute().item() == 0.5
    metric.reset()
    assert metric(torch.ones(2, 3)).item() == 0.0

    collection = MetricCollection([DormantUnitRatio(), DeadUnitRatio(), EffectiveRank()])
    for batch in features.split(1):
        collection.update(batch)
    values = collection.compute()
    assert len(collection.compute_groups) == 2  # the two ratios share their sums
    assert values["DormantUnitRatio"].item() == 0.75
    assert values["DeadUnitRatio"].item() == 0.5


def test_thresholds_act():
    features = torch.tensor([[1.0, 3.0]])  # scores 0.5 and 1.5 exactly
    assert filled(DormantUnitRatio, features, tau=0.5).compute().item() == 0.5
    assert filled(DormantUnitRatio, features, tau=0.49).compute().item() == 0.0
    assert filled(DormantUnitRatio, -features, tau=0.5).compute().item() == 0.5  # absolute activations


@pytest.mark.parametrize("metric_class", METRICS)
def test_gathers_from_processes(metric_class):
    other = metric_class(num_features=4)  # a process that saw nothing

    def gather(state, group):
        theirs = other.num_samples if state.ndim == 0 else other.absolute_sum
        assert theirs.shape == state.shape
        return [state, theirs]

    metric = metric_class(num_features=4, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert metric.compute().item() == 0.75
    other.update(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    metric.update(torch.zeros(1, 4))
    assert metric.compute().item() == 0.5


def test_unit_of_a_convolution_is_a_channel():
    images = torch.zeros(2, 4, 3, 3)
    images[0, 1, 2, 2] = 1.0  # alive at one position of one sample
    images[:, 2] = 1.0
    assert filled(DeadUnitRatio, images).compute().item() == 0.5
    # Mean of channel 1 is 1/18, of channel 2 is 1: a score of 4 / 19 = 0.21.
    assert filled(DormantUnitRatio, images, tau=0.2).compute().item() == 0.5
    assert filled(DormantUnitRatio, images, tau=0.22).compute().item() == 0.75
    assert filled(DeadUnitRatio, images.movedim(1, -1), channel_dim=-1).compute().item() == 0.5
    flat = as_feature_matrix(images, conv="flatten")
    assert filled(DeadUnitRatio, images, conv="flatten").compute().item() == dead_units(flat).double().mean().item()


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_features(metric_class, dtype):
    assert filled(metric_class, torch.zeros(5, 3, dtype=dtype)).compute().item() == 1.0
    assert filled(metric_class, torch.ones(1, 1, dtype=dtype)).compute().item() == 0.0
    for bad in (math.nan, math.inf):
        features = torch.zeros(2, 3, dtype=dtype)
        features[0, 1] = bad
        assert math.isnan(filled(metric_class, features, torch.ones(2, 3, dtype=dtype)).compute().item())


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scale(metric_class, scale):
    features = layer(9, 8)
    assert filled(metric_class, scale * features).compute() == filled(metric_class, features).compute()


def test_half_precision_sums_do_not_saturate():
    # 4000 samples of 30 sum to 120000, above the largest float16; in float64 nothing is lost.
    features = torch.tensor([[30.0, 1.0]], dtype=torch.float16).expand(4000, 2)
    metric = filled(DormantUnitRatio, features, tau=0.1)
    assert metric.absolute_sum.tolist() == [120_000.0, 4000.0]
    assert metric.compute().item() == 0.5


@pytest.mark.parametrize("metric_class", METRICS)
def test_no_samples_is_nan_with_one_warning(metric_class):
    for metric in (metric_class(), metric_class(num_features=3)):
        with pytest.warns(UserWarning, match="before the ``update`` method") as record:
            assert math.isnan(metric.compute().item())
        assert len(record) == 1
    assert math.isnan(filled(metric_class, torch.ones(0, 3)).compute().item())


def test_inference_mode():
    metric = DeadUnitRatio()
    with torch.inference_mode():
        metric.update(torch.tensor([[1.0, 0.0]]))
    metric.update(torch.zeros(1, 2, requires_grad=True))
    assert metric.compute().item() == 0.5


def test_errors_say_what_to_do():
    metric = filled(DeadUnitRatio, torch.ones(2, 3))
    with pytest.raises(ValueError, match="with 4 units; expected 3 as before"):
        metric.update(torch.ones(2, 4))
    for tau in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tau="):
            DormantUnitRatio(tau)
    with pytest.raises(ValueError, match="num_features=0"):
        DeadUnitRatio(num_features=0)
    with pytest.raises(ValueError, match="expected 'positions' or 'flatten'"):
        DeadUnitRatio(conv="channels")


@pytest.mark.parametrize("metric_class", METRICS)
def test_declarations(metric_class):
    metric = metric_class()
    assert metric.is_differentiable is False
    assert metric.higher_is_better is False
    assert metric.full_state_update is False
    assert metric.absolute_sum.dtype == torch.float64
