"""Images to learn to draw, and the classes to draw of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from apps.base.checks import check_at_least
from apps.base.messages import some
from apps.data.loader import in_order
from apps.vision.data import VisionData

MOST_AT_ONCE = 64
"""Images of a class that are sampled together."""


class Wanted(NamedTuple):
    """Images to be drawn, of one class.

    Attributes:
        label: int64 (B,), the class.
        index: int64 (B,), number of each image among those of its class.
        seed: seed of all images.
    """

    label: Tensor
    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    seed: int


class _Classes:
    """The images to be drawn, in batches of one class, so that an image does not depend on the other classes."""

    def __init__(self, labels: Sequence[int], number: int, seed: int) -> None:
        self.parts = [
            Wanted(torch.full((len(part),), label), part, seed)
            for label in labels
            for part in torch.arange(number).split(MOST_AT_ONCE)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitems__(self, places: Sequence[int]) -> Wanted:
        (place,) = places
        return self.parts[place]


class GenerationData(VisionData):
    """The images of ``VisionData``, for a model that learns to draw such ones.

    Args:
        classes: classes that ``predict`` draws, by name or number, as a list or with commas; None: all.
        number: images that it draws of each.
        kwargs: options of ``VisionData``; ``seed`` also seeds what is drawn. mixup and CutMix are for classifiers.

    Raises:
        ValueError: as ``VisionData``; or a class that is not known.
    """

    def __init__(
        self,
        dataset: str = "digits",
        classes: str | int | list[str | int] | None = None,
        number: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        check_at_least(1, number=number)
        check_at_least(0, seed=self.seed)
        self.classes, self.number = classes, number
        for name in ("mixup_alpha", "cutmix_alpha"):
            if value := getattr(self._augment, name):
                raise ValueError(f"{name}={value} mixes classes, and a generator draws images of one")
        if self.predict_folder is not None:
            raise ValueError(f"predict_folder={self.predict_folder}: a generator reads no images to predict")

    @property
    def needs_no_dataset(self) -> bool:
        return self._adopted is not None

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage == "predict":
            self.predict_dataloader()  # an unknown class is named before weights are read

    def check(self, stage: str | None) -> None:
        super().check(stage)
        if stage == "fit" and (train := self.opened.train) is not None and len(train) < 2:
            raise ValueError(f"{self.title} has {len(train)} training image: a generator needs 2 or more")

    def predict_dataloader(self) -> DataLoader[Any]:
        asked = [part.strip() for part in self.classes.split(",")] if isinstance(self.classes, str) else self.classes
        wanted = asked if isinstance(asked, list) else None if asked is None else [asked]
        labels = range(self.num_classes) if wanted is None else labels_of(wanted, self.class_names)
        return in_order(_Classes(list(labels), self.number, self.seed or 0), 1)


def labels_of(classes: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """Return the numbers of classes that are given by name, or by number where no name is that.

    Raises:
        ValueError: a class is not known, or given twice.
    """
    labels: list[int] = []
    for given in classes:
        text = str(given)
        if text in names:
            label = list(names).index(text)
        elif text.isdecimal() and int(text) < len(names):
            label = int(text)
        else:
            raise ValueError(f"classes={text} is none of the model's {len(names)} classes: {some(list(names), 12)}")
        if label in labels:
            raise ValueError(f"classes={text} is given twice")
        labels.append(label)
    if not labels:
        raise ValueError("classes=[] names no class: leave it out for all")
    return labels
