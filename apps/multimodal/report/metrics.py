"""torchmetrics metrics of images with texts: retrieval both ways over a whole split, and the classes of attributes.

A module returns ``PairMetrics`` from ``build_metrics``, and gives it ``PairOutputs`` and ``PairTargets``. Ranks are
pessimistic: every wrong candidate with the score of the right one ranks before it, so that a model whose vectors are
all the same comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from apps.train.step.synced import SyncedMetric, joined

KS = (1, 5, 10)
"""Numbers of best candidates at which recall is measured."""

_WAYS = ("image_to_text_", "text_to_image_")

_SCORED_AT_ONCE = 1024
"""Rows of scores that are in memory at once."""


class PairOutputs(NamedTuple):
    """A model's outputs for a batch of pairs.

    Attributes:
        image_BD, text_BD: float (B, D), the vectors of the images and of the texts.
        logits: (B, C) of the classes of each attribute, by place; empty for a model without attributes.
    """

    image_BD: Tensor
    text_BD: Tensor
    logits: tuple[Tensor, ...] = ()


class PairTargets(NamedTuple):
    """The known facts about a batch of pairs; the fields are as in ``PairBatch``.

    Attributes:
        image_B, caption_B: int64 (B,), numbers of the images and of the texts.
        label_BA: int64 (B, A), the class of each attribute, -1 if it is unknown; None for a model without attributes.
    """

    image_B: Tensor
    caption_B: Tensor
    label_BA: Tensor | None = None


class Ranks(NamedTuple):
    """The rank of the best right candidate of each query, 1 the best.

    Attributes:
        text_I: int64 (I,), for each image the rank of the best of its own texts among all texts.
        image_J: int64 (J,), for each text the rank of the best of its own images among all images.
    """

    text_I: Tensor
    image_J: Tensor


class Gallery(NamedTuple):
    """The different images and texts of many pairs, and which belong together.

    Attributes:
        image_ID, text_JD: float32 vectors, in the order of the images' and of the texts' numbers.
        image_P, text_P: int64 (P,), places of the image and of the text of each pair.
    """

    image_ID: Tensor
    text_JD: Tensor
    image_P: Tensor
    text_P: Tensor

    @classmethod
    def of_pairs(cls, image_PD: Tensor, text_PD: Tensor, number_P: Tensor, caption_P: Tensor) -> Gallery:
        """Return the images and texts of pairs, each once, with the vector of its first pair.

        Args:
            image_PD, text_PD: vectors of each pair's image and text.
            number_P, caption_P: int64 (P,), numbers of the images and of the texts.
        """
        first_I, image_P = _first_of_each(number_P)
        first_J, text_P = _first_of_each(caption_P)
        return cls(image_PD[first_I], text_PD[first_J], image_P, text_P)

    def ranks(self) -> Ranks:
        """Return the ranks both ways."""
        return Ranks(
            best_ranks(self.image_ID, self.text_JD, self.image_P, self.text_P),
            best_ranks(self.text_JD, self.image_ID, self.text_P, self.image_P),
        )


def _first_of_each(number_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the first of each number, in ascending order of the numbers, and each one's place in that."""
    numbers, place_P = number_P.unique(return_inverse=True)
    first = torch.full((len(numbers),), len(number_P), dtype=torch.int64, device=number_P.device)
    places = torch.arange(len(number_P), device=number_P.device)
    return first.scatter_reduce(0, place_P, places, "amin"), place_P


