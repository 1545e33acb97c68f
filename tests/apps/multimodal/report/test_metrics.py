"""Metrics of images with texts: by hand, against a slow loop and scikit-learn, and the same on two ranks as on one."""

import math
import statistics

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from two_ranks import on_two_ranks

from apps.multimodal.report.metrics import AttributeMetrics, PairMetrics, PairOutputs, PairTargets, RetrievalMetrics


def values_of(metric: torch.nn.Module) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def retrieval(image_PD: Tensor, text_PD: Tensor, image_P: Tensor, caption_P: Tensor, ks=(1, 2, 5)) -> dict[str, float]:
    """Return the metrics of pairs that come in two batches."""
    metric = RetrievalMetrics(ks)
    for part in (slice(0, 2), slice(2, None)):
        metric.update(PairOutputs(image_PD[part], text_PD[part]), PairTargets(image_P[part], caption_P[part]))
    return values_of(metric)


def test_ranks_by_hand_and_without_a_pair():
    # Products of 3 images (rows) and 3 texts: text 0 is 0.9 for image 0, first of (0.9, 0.8, 0.1). Image 1: its text
    # has 0.5, behind 0.6. Image 2: its text has 0.2, behind 0.7 and 0.3. So images rank their texts 1, 2, 3.
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.6, 0.5, 0.4], [0.7, 0.3, 0.2]])
    # Columns: text 0 ranks 0.9 first of (0.9, 0.6, 0.7); text 1: 0.5 second behind 0.8; text 2: 0.2 second behind 0.4.
    values = retrieval(torch.eye(3), scores.T, torch.tensor([10, 11, 12]), torch.tensor([5, 6, 7]))
    medians = {"image_to_text_median_rank": 2.0, "text_to_image_median_rank": 2.0}
    recalls = {"image_to_text": (1 / 3, 2 / 3, 1), "text_to_image": (1 / 3, 1, 1), "": (1 / 3, 5 / 6, 1)}
    each = {f"{way}_recall_{k}".lstrip("_"): own[i] for way, own in recalls.items() for i, k in enumerate((1, 2, 5))}
    assert values == pytest.approx(each | medians)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        values = values_of(RetrievalMetrics())
    assert set(values) == set(retrieval(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3), ks=(1, 5, 10)))
    assert all(math.isnan(value) for value in values.values())
    for value in (1.0, math.nan):
        same = torch.full((50, 4), value)
        values = retrieval(same, same, torch.arange(50), torch.arange(50), ks=(1, 10))
        assert values["recall_10"] == 0.0
        assert values["image_to_text_median_rank"] == values["text_to_image_median_rank"] == 50.0


def test_an_image_of_many_texts_and_a_text_of_many_images_are_one():
    # Image 0 has the texts 0, 1 and 2, with products 0.3, 0.8, 0.9; text 3, of image 1, has 0.5 with image 0.
    image_PD = torch.eye(2)[[0, 0, 0, 1]]
    text_PD = torch.tensor([[0.3, 0.0], [0.8, 0.0], [0.9, 0.0], [0.5, 0.4]])
    values = retrieval(image_PD, text_PD, torch.tensor([0, 0, 0, 1]), torch.arange(4), ks=(1, 2))
    assert values["image_to_text_recall_1"] == 1.0  # image 1 has 0.4 with its own text, 0 with the others
    # Texts 0, 1 and 2 rank image 0 first; text 3 has 0.5 with image 0 and 0.4 with its own: rank 2.
    assert (values["text_to_image_recall_1"], values["recall_1"]) == (3 / 4, 7 / 8)
    # Text 0 belongs to images 0 and 1; it is one candidate, and right for both. Its rank is that of the better image.
    image_PD = torch.tensor([[1.0, 0.0], [0.2, 0.0], [0.9, 0.1]])
    text_PD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    values = retrieval(image_PD, text_PD, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), ks=(1,))
    # Image 2 has 0.9 with text 0 and 0.1 with its own; both texts have their image first.
    assert (values["image_to_text_recall_1"], values["text_to_image_recall_1"]) == (pytest.approx(2 / 3), 1.0)


def slow_ranks(scores: list[list[float]], right: list[set[int]]) -> list[int]:
    """Return the rank of each row's best right column, by a loop: ties count against it."""
    ranks = []
    for row, own in zip(scores, right, strict=True):
        best = max(row[c] for c in own)
        ranks.append(1 + sum(value >= best for c, value in enumerate(row) if c not in own))
    return ranks


