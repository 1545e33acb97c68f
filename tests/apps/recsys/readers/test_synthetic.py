"""Made tasks: the correlation that is asked for, and the one the labels are said to have."""

import math

import numpy as np
import pytest

from apps.recsys.readers.synthetic import SyntheticConfig, generate, label_correlation


@pytest.mark.parametrize("p", [-1.0, 0.5])
def test_weights_have_the_chosen_cosine_and_length(p):
    made = generate(SyntheticConfig(p, num_rows=10, scale=2.0))
    # |w|^2 = c^2 = 4, w_1 . w_2 = c^2 p
    assert np.allclose(made.weights @ made.weights.T, [[4, 4 * p], [4 * p, 4]], atol=1e-12)
    three = generate(SyntheticConfig(max(p, -0.5), num_rows=10, num_tasks=3))
    assert np.allclose(three.weights @ three.weights.T, (1 - max(p, -0.5)) * np.eye(3) + max(p, -0.5), atol=1e-12)


@pytest.mark.parametrize("p", [-0.8, 0.0, 0.5])
def test_linear_tasks_have_the_closed_form_of_two_signs(p):
    # Without sines, and noise too, y_1 and y_2 are normal with correlation r = p c^2 / (c^2 + noise^2), and the signs
    # of two such have correlation 2 / pi arcsin r (Sheppard).
    config = SyntheticConfig(p, alphas=(), betas=(), noise_std=0.5)
    threshold, correlation = label_correlation(config)
    assert threshold == pytest.approx(0, abs=1e-9)
    assert correlation == pytest.approx(2 / math.pi * math.asin(p / 1.25), abs=1e-6)


@pytest.mark.parametrize(("p", "positives"), [(0.0, 0.5), (0.6, 0.2), (-0.5, 0.5), (1.0, 0.5)])
def test_the_labels_have_the_correlation_and_the_share_that_are_said(p, positives):
    made = generate(SyntheticConfig(p, num_rows=40_000, num_features=4, positives=positives))
    correlation = np.corrcoef(made.label.T)[0, 1]
    # standard errors: of a correlation at most 1 / sqrt(40000) = 0.005, of a share at most 0.0025
    assert correlation == pytest.approx(made.label_correlation, abs=0.02)
    assert made.label.mean(0) == pytest.approx([positives] * 2, abs=0.01)
    if p == 0:
        assert made.label_correlation == pytest.approx(0, abs=1e-9)


def test_the_seed_decides_and_y_is_the_formula_of_the_paper():
    a, b = (generate(SyntheticConfig(num_rows=20)) for _ in range(2))
    assert np.array_equal(a.x, b.x)
    assert np.array_equal(a.label, b.label)
    assert not np.array_equal(a.x, generate(SyntheticConfig(num_rows=20, seed=1)).x)
    config = SyntheticConfig(0.3, num_rows=50, num_features=5, scale=2.0, noise_std=0.0)
    made = generate(config)
    for k in range(2):
        s = made.x @ made.weights[k]
        y = s + sum(np.sin(a * s + b) for a, b in zip(config.alphas, config.betas, strict=True))
        assert np.allclose(made.y[:, k], y, atol=1e-12)


def test_ids_are_drawn_as_one_over_their_rank_and_move_the_labels_and_their_share():
    config = SyntheticConfig(num_rows=40_000, num_ids=1000, id_std=0.0)
    made, without = generate(config), generate(SyntheticConfig(num_rows=40_000))
    assert np.array_equal(made.x, without.x)
    assert np.array_equal(made.y, without.y)
    # floor(1000^u) = i, which is id i - 1, has the probability log((i + 1) / i) / log 1000, at most 0.1: the standard
    # error of a share is at most 0.0015.
    for i in (1, 2, 10):
        expected = math.log((i + 1) / i) / math.log(1000)
        assert (made.ids == i - 1).mean() == pytest.approx(expected, abs=0.008)
    assert made.ids.min() == 0
    assert made.ids.max() < 1000
    moved = generate(SyntheticConfig(num_rows=40_000, num_ids=1000, id_std=2.0))
    shift = moved.y - without.y
    # Rows of an id are moved alike, each task by its own number.
    for i in range(5):
        assert np.allclose(shift[moved.ids == i], shift[moved.ids == i][0], atol=1e-9)
    assert abs(shift[moved.ids == 0][0, 0] - shift[moved.ids == 0][0, 1]) > 1e-3
    made = generate(SyntheticConfig(num_rows=20_000, num_ids=10**9, id_std=2.0, positives=0.2))
    # Half of the rows have ids of their own; what the frequent ones add is common to many rows, so the share is rough.
    assert made.label.mean() == pytest.approx(0.2, abs=0.06)
    table = made.tables()
    assert (table.config.categorical, table.train["id"].to_pylist()[:3]) == (("id",), made.ids[:3].tolist())
