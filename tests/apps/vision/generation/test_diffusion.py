"""Noise, its removal and the samplers, on numbers that one can check by hand."""

import math

import pytest
import torch
from refusals import refused
from torch.testing import assert_close

from apps.vision.generation.diffusion import (
    SamplingConfig,
    add_noise,
    bands,
    coefficients,
    fixed_levels,
    fixed_noise,
    image_and_noise,
    levels_of,
    sample,
    seeded_noise,
)

IMAGE = torch.full((1, 1, 2, 2), 2.0)
NOISE = torch.full((1, 1, 2, 2), -1.0)
LABEL = torch.zeros(1, dtype=torch.int64)


def test_each_process_goes_from_image_to_noise_in_its_way():
    # 3/4 * 2 + 1/4 * (-1) = 1.25; -1 - 2 = -3
    noised = add_noise("flow", IMAGE, torch.tensor([0.25]), NOISE)
    assert_close(noised.image, torch.full_like(IMAGE, 1.25))
    assert_close(noised.target, torch.full_like(IMAGE, -3.0))
    a, s = coefficients("ddpm", torch.tensor([0.0, 0.5, 1.0]))
    assert_close(a.square() + s.square(), torch.ones(3))
    assert_close(a[1], torch.tensor(math.cos(0.2475 * math.pi)))
    noised = add_noise("ddpm", IMAGE, torch.tensor([0.5]), NOISE)
    assert_close(noised.image[0, 0, 0, 0], 2 * a[1] - s[1])
    assert_close(noised.target, NOISE)


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_the_true_prediction_gives_back_image_and_noise(process):
    noised = add_noise(process, IMAGE, torch.tensor([0.3]), NOISE)
    image, noise = image_and_noise(process, noised.image, noised.level_B, noised.target)
    assert_close(image, IMAGE)
    assert_close(noise, NOISE)


def test_ddpm_clips_the_image_to_its_bounds_and_finds_the_noise_that_is_left():
    level = torch.tensor([0.5])
    a, s = coefficients("ddpm", level)
    bounds = (torch.tensor(-1.0), torch.tensor(1.0))
    x = a * IMAGE + s * NOISE
    image, noise = image_and_noise("ddpm", x, level, NOISE, bounds)
    assert_close(image, torch.ones_like(IMAGE))  # 2 is cut to 1
    assert_close(a * image + s * noise, x)


def test_levels_are_the_quantiles_of_training():
    # logit-normal: the median is sigmoid(0) = 1/2, and 84.13 % lie below sigmoid(1)
    assert_close(levels_of("flow", torch.tensor([0.5, 0.841345])), torch.tensor([0.5, 1 / (1 + math.exp(-1))]))
    assert levels_of("ddpm", torch.tensor([0.0001, 0.0015, 0.9999])).tolist() == pytest.approx([0.001, 0.002, 1.0])
    assert bands(torch.tensor([0.0, 0.05, 0.1, 0.99, 1.0])).tolist() == [0, 0, 1, 9, 9]


def test_the_noise_of_an_image_follows_from_its_number_and_nothing_else():
    image = torch.zeros(3, 1, 2, 2)
    whole = fixed_noise("flow", image, torch.tensor([5, 9, 7]))
    alone = fixed_noise("flow", image[:1], torch.tensor([9]))
    assert torch.equal(whole.image[1:2], alone.image)
    assert_close(whole.level_B[1], alone.level_B[0])
    assert not torch.equal(whole.image[0], whole.image[1])
    level = fixed_levels("flow", torch.arange(1000))
    assert 0.48 < float((level < 0.5).double().mean()) < 0.52  # half of the levels lie below the median
    assert not torch.equal(seeded_noise([(0, 1)], (4,)), seeded_noise([(1, 1)], (4,)))


def straight(x, level_B, label_B):
    """The network of a single image 2 from any noise: it knows where the line began."""
    return (x - 2.0) / level_B.view(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
def test_every_sampler_follows_a_straight_line_to_its_end(sampler):
    found = sample(straight, "flow", NOISE, LABEL, SamplingConfig(sampler, 3, 1.0))
    assert_close(found, torch.full_like(NOISE, 2.0))


@pytest.mark.parametrize(("sampler", "steps", "error"), [("ddim", 3, 1e-4), ("euler", 200, 1e-4), ("heun", 50, 1e-3)])
def test_every_sampler_follows_the_curve_of_ddpm_to_its_end(sampler, steps, error):
    # The noise of a single image 0.5 is (x - 0.5 a) / s: x = 0.5 a + s e, of which DDIM makes no error.
    def network(x, level_B, label_B):
        a, s = coefficients("ddpm", level_B.view(-1, 1, 1, 1))
        return (x - 0.5 * a) / s

    found = sample(network, "ddpm", NOISE, LABEL, SamplingConfig(sampler, steps, 1.0))
    assert float((found - 0.5).abs().max()) < error


def test_ddim_is_euler_on_a_flow_and_not_on_ddpm():
    network = lambda x, level_B, label_B: torch.sin(3 * x) + level_B.view(-1, 1, 1, 1)  # noqa: E731
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, dtype=torch.int64)
    bounds = (torch.tensor(-1.0), torch.tensor(1.0))
    found = {
        (process, sampler): sample(network, process, noise, label, SamplingConfig(sampler, 4, 1.0), bounds=bounds)
        for process in ("flow", "ddpm")
        for sampler in ("euler", "ddim")
    }
    assert_close(found["flow", "euler"], found["flow", "ddim"])
    assert (found["ddpm", "euler"] - found["ddpm", "ddim"]).abs().max() > 0.01
    assert found["ddpm", "ddim"].abs().max() <= 1.0


def test_guidance_goes_on_beyond_the_class_and_evaluates_once_for_both():
    calls = []

    def network(x, level_B, label_B):
        calls.append(label_B.tolist())
        return -label_B.view(-1, 1, 1, 1).float().expand_as(x)

    # One step of 1: x + velocity back. Class 3 has velocity -3, no class (7) has -7: -7 + 2 * (-3 + 7) = 1.
    found = sample(network, "flow", NOISE, LABEL + 3, SamplingConfig("euler", 1, 2.0), null_class=7)
    assert calls == [[3, 7]]
    assert_close(found, NOISE - 1.0)
    with pytest.raises(ValueError, match=r"sampling\.guidance=2\.0 needs a null class"):
        sample(network, "flow", NOISE, LABEL, SamplingConfig("euler", 1, 2.0))


def test_evaluations_are_counted():
    # Heun: two a step but the last, times two for guidance.
    assert SamplingConfig("heun", 20, 1.5).evaluations == 78
    assert SamplingConfig("euler", 20, 1.0).evaluations == 20
    seen = []
    sample(lambda x, t, y: seen.append(len(x)) or x, "flow", NOISE, LABEL, SamplingConfig("heun", 5, 1.5), null_class=1)
    assert sum(seen) == SamplingConfig("heun", 5, 1.5).evaluations


def test_options_out_of_their_range():
    refused(r"sampling\.steps=0 is not at least 1", SamplingConfig, steps=0)
    refused("option='step' is not one of sampler, steps, guidance", SamplingConfig().changed, {"step": 3})
    assert SamplingConfig().changed({"steps": 3}) == SamplingConfig(steps=3)
