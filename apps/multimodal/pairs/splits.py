"""Splits of images with captions that share neither an image nor a caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.data.splits import Split, connected, count_of, hold_out

_MOST_HELD_OUT = 5_000


def split_images(
    split_I: Sequence[Split | None],
    image_N: NDArray[np.int64],
    texts: Sequence[str],
    sizes: dict[Split, int | float | None],
    seed: int,
    files: Sequence[str | os.PathLike[str]] = (),
) -> NDArray[Any]:
    """Return the split of each image, by its name: the files' own, else a sampled one; "" of an image without captions.

    Images are sampled from the ones that are not for validation or test. Two with a caption or a file in common stay
    together.

    Args:
        split_I: the split of each image by the files; None: they do not say.
        image_N: the image of each pair.
        texts: the caption of each pair.
        sizes: number or share of the images that "test" and "val" get; None: a tenth, and at most 5,000, if the files
            have none of their own.
        seed: the only source of randomness.
        files: the file of each image; none: they have none of their own.

    Raises:
        ValueError: a size although the files have images for the split, or one that leaves no image to train on, or is
            too small for images that belong together.
    """
    splits = np.array([split or "train" for split in split_I], dtype="<U5")
    splits[np.setdiff1d(np.arange(len(splits)), image_N)] = ""
    own, free = set(splits.tolist()), np.flatnonzero(splits == "train")
    counts: dict[Split, int] = {}
    for split, size in sizes.items():
        if split not in own:
            by_default = min(round(0.1 * len(free)), _MOST_HELD_OUT)
            counts[split] = by_default if size is None else count_of(size, len(free))
        elif size is not None:
            raise ValueError(f"{split}_size={size}: the files have {split} images of their own: leave it out")
    if not any(counts.values()):
        return splits
    asked = " and ".join(f"{split}_size={count:,}" for split, count in counts.items())
    if sum(counts.values()) >= len(free):
        raise ValueError(f"{asked} leave none of the {len(free):,} images to train on")
    shared_N = np.concatenate([image_N, np.arange(len(files))])
    group_F = groups_of(shared_N, [*texts, *map(os.path.realpath, files)], len(splits))[free]
    for (split, count), at in zip(counts.items(), hold_out(group_F, list(counts.values()), seed), strict=True):
        splits[free[at]] = split
        if count and not len(at):
            most = int(np.bincount(group_F).max())
            raise ValueError(
                f"{asked} of {len(free):,} images: none fit into {split}, for images with a caption or a file in "
                f"common stay together, and up to {most:,} have"
            )
    return splits


def num_trained(texts: Sequence[str], split_N: NDArray[Any], split: Split) -> int:
    """Return how many captions of a split are captions of training images too."""
    trained = {key_of(text) for text, own in zip(texts, split_N, strict=True) if own == "train"}
    return sum(own == split and key_of(text) in trained for text, own in zip(texts, split_N, strict=True))


def key_of(text: str, lower_case: bool = True) -> str:
    """Return what two captions have in common that count as one: spaces and, unless told otherwise, case aside."""
    return " ".join((text.lower() if lower_case else text).split())


def groups_of(image_N: NDArray[np.int64], texts: Sequence[str], num_images: int) -> NDArray[np.int64]:
    """Number the images so that two of one caption have one number, also where other images link them.

    Args:
        image_N: the image of each pair.
        texts: the caption of each pair.
        num_images: I, the number of images.

    Returns:
        int64 (I,), numbers from 0 on.
    """
    number: dict[str, int] = {}
    text_N = np.array([number.setdefault(key_of(text), len(number)) for text in texts], np.int64)
    return connected(image_N, text_N, num_images)
