"""The classes of attributes, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apps.multimodal.pairs import RawPairs


def classes_of(pairs: RawPairs, is_train_I: NDArray[np.bool_]) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of each attribute, sorted: the values that training images have.

    Args:
        pairs: the pairs.
        is_train_I: which images are trained on.

    Raises:
        ValueError: an attribute has fewer than two classes.
    """
    classes = {}
    for name, values in pairs.labels.items():
        known = {value for value, is_train in zip(values, is_train_I, strict=True) if is_train and value is not None}
        if len(known) < 2:
            has = f"only {known.pop()!r}" if known else "no value"
            raise ValueError(f"attribute {name!r} has {has} in the training images: there is nothing to learn")
        classes[name] = tuple(sorted(known))
    return classes


def numbered(pairs: RawPairs, classes: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the class of each attribute of each image, int64 (I, A); -1 where it is not known or no class."""
    columns = []
    for name, names in classes.items():
        number: dict[str | None, int] = {value: i for i, value in enumerate(names)}
        values = pairs.labels.get(name, [None] * len(pairs.images))
        columns.append(torch.tensor([number.get(value, -1) for value in values]))
    return torch.stack(columns, 1) if columns else torch.empty(len(pairs.images), 0, dtype=torch.int64)


def lacking(label_IA: Tensor, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the classes of each attribute that no image has, without the attributes whose classes all have one.

    Args:
        label_IA: int64 (I, A), the class of each attribute of some images, -1 where it is not known.
        classes: names of the classes of each attribute.
    """
    absent = {}
    for labels, (name, names) in zip(label_IA.unbind(1), classes.items(), strict=True):
        present = set(labels.tolist())
        if without := [value for i, value in enumerate(names) if i not in present]:
            absent[name] = without
    return absent