@pytest.mark.parametrize("chunk", [4, 1024])
def test_equal_to_a_loop(monkeypatch, chunk):
    monkeypatch.setattr("apps.multimodal.report.metrics._SCORED_AT_ONCE", chunk)
    generator = torch.Generator().manual_seed(0)
    # 60 pairs of 20 images and 30 texts, so that both have several partners; small whole numbers, so that many tie.
    image_P, caption_P = (torch.randint(n, (60,), generator=generator) for n in (20, 30))
    image_ND, text_ND = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (20, 30))
    values = retrieval(image_ND[image_P], text_ND[caption_P], image_P, caption_P)
    pairs = {(int(i), int(c)) for i, c in zip(image_P, caption_P, strict=True)}
    images, texts = (sorted(set(column)) for column in zip(*pairs, strict=True))
    scores = [[float(image_ND[i] @ text_ND[c]) for c in texts] for i in images]
    of_image = [{texts.index(c) for j, c in pairs if j == i} for i in images]
    of_text = [{images.index(i) for i, d in pairs if d == c} for c in texts]
    columns = [list(column) for column in zip(*scores, strict=True)]
    by_way = {"image_to_text": slow_ranks(scores, of_image), "text_to_image": slow_ranks(columns, of_text)}
    for way, ranks in by_way.items():
        assert values[f"{way}_median_rank"] == statistics.median(ranks)
        for k in (1, 2, 5):
            assert values[f"{way}_recall_{k}"] == pytest.approx(sum(r <= k for r in ranks) / len(ranks))


def test_macro_f1_by_hand_and_as_scikit_learn_has_it_of_each_image_once():
    # Classes of the first attribute: 0 0 1 1, and answers 0 1 1 1: F1 of 0 is 2/3, of 1 is 4/5. Class 2 never comes and
    # is left out. The last example is of no known class.
    metric = AttributeMetrics({"colour": 3, "size": 2})
    colour, size = torch.eye(3)[[0, 1, 1, 1, 2]], torch.eye(2)[[0, 1, 0, 1, 0]]
    label_BA, image_B = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0], [-1, -1]]), torch.arange(5)
    metric.update(image_B[:3], [colour[:3], size[:3]], label_BA[:3])
    metric.update(image_B[3:], [colour[3:], size[3:]], label_BA[3:])
    values = values_of(metric)
    # Size: classes 0 1 0 0, answers 0 1 0 1: F1 of 0 is 4/5, of 1 is 2/3.
    assert values["macro_f1_colour"] == values["macro_f1_size"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert values["accuracy_colour"] == values["accuracy_size"] == 3 / 4
    metric.reset()
    metric.update(image_B[4:], [colour[4:], size[4:]], label_BA[4:])
    assert all(math.isnan(value) for value in values_of(metric).values())
    # Image 0 is right in four pairs of two batches, image 1 is wrong in one: half of the images. Class 0 has two
    # answers and one image, F1 2/3; class 1 has 0.
    metric = AttributeMetrics({"colour": 2})
    for images in ([0, 0, 1], [0, 0]):
        image_B = torch.tensor(images)
        metric.update(image_B, [torch.eye(2)[[0] * len(images)]], image_B[:, None])
    values = values_of(metric)
    assert (values["accuracy_colour"], values["macro_f1"]) == pytest.approx((1 / 2, 1 / 3))
    generator = torch.Generator().manual_seed(0)
    logits, label_B = torch.randn(40, 30, generator=generator), torch.randint(30, (40,), generator=generator)
    metric = AttributeMetrics({"type": 30})
    metric.update(torch.arange(40), [logits], label_B[:, None])
    values, answer_B = values_of(metric), logits.argmax(1)
    assert values["macro_f1_type"] == pytest.approx(f1_score(label_B, answer_B, average="macro"), rel=1e-12)
    assert values["accuracy_type"] == pytest.approx(accuracy_score(label_B, answer_B), rel=1e-12)


def made_batches() -> list[tuple[PairOutputs, PairTargets]]:
    """Return five batches in which images and texts come again."""
    generator = torch.Generator().manual_seed(1)
    image_ND, text_ND = torch.randn(2, 12, 4, generator=generator)
    logits_NC, label_NA = torch.randn(12, 3, generator=generator), torch.randint(-1, 3, (12, 1), generator=generator)
    batches = []
    for size in (3, 2, 4, 3, 5):
        image_B, caption_B = torch.randint(12, (2, size), generator=generator)
        outputs = PairOutputs(image_ND[image_B], text_ND[caption_B], (logits_NC[image_B],))
        batches.append((outputs, PairTargets(image_B, caption_B, label_NA[image_B])))
    return batches


def of_rank(rank: int) -> dict[str, dict[str, float]]:
    """Return the metrics of the batches, of which rank 0 has the first, third and fifth, or all of them."""
    values = {}
    for name, own in {"shared": made_batches()[rank::2], "alone": [] if rank else made_batches()}.items():
        metric = PairMetrics((1, 3), {"colour": 3})
        for batch in own:
            metric.update(*batch)
        for part in (metric, metric.retrieval, metric.attributes):
            part._update_count = max(part._update_count, 1)  # without: a warning that nothing was updated
        values[name] = values_of(metric)
    assert dist.get_world_size() == 2
    return values


def test_two_ranks_are_one_and_a_metric_starts_anew(tmp_path):
    first, second = on_two_ranks(of_rank, tmp_path)
    metric = PairMetrics((1, 3), {"colour": 3}).clone()
    metric.update(*made_batches()[1])
    early = values_of(metric)
    metric.reset()
    for batch in made_batches():
        metric.update(*batch)
    want = values_of(metric)
    assert first == second
    assert early != want
    assert (first["shared"], first["alone"]) == (pytest.approx(want, abs=1e-12), pytest.approx(want, abs=1e-12))
    assert {"recall_1", "image_to_text_median_rank", "macro_f1", "accuracy_colour"} <= set(want)
