"""Few-shot evaluation of frozen features, on clusters one can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_vit import batches, sparse
from torch.testing import assert_close

from apps.vision.few_shot import draw_shots, extract_features, few_shot, linear_accuracy


def clusters(per_class, spread, seed=0):
    """Three classes around the corners of a triangle in 4 dimensions, of which 2 are noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centers = np.array([[3, 0, 0, 0], [-3, 0, 0, 0], [0, 3, 0, 0]], dtype=float)
    return centers[labels] + spread * rng.standard_normal((len(labels), 4)), labels


def test_shots_are_drawn_class_by_class_and_by_seed():
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 2, 2])
    drawn = draw_shots(labels, 2, seed=0)
    assert labels[drawn].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(drawn.tolist())) == 6
    assert draw_shots(labels, 2, seed=0).tolist() == drawn.tolist()
    assert any(draw_shots(labels, 2, seed=s).tolist() != drawn.tolist() for s in (1, 2, 3))
    with pytest.raises(ValueError, match="3-shot evaluation needs 3 images a class: class 2 has 2"):
        draw_shots(labels, 3, seed=0)


def test_linear_accuracy_is_1_where_a_plane_divides_and_chance_where_nothing_does():
    support, test = clusters(10, 0.3), clusters(100, 0.3, seed=1)
    assert linear_accuracy(*support, *test) == 1.0
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((30, 4)), np.repeat(np.arange(3), 10)
    assert linear_accuracy(*noise, rng.standard_normal((3000, 4)), np.repeat(np.arange(3), 1000)) < 0.5


def test_more_shots_help_and_features_may_be_of_any_scale():
    features, labels = clusters(100, 2.0)
    features = features * [1e4, 1e-4, 1.0, 1.0]
    test = clusters(300, 2.0, seed=1)
    accuracies = few_shot(features, labels, test[0] * [1e4, 1e-4, 1.0, 1.0], test[1], shots=(2, 50), num_seeds=6)
    assert accuracies[50].mean > accuracies[2].mean
    assert accuracies[50].half_width < accuracies[2].half_width
    assert accuracies[2].count == 6


def test_features_are_what_the_head_reads():
    model = sparse()
    data = batches(1)
    features, labels = extract_features(model, data)
    assert features.shape == (8, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with torch.no_grad():
        assert_close(model.head(torch.from_numpy(features)), model(data[0].image))
