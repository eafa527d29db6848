"""Dormant and dead units, and the layouts of activations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plasticity.linalg import as_feature_matrix, dead_units, dormancy_scores, dormant_units

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "features.npz", allow_pickle=False)
NAMES = [str(name) for name in VECTORS["names"]]


@pytest.mark.parametrize("name", NAMES)
def test_counts_match_the_vectors(name):
    # Counts, so exactly, in float64 and float32.
    row, columns = VECTORS["own_f64"][NAMES.index(name)], list(VECTORS["own_columns"])
    dead = VECTORS["authors_f64"][NAMES.index(name), list(VECTORS["authors_columns"]).index("dead")]
    for features in (torch.from_numpy(VECTORS[f"X_{name}"]), torch.from_numpy(VECTORS[f"X_{name}"]).float()):
        for tau in ("0", "0.025", "0.1"):
            assert int(dormant_units(features, float(tau)).sum()) == row[columns.index(f"dormant_{tau}")]
        assert int(dead_units(features).sum()) == dead


def test_scores_by_hand():
    features = torch.tensor([[1.0, -2.0, 0.0, 0.1], [-3.0, 2.0, 0.0, -0.1]])
    # Means of |h|: 2, 2, 0, 0.1, over their mean 1.025. Float32 input of 0.1 is exact to 1e-8.
    expected = torch.tensor([2.0, 2.0, 0.0, 0.1], dtype=torch.float64) / 1.025
    torch.testing.assert_close(dormancy_scores(features), expected, rtol=1e-7, atol=0)
    assert dormant_units(features, tau=0.1).tolist() == [False, False, True, True]
    assert dormant_units(features, tau=0.09).tolist() == [False, False, True, False]
    assert dead_units(features).tolist() == [False, False, True, False]


def test_threshold_includes_tau():
    features = torch.tensor([[1.0, 3.0]])  # scores 0.5 and 1.5 exactly
    assert dormant_units(features, tau=0.5).tolist() == [True, False]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000), st.sampled_from([1e-20, 1e-3, 1e18]))
@settings(max_examples=50, deadline=None)
def test_score_identities(rows, columns, seed, scale):
    features = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scores = dormancy_scores(features)
    assert scores.mean().item() == pytest.approx(1.0, rel=1e-12)  # float64 sums of at most 64 terms
    # The product with the scale rounds each entry by eps32.
    torch.testing.assert_close(dormancy_scores(scale * features), scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(dormancy_scores(-features), scores, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dead_layer(dtype):
    features = torch.zeros(5, 3, dtype=dtype)
    assert dormancy_scores(features).tolist() == [0.0, 0.0, 0.0]
    assert dormant_units(features, tau=0.0).all()
    assert dead_units(features).all()


def test_tiny_is_not_dead():
    features = torch.tensor([[0.0, 1.0], [1e-45, 1.0]])  # the smallest positive float32
    assert not dead_units(features).any()
    assert dormant_units(features).tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad):
    features = torch.tensor([[bad, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert dormancy_scores(features).isnan().all()
    assert not dormant_units(features).any()
    assert dead_units(features).tolist() == [False, True, False]


def test_errors_say_what_to_do():
    for function in (dormancy_scores, dormant_units, dead_units):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*as_feature_matrix"):
            function(torch.ones(2, 3, 4))
        with pytest.raises(ValueError, match="empty matrix"):
            function(torch.ones(0, 3))
    for tau in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tau="):
            dormant_units(torch.ones(2, 2), tau=tau)


def test_layouts():
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    positions = as_feature_matrix(images)
    assert positions.shape == (40, 3)
    assert positions[1 * 20 + 2 * 5 + 3].tolist() == images[1, :, 2, 3].tolist()
    flat = as_feature_matrix(images, conv="flatten")
    assert flat.shape == (2, 60)
    assert flat[1].tolist() == images[1].flatten().tolist()
    tokens = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    assert as_feature_matrix(tokens)[4].tolist() == tokens[1, 1].tolist()  # (N, T, C)
    assert as_feature_matrix(tokens, channel_dim=1)[5].tolist() == tokens[1, :, 1].tolist()  # (N, C, L)
    assert as_feature_matrix(images, channel_dim=-1).shape == (24, 5)
    assert as_feature_matrix(torch.ones(2, 3, 1, 1, 6)).shape == (12, 3)
    matrix = torch.ones(2, 3)
    assert as_feature_matrix(matrix) is matrix
    assert as_feature_matrix(torch.ones(0, 3, 4, 4)).shape == (0, 3)
    assert as_feature_matrix(torch.ones(0, 3, 4, 4), conv="flatten").shape == (0, 48)


def test_layout_errors():
    with pytest.raises(ValueError, match=r"shape \(3,\).*unsqueeze"):
        as_feature_matrix(torch.ones(3))
    with pytest.raises(ValueError, match="expected 'positions' or 'flatten'"):
        as_feature_matrix(torch.ones(2, 3), conv="channels")
    with pytest.raises(ValueError, match="ambiguous; pass channel_dim"):
        as_feature_matrix(torch.ones(1, 2, 1, 1, 1, 1))
    for channel_dim in (0, 4, -4, -5):
        with pytest.raises(ValueError, match=f"channel_dim={channel_dim} does not fit"):
            as_feature_matrix(torch.ones(1, 2, 3, 4), channel_dim=channel_dim)
