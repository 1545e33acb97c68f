"""Curves of loss against FLOPs: exact without noise, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from apps.compare.ladder.curves import Fit, Measured


def measured(losses: np.ndarray, flops: float, blocks: int = 1) -> Measured:
    return Measured(flops, 1.0, np.repeat(losses[:, None], blocks, 1), np.full(blocks, 1 / blocks))


def rungs(places, floor, scale, exponent, noise=0.0, seeds=3, generator=None, of_rung=0.0):
    """Return rungs on ``floor + scale x^-exponent`` with relative noise of seeds, and of rungs."""
    generator = generator or np.random.default_rng(0)

    def losses(kind, x):
        mean = floor + scale[kind] * x ** -exponent[kind]
        scatter = noise * generator.standard_normal(seeds) + of_rung * generator.standard_normal()
        return mean * np.exp(scatter)

    return [{kind: measured(losses(kind, x), x * 1e12) for kind in scale} for x in places]


def test_curves_without_noise_are_found_and_lead_to_hand_computed_numbers():
    fit = Fit(rungs([1, 4, 16, 64], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.5, "dense": 0.5}))
    assert fit.loss("sparse", 256e12) == pytest.approx(2 / 16)
    # 4 x^-1/2 = 2 y^-1/2 at y = x / 4.
    assert fit.cheaper("sparse", "dense", 16e12).value == pytest.approx(4)
    assert fit.growth("sparse", "dense", 1e12, 64e12).value == pytest.approx(1)
    assert not fit.tells_floor
    assert fit.num_params == 4


def test_a_floor_is_found_and_a_crossing():
    # 1 + 4 x^-1/2 and 1 + 2 x^-1/4 cross at x^1/4 = 2.
    fit = Fit(rungs([1, 4, 64, 256], 1.0, {"sparse": 4.0, "dense": 2.0}, {"sparse": 0.5, "dense": 0.25}, 1e-4))
    assert fit.tells_floor
    assert fit.num_params == 5
    assert fit.floor().value == pytest.approx(1, rel=0.02)
    assert fit.exponent("sparse").value == pytest.approx(0.5, rel=0.03)
    crossing = fit.crossing("sparse", "dense")
    assert crossing.value == pytest.approx(16e12, rel=0.05)
    assert crossing.low < 16e12 < crossing.high
    assert fit.growth("sparse", "dense", 4e12, 64e12).low > 1


def test_two_rungs_share_an_exponent_and_one_is_no_curve():
    two = rungs([1, 16], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.5, "dense": 0.25}, 0.01)
    fit = Fit(two)
    assert fit.num_params == 3 < 4
    assert fit.exponent("sparse").value == fit.exponent("dense").value == pytest.approx(0.375, rel=0.1)
    with pytest.raises(ValueError, match="got 1 of 2"):
        Fit(two[:1])
    with pytest.raises(ValueError, match="above 0"):
        Fit([{k: measured(np.array([0.0, 1.0]), m.flops) for k, m in rung.items()} for rung in two])


def test_other_examples_widen_what_is_said_of_the_kinds_and_not_the_prediction_on_these():
    generator = np.random.default_rng(0)
    own = rungs([1, 4, 16, 64], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.3, "dense": 0.3}, 0.01)
    share = np.exp(generator.standard_normal(20))
    scattered = [
        {
            kind: Measured(m.flops, 1.0, m.loss_S[:, None] * share / share.mean(), np.full(20, 1 / 20))
            for kind, m in rung.items()
        }
        for rung in own
    ]
    plain, blocks = Fit(own), Fit(scattered)
    assert blocks.loss("sparse", 1e14) == pytest.approx(plain.loss("sparse", 1e14))
    assert blocks.predicted("sparse", 1e14).low == pytest.approx(plain.predicted("sparse", 1e14).low)
    # A share that is the same for all models and rungs changes no ratio of theirs.
    assert blocks.cheaper("sparse", "dense", 4e12).low == pytest.approx(
        plain.cheaper("sparse", "dense", 4e12).low, rel=0.1
    )


@pytest.mark.parametrize(
    ("places", "floor", "of_rung"),
    [
        ([1, 3, 10], 1.5, 0.0),
        pytest.param([1, 3, 10, 30], 0.0, 0.01, marks=pytest.mark.slow),
        pytest.param([1, 3, 10], 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param([1, 3, 10, 30], 0.2, 0.0, marks=pytest.mark.slow),
    ],
)
def test_intervals_of_500_made_ladders_hold_what_comes(places, floor, of_rung):
    scale, exponent = {"sparse": 3.0, "dense": 3.2}, {"sparse": 0.3, "dense": 0.28}
    top, beyond = places[-1], 3 * places[-1]
    cheaper = top / (scale["sparse"] / (scale["dense"] * top ** -exponent["dense"])) ** (1 / exponent["sparse"])
    held = np.zeros(3)
    for seed in range(500):
        generator = np.random.default_rng(seed)
        own, further = (
            rungs(p, floor, scale, exponent, 0.01, generator=generator, of_rung=of_rung) for p in (places, [beyond])
        )
        fit = Fit(own, draws=200)
        for i, kind in enumerate(scale):
            held[i] += fit.predicted(kind, beyond * 1e12).holds(further[0][kind].loss_S.mean())
        held[2] += fit.cheaper("sparse", "dense", top * 1e12).holds(cheaper)
    assert (held / 500 >= 0.9).all(), held / 500
    assert (held / 500 <= 0.99).all(), held / 500


def test_a_rung_may_be_tested_in_other_blocks():
    own = rungs((1, 3, 9), 1.0, {"sparse": 2.0, "dense": 2.2}, {"sparse": 0.3, "dense": 0.3}, noise=0.01)
    other = [*own[:2], {kind: measured(m.loss_S, m.flops, 7) for kind, m in own[2].items()}]
    # Blocks of equal losses change nothing, however many.
    assert Fit(other).predicted("sparse", 3e13) == Fit(own).predicted("sparse", 3e13)
