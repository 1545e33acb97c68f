"""The classes of images without training for them: by the texts that name the classes, and by a linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.multimodal.search.vectors import encode_texts
from apps.vision.few_shot import linear_accuracy

TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.")
"""Texts that name a class, which stands for the braces."""


def check_templates(option: str, templates: Sequence[str]) -> None:
    """Reject templates without a place for the class.

    Raises:
        ValueError: naming the option and the template.
    """
    if not templates:
        raise ValueError(f"{option} is empty: give at least one template, such as {TEMPLATES[1]!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{option}: the template {template!r} must have {{}} once, where the class stands")


def class_vectors(model: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Return a vector of each class: the mean of the vectors of its templates (CLIP, 2103.00020, section 3.1.4), of
    length 1.

    Args:
        model: a ``PairModel`` that is a module.
        classes: names of the C classes.
        templates: texts with ``{}`` for the class.

    Returns:
        float32 (C, dim) on the CPU.
    """
    texts = [template.replace("{}", name) for name in classes for template in templates]
    return F.normalize(encode_texts(model, texts).unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


@dataclass(frozen=True)
class ClassScore:
    """How well the classes of an attribute are told of test images whose class is known.

    Attributes:
        attribute: name of the attribute.
        classes: number of its classes.
        images: number of images with a known class.
        commonest: share of the images in the commonest class: the accuracy of one answer for all.
        zero_shot: accuracy by the texts of the classes; None: not asked.
        probe: accuracy of a linear classifier of training images' vectors; None: not asked, or the training images
            have fewer than two classes.
    """

    attribute: str
    classes: int
    images: int
    commonest: float
    zero_shot: float | None = None
    probe: float | None = None


def zero_shot_accuracy(image_ND: Tensor, label_N: Tensor, class_CD: Tensor) -> float:
    """Return the share of images whose own class has the largest dot product of all; a tie is not an answer.

    Args:
        image_ND: float (N, D), the vectors of images.
        label_N: int64 (N,), their classes.
        class_CD: float (C, D), the vectors of the classes; those without an image may be answered too.
    """
    score_NC = image_ND @ class_CD.T
    own_N1 = score_NC.gather(1, label_N[:, None])
    beaten_N = ~(score_NC < own_N1)
    return float((beaten_N.sum(1) == 1).double().mean())


def class_scores(
    image_ND: Tensor,
    label_NA: Tensor,
    attributes: Mapping[str, Sequence[str]],
    texts: Mapping[str, Tensor] | None = None,
    labeled: tuple[Tensor, Tensor] | None = None,
) -> list[ClassScore]:
    """Return the scores of the attributes that have a test image of a known class.

    Args:
        image_ND: float (N, D), the vectors of the test images.
        label_NA: int64 (N, A), their classes, -1 if one is not known.
        attributes: the names of each attribute's classes.
        texts: ``class_vectors`` of the attributes that are told by texts.
        labeled: vectors and classes of training images, for the linear probe; None: there is none.
    """
    scores = []
    for a, (name, classes) in enumerate(attributes.items()):
        known_N = label_NA[:, a] >= 0
        image_KD, label_K = image_ND[known_N], label_NA[known_N, a]
        if not len(label_K):
            continue
        commonest = float(label_K.bincount().max()) / len(label_K)
        of_texts = None if texts is None else texts.get(name)
        zero_shot = None if of_texts is None else zero_shot_accuracy(image_KD, label_K, of_texts)
        probe = None if labeled is None else _probe(*labeled, a, image_KD, label_K)
        scores.append(ClassScore(name, len(classes), len(label_K), commonest, zero_shot, probe))
    return scores


def _probe(vector_MD: Tensor, label_MA: Tensor, a: int, image_KD: Tensor, label_K: Tensor) -> float | None:
    """Return the accuracy of ``apps.vision.few_shot.linear_accuracy`` for one attribute."""
    known_M = label_MA[:, a] >= 0
    label_M = label_MA[known_M, a]
    if len(label_M.unique()) < 2:
        return None
    arrays = (np.asarray(x) for x in (vector_MD[known_M], label_M, image_KD, label_K))
    return linear_accuracy(*arrays)


def image_vectors(model: Any, batches: Any, most: int) -> tuple[Tensor, Tensor]:
    """Return the vectors and classes of the first images of batches, each image once.

    Args:
        model: a ``PairModel`` that is a module, in evaluation.
        batches: batches of pairs.
        most: number of images, to the end of a batch.

    Returns:
        float32 (M, dim) and int64 (M, A), on the CPU.
    """
    seen: set[int] = set()
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        if len(seen) >= most:
            break
        numbers = batch.image_B.tolist()
        first = {number: place for place, number in reversed(list(enumerate(numbers))) if number not in seen}
        places = torch.tensor(sorted(first.values()), dtype=torch.int64)
        seen |= first.keys()
        if len(places):
            vectors.append(model.image_vectors(batch.image[places].to(model.device)).float().cpu())
            labels.append(batch.label_BA[places].cpu())
    if not vectors:
        return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64)
    return torch.cat(vectors), torch.cat(labels)
