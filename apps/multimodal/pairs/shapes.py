"""``shapes``: synthetic images of one colored shape, each with a sentence that describes it completely.

Nothing is read or fetched: all is computed from one seed, in half a second. No two images show the same, so that every
sentence has one right image; a test image was never seen in training as a whole, only its parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apps.base.checks import check_name
from apps.data.splits import Split
from apps.multimodal.pairs.images import DrawnImages
from apps.multimodal.pairs.pairs import RawPairs, ReadOptions

SIDE = 32
"""Height and width of an image in pixels."""

SIZES: dict[Split, int] = {"train": 2000, "val": 250, "test": 250}
"""Number of images of each split."""

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "turquoise": (40, 190, 190),
    "blue": (45, 85, 210),
    "purple": (130, 60, 180),
    "pink": (240, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent")
RADIUS = {"small": 5.0, "large": 8.0}
TEXTURES = ("plain", "striped", "dotted")
PLACES = {"left": (-7, 0), "right": (7, 0), "top": (0, -7), "bottom": (0, 7), "middle": (0, 0)}
BACKGROUND = {"dark": 45, "light": 215}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADIUS),
    "texture": TEXTURES,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUND),
}
"""The classes of each attribute."""

_WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
TEMPLATES = (
    "a {size} {texture} {colour} {shape} {where} of a {background} picture",
    "{where} of the {background} image there is a {size} {colour} {shape}, {texture}",
    "a {background} background with one {texture} {shape} {where}, {colour} and {size}",
    "a {colour} {shape}, {size} and {texture}, stands {where} on {background} ground",
    "this {background} picture shows a {size} {shape} {where}: it is {texture} and {colour}",
)
"""Sentences with the attributes' classes; ``where`` is the place in words."""


def read_shapes(attributes: Sequence[str] = tuple(ATTRIBUTES), seed: int = 0) -> RawPairs:
    """Draw the images and write their sentences.

    Args:
        attributes: names of the attributes that are labels.
        seed: seed of everything.

    Returns:
        2,500 pairs with their splits, 2,000 of them to train on.

    Raises:
        ValueError: there is no such attribute.
    """
    for name in attributes:
        check_name("attributes", name, list(ATTRIBUTES))
    random = np.random.RandomState(seed)
    num = sum(SIZES.values())
    every = np.array(list(itertools.product(*(range(len(classes)) for classes in ATTRIBUTES.values()))))
    class_NA = every[random.permutation(len(every))[:num]]
    pixels = _draw(class_NA, random)
    labels = {
        name: [classes[c] for c in class_NA[:, a].tolist()] for a, (name, classes) in enumerate(ATTRIBUTES.items())
    }
    template_N = random.randint(len(TEMPLATES), size=num).tolist()
    texts = []
    for n, template in enumerate(template_N):
        words = {name: values[n] for name, values in labels.items()}
        texts.append(TEMPLATES[template].format(where=_WHERE[words["place"]], **words))
    split: list[Split | None] = [name for name, size in SIZES.items() for _ in range(size)]
    chosen = {name: labels[name] for name in attributes}
    return RawPairs(DrawnImages(torch.from_numpy(pixels)), np.arange(num), texts, chosen, split)


def read_known(folder: Path, options: ReadOptions) -> RawPairs:
    """Return the pairs with the attributes of the options that the images have, or that must be there."""
    return read_shapes([name for name in options.attributes if name in ATTRIBUTES or not options.optional])


def _draw(class_NA: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.uint8]:
    """Return the images of classes (N, A), uint8 (N, 3, SIDE, SIDE)."""
    num = len(class_NA)
    colour_N, shape_N, size_N, texture_N, place_N, background_N = class_NA.T
    center_N2 = SIDE / 2 - 0.5 + np.array(list(PLACES.values()))[place_N] + random.uniform(-1, 1, (num, 2))
    radius_N = np.array(list(RADIUS.values()))[size_N] * random.uniform(0.92, 1.05, num)
    grid = np.arange(SIDE, dtype=np.float32)
    radius = radius_N[:, None, None].astype(np.float32)
    x, y = (  # in units of the radius, from the center
        np.broadcast_to((axis - center_N2[:, i, None, None]).astype(np.float32) / radius, (num, SIDE, SIDE))
        for i, axis in ((0, grid[None, None, :]), (1, grid[None, :, None]))
    )
    distance = np.empty((num, SIDE, SIDE), np.float32)
    for number, name in enumerate(SHAPES):
        rows = shape_N == number
        distance[rows] = _distance(name, x[rows], y[rows])
    inside = np.clip(0.5 - distance * radius, 0, 1)[:, None]  # the edge is a pixel wide
    ground = np.array(list(BACKGROUND.values()))[background_N][:, None, None, None] + random.normal(
        0, 8, (num, 1, SIDE, SIDE)
    )
    paint = np.array(list(COLOURS.values()))[colour_N] * random.uniform(0.9, 1.0, (num, 1))
    dark = _darkened(texture_N)[:, None]
    image = inside * paint[:, :, None, None] * (1 - 0.65 * dark) + (1 - inside) * ground
    return np.clip(image.round(), 0, 255).astype(np.uint8)


def _darkened(texture_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return where the paint of each texture is dark, 0 or 1 (N, SIDE, SIDE)."""
    place = np.arange(SIDE)
    stripes = np.broadcast_to((place % 4 < 2)[:, None], (SIDE, SIDE))
    dots = (place % 3 == 0)[:, None] & (place % 3 == 0)[None, :]
    of_texture = {"plain": np.zeros((SIDE, SIDE)), "striped": stripes, "dotted": dots}
    return np.stack([of_texture[name] for name in TEXTURES]).astype(np.float32)[texture_N]


def _distance(shape: str, x: NDArray[Any], y: NDArray[Any]) -> Any:
    """Return the distance from a shape's edge in units of its radius, negative inside; y grows downwards."""
    far = np.hypot(x, y)
    if shape == "circle":
        return far - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8
    if shape == "diamond":
        return (abs(x) + abs(y) - 1.1) / np.float32(np.sqrt(2))
    if shape == "triangle":
        return np.maximum(y - 0.7, (1.732 * abs(x) - y) / 2 - 0.5)
    if shape == "cross":
        return np.maximum(np.minimum(abs(x), abs(y)) - 0.27, np.maximum(abs(x), abs(y)) - 0.95)
    if shape == "ring":
        return abs(far - 0.72) - 0.23
    if shape == "star":
        return far - (0.66 + 0.30 * np.cos(5 * (np.arctan2(y, x) + np.float32(np.pi / 2))))
    return np.maximum(far - 0.95, 0.8 - np.hypot(x - 0.5, y))  # a crescent: a circle without another one