def best_ranks(query_QD: Tensor, candidate_CD: Tensor, query_P: Tensor, candidate_P: Tensor) -> Tensor:
    """Return the rank of each query's best right candidate among all candidates, int64 (Q,), 1 the best.

    It is 1 plus the number of wrong candidates whose dot product with the query is not below the best right one's:
    right ones do not count against each other, ties and NaN count against the model.

    Args:
        query_QD, candidate_CD: float vectors.
        query_P, candidate_P: int64 (P,), the places of queries and of their right candidates; each query has one.
    """
    rank_Q = torch.empty(len(query_QD), dtype=torch.int64, device=query_QD.device)
    order_P = query_P.argsort(stable=True)
    query_P, candidate_P = query_P[order_P], candidate_P[order_P]
    for start in range(0, len(query_QD), _SCORED_AT_ONCE):
        score_SC = query_QD[start : start + _SCORED_AT_ONCE] @ candidate_CD.T
        stop = start + len(score_SC)
        low, high = torch.searchsorted(query_P, torch.tensor([start, stop], device=query_P.device)).tolist()
        is_right_SC = torch.zeros_like(score_SC, dtype=torch.bool)
        is_right_SC[query_P[low:high] - start, candidate_P[low:high]] = True
        right_SC = score_SC.masked_fill(~is_right_SC | score_SC.isnan(), -torch.inf)
        ahead_SC = ~(score_SC < right_SC.amax(1, keepdim=True)) & ~is_right_SC
        rank_Q[start:stop] = 1 + ahead_SC.sum(1)
    return rank_Q


class RetrievalMetrics(SyncedMetric):
    """Recall at k and median rank of images for texts and of texts for images, over all images and texts of a split.

    A text that several images have, and an image that several texts have, is one candidate and one query; each of its
    partners is right. An image is recalled at k if one of its texts is among the k best of all texts (Karpathy and
    Fei-Fei, 1412.2306, section 4.1), and a text likewise. ``compute`` returns ``image_to_text_recall_<k>``,
    ``text_to_image_recall_<k>``, their mean ``recall_<k>``, ``image_to_text_median_rank`` and
    ``text_to_image_median_rank``; NaN without pairs.

    The vectors are kept in float32 on the CPU until the end, and are gathered by every rank.

    Args:
        ks: numbers of best candidates, ascending.

    Raises:
        ValueError: numbers that are not ascending from 1 on.
    """

    higher_is_better = True

    def __init__(self, ks: Sequence[int] = KS) -> None:
        super().__init__()
        self.ks = tuple(ks)
        for name in self._empty():
            self.add_state(name, [], "cat")

    def _empty(self) -> Mapping[str, Tensor]:
        numbers = torch.zeros(0, dtype=torch.int64)
        return {"images": torch.zeros(0), "texts": torch.zeros(0), "numbers": numbers, "captions": numbers}

    def update(self, outputs: PairOutputs, targets: PairTargets) -> None:
        """Add a batch.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        vectors = (outputs.image_BD, outputs.text_BD)
        numbers = (targets.image_B, targets.caption_B)
        for name, vectors_BD in zip(("images", "texts"), vectors, strict=True):
            getattr(self, name).append(vectors_BD.detach().to("cpu", torch.float32))
        for name, number_B in zip(("numbers", "captions"), numbers, strict=True):
            getattr(self, name).append(number_B.detach().to("cpu", torch.int64))

    def gallery(self) -> Gallery:
        """Return the images and texts of the batches so far, each once, on the device of the metric."""
        state = {name: joined(getattr(self, name), empty).to(self.device) for name, empty in self._empty().items()}
        return Gallery.of_pairs(state["images"], state["texts"], state["numbers"], state["captions"])

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all pairs so far, float64 scalars."""
        gallery = self.gallery()
        if not len(gallery.image_P):
            recalls = [f"{way}recall_{k}" for way in ("", *_WAYS) for k in self.ks]
            names = [*recalls, *(f"{way}median_rank" for way in _WAYS)]
            return {name: torch.tensor(torch.nan, dtype=torch.float64) for name in names}
        values: dict[str, Tensor] = {}
        for way, rank_Q in zip(_WAYS, gallery.ranks(), strict=True):
            values |= {f"{way}recall_{k}": (rank_Q <= k).double().mean() for k in self.ks}
            values[f"{way}median_rank"] = rank_Q.double().quantile(0.5)
        means = {f"recall_{k}": torch.stack([values[f"{way}recall_{k}"] for way in _WAYS]).mean() for k in self.ks}
        return {**means, **values}


