"""Noise and its removal: how images become noise, what a network predicts of it, and the samplers that go back.

An image x at the noise level t in [0, 1] is ``a(t) x + s(t) e`` with normal noise e; a(0) = 1 and s(0) = 0.

- "flow", rectified flow (arXiv 2209.03003): a = 1 - t, s = t. The network predicts the velocity ``e - x``, and training
  draws t from a logit-normal distribution (arXiv 2403.03206).
- "ddpm" (arXiv 2006.11239) with a cosine schedule (arXiv 2102.09672) of 1,000 levels: a = cos(0.495 pi t), s its sine.
  The network predicts the noise e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import core
from apps.base.checks import check_name
from core.fields import Checked, Count, NotNegative

Process = Literal["flow", "ddpm"]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps noisy images (B, C, H, W), noise levels (B,) and class numbers (B,) to a prediction of the images' shape."""

NUM_BANDS = 10
"""Bands of noise levels of equal width that routers and reports know."""
_ANGLE = 0.495 * math.pi  # at pi / 2 nothing of the image would be left, and the division by a(1) fail
_DDPM_LEVELS = 1000
_GOLDEN = (math.sqrt(5) - 1) / 2


@core.register_config
@dataclass(frozen=True)
class SamplingConfig(Checked):
    """How images are sampled.

    Attributes:
        sampler: "euler", "heun" (two evaluations a step) or "ddim" (arXiv 2010.02502).
        steps: steps from noise to image.
        guidance: classifier-free guidance (arXiv 2207.12598): 1 is the model itself, 0 no class; above 1 images are
            more typical of their class and more alike. Other values than 1 evaluate twice a step.

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "sampling."

    sampler: Literal["euler", "heun", "ddim"] = "heun"
    steps: Count = 20
    guidance: NotNegative = 1.5

    def changed(self, options: Mapping[str, Any]) -> SamplingConfig:
        """Return the configuration with other values of some fields.

        Raises:
            ValueError: no such field, or a value out of its range.
        """
        for name in options:
            check_name("option", name, [field.name for field in fields(self)])
        return replace(self, **options)

    @property
    def evaluations(self) -> int:
        """Forwards of the network for an image."""
        return (2 * self.steps - 1 if self.sampler == "heun" else self.steps) * (1 if self.guidance == 1 else 2)


def coefficients(process: Process, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return a(t) and s(t) of noise levels t."""
    return (1 - level, level) if process == "flow" else ((_ANGLE * level).cos(), (_ANGLE * level).sin())


def levels_of(process: Process, share: Tensor) -> Tensor:
    """Return the noise levels of training below which there are these shares, in (0, 1), of all."""
    if process == "flow":
        return torch.special.ndtri(share).sigmoid()
    return (share * _DDPM_LEVELS).ceil() / _DDPM_LEVELS


def bands(level_B: Tensor) -> Tensor:
    """Return the band of each noise level, int64 (B,) in ``range(NUM_BANDS)``."""
    return (level_B * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)


@dataclass(frozen=True)
class Noised:
    """Noisy images.

    Attributes:
        image: (B, C, H, W).
        level_B: their noise levels.
        target: (B, C, H, W), what a network is to predict.
    """

    image: Tensor
    level_B: Tensor
    target: Tensor


def add_noise(process: Process, image: Tensor, level_B: Tensor, noise: Tensor) -> Noised:
    """Mix images (B, C, H, W) with noise of their shape."""
    a, s = (part.view(-1, 1, 1, 1) for part in coefficients(process, level_B))
    return Noised(a * image + s * noise, level_B, noise - image if process == "flow" else noise)


def seeded_noise(seeds: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Return normal noise (B, *shape) in which a row depends on its own seed and on nothing else."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        state = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        row.normal_(generator=torch.Generator().manual_seed(state))
    return noise


def fixed_levels(process: Process, index_B: Tensor) -> Tensor:
    """Return a noise level of each image by its number, float64 (B,): in steps of the golden ratio they are spread
    evenly over the levels of training."""
    return levels_of(process, ((index_B.double() + 1) * _GOLDEN).frac().clamp(1e-4, 1 - 1e-4))


def fixed_noise(process: Process, image: Tensor, index_B: Tensor) -> Noised:
    """Return images with noise and levels that follow from their numbers, so that a loss can be measured twice."""
    noise = seeded_noise([(0, number) for number in index_B.tolist()], image.shape[1:])
    return add_noise(process, image, fixed_levels(process, index_B).to(image), noise.to(image))


def image_and_noise(
    process: Process, x: Tensor, level_B: Tensor, predicted: Tensor, bounds: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the image and the noise that a prediction takes ``x`` to be made of.

    Args:
        process: of the training.
        x: noisy images (B, C, H, W).
        level_B: their noise levels, above 0.
        predicted: the network's output.
        bounds: least and largest values of an image, (C, 1, 1) each, to which "ddpm" clips it: at high levels it
            divides by a small a(t). None: no bounds.
    """
    a, s = (part.view(-1, 1, 1, 1) for part in coefficients(process, level_B))
    if process == "flow":
        return x - s * predicted, x + a * predicted
    image = (x - s * predicted) / a
    if bounds is None:
        return image, predicted
    image = image.maximum(bounds[0]).minimum(bounds[1])
    return image, (x - a * image) / s


def _velocity(process: Process, level: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    """Return dx/dt on the way between an image and noise."""
    if process == "flow":
        return noise - image
    a, s = coefficients(process, level)
    return _ANGLE * (a * noise - s * image)


@torch.no_grad()
def sample(
    network: Network,
    process: Process,
    noise: Tensor,
    label_B: Tensor,
    config: SamplingConfig,
    null_class: int | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    watch: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Return images (B, C, H, W) made of normal noise of that shape.

    Args:
        network: the trained network.
        process: of its training.
        noise: where to start.
        label_B: class number of each image.
        config: how.
        null_class: number that stands for no class, which guidance needs.
        bounds: as in ``image_and_noise``.
        watch: called before each step with the noise level and the image that the network sees in the noise.

    Raises:
        ValueError: a guidance other than 1 without a null class.
    """
    check_guidance(config.guidance, null_class)

    def parts(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        if config.guidance == 1 or null_class is None:
            predicted = network(x, level.expand(len(x)), label_B)
        else:
            labels = torch.cat((label_B, torch.full_like(label_B, null_class)))
            own, free = network(torch.cat((x, x)), level.expand(2 * len(x)), labels).chunk(2)
            predicted = free + config.guidance * (own - free)
        return image_and_noise(process, x, level.expand(len(x)), predicted, bounds)

    x = noise
    for now, then in pairwise(torch.linspace(1, 0, config.steps + 1).to(noise)):
        image, own_noise = parts(x, now)
        if watch is not None:
            watch(float(now), image)
        if config.sampler == "ddim":
            a, s = coefficients(process, then)
            x = a * image + s * own_noise
            continue
        slope = _velocity(process, now, image, own_noise)
        after = x + (then - now) * slope
        if config.sampler == "heun" and then > 0:  # the network was not trained at level 0
            slope = (slope + _velocity(process, then, *parts(after, then))) / 2
            after = x + (then - now) * slope
        x = after
    return x


def check_guidance(guidance: float, null_class: int | None) -> None:
    """Raise a ``ValueError`` for a guidance without the null class that it is away from."""
    if guidance != 1 and null_class is None:
        raise ValueError(
            f"sampling.guidance={guidance} needs a null class, and class_dropout=0 trains none: give a guidance of 1"
        )
