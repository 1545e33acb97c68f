"""What the data tell models of images and texts, without the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.task import Missing, Sizes


def pair_arguments(given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the sizes of images and texts that the data are told, or that their dataset has."""
    from apps.data.datasets import find
    from apps.registry import import_datasets

    import_datasets()
    spec: Any = find(str(sizes.option("dataset") or "shapes"))
    names = sizes.option("attributes") or spec.attributes
    known = {
        "image_size": sizes.option("image_size") or spec.image_size,
        "max_tokens": sizes.option("max_tokens"),
        "vocab_size": sizes.option("tokenizer", "vocab_size"),
        # Their classes are not known without the data, and cost next to nothing.
        "attributes": dict.fromkeys(names, 1) or None,
    }
    return {name: value for name, value in known.items() if value is not None and given.get(name) is None}


def caption_arguments(given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the sizes of images and texts, whose vocabulary must be told: the output has a row for each of its ids."""
    known = pair_arguments(given, sizes)
    if "vocab_size" not in {**given, **known}:
        raise Missing("the vocabulary's size comes from the data: give --data.tokenizer.vocab_size N")
    return {name: value for name, value in known.items() if name != "attributes"}