class AttributeMetrics(SyncedMetric):
    """Accuracy and macro-F1 of each attribute, over all images of a split; an image in several pairs counts once.

    ``compute`` returns ``accuracy_<attribute>``, ``macro_f1_<attribute>`` and ``macro_f1``, the mean over the
    attributes that have one. Images of an unknown class are left out. A class that is neither the class nor the
    answer of any image has no F1 and is left out of the mean, as scikit-learn does it; one that is only one of them
    has 0. An attribute without a known class is NaN.

    Args:
        attributes: number of classes by the attribute's name.
    """

    higher_is_better = True

    def __init__(self, attributes: Mapping[str, int]) -> None:
        super().__init__()
        self.counts = dict(attributes)
        for name in self._empty():
            self.add_state(name, [], "cat")

    def _empty(self) -> Mapping[str, Tensor]:
        rows = torch.zeros(0, len(self.counts), dtype=torch.int64)
        return {"numbers": rows.new_zeros(0), "answers": rows, "labels": rows}

    def update(self, image_B: Tensor, logits: Sequence[Tensor], label_BA: Tensor) -> None:
        """Add a batch: the images' numbers, int64 (B,), the (B, C) logits of each attribute, and int64 (B, A), -1 if a
        class is not known."""
        answer_BA = torch.stack([logits_BC.detach().argmax(1) for logits_BC in logits], 1)
        for name, values in zip(self._empty(), (image_B, answer_BA, label_BA), strict=True):
            getattr(self, name).append(values.to("cpu", torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all images so far, float64 scalars."""
        state = {name: joined(getattr(self, name), empty).to(self.device) for name, empty in self._empty().items()}
        first_I, _ = _first_of_each(state["numbers"])
        columns = (state[name][first_I].T for name in ("answers", "labels"))
        values: dict[str, Tensor] = {}
        f1: list[Tensor] = []
        for (name, count), answer_I, label_I in zip(self.counts.items(), *columns, strict=True):
            known_I = label_I >= 0
            answer_I, label_I = answer_I[known_I], label_I[known_I]
            found = (label_I[answer_I == label_I], answer_I, label_I)
            right_C, told_C, size_C = (classes.bincount(minlength=count).double() for classes in found)
            values[f"accuracy_{name}"] = right_C.sum() / size_C.sum()
            f1_C = 2 * right_C / (told_C + size_C)  # NaN if a class never came
            values[f"macro_f1_{name}"] = f1_C.nanmean()
            f1.append(values[f"macro_f1_{name}"])
        return {"macro_f1": torch.stack(f1).nanmean(), **values} if f1 else {}


class PairMetrics(Metric):
    """``RetrievalMetrics``, and for a model with attributes ``AttributeMetrics``.

    Args:
        ks: numbers of best candidates, ascending.
        attributes: number of classes by the attribute's name; empty: none are predicted.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, ks: Sequence[int] = KS, attributes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.retrieval = RetrievalMetrics(ks)
        self.attributes = AttributeMetrics(attributes) if attributes else None

    def update(self, outputs: PairOutputs, targets: PairTargets) -> None:
        """Add a batch."""
        self.retrieval.update(outputs, targets)
        if self.attributes is not None:
            assert targets.label_BA is not None
            self.attributes.update(targets.image_B, outputs.logits, targets.label_BA)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of both."""
        of_attributes: dict[str, Any] = {} if self.attributes is None else self.attributes.compute()
        return {**self.retrieval.compute(), **of_attributes}

    def reset(self) -> None:
        """Forget the pairs."""
        super().reset()
        self.retrieval.reset()
        if self.attributes is not None:
            self.attributes.reset()
