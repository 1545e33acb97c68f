"""Classes by their names and by a linear probe, on vectors that are written down."""

import math
from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from small_pairs import pair_batch, retriever
from torch import nn

from apps.multimodal.search.zero_shot import (
    check_templates,
    class_scores,
    class_vectors,
    image_vectors,
    zero_shot_accuracy,
)


class Alphabet(nn.Module):
    """A model whose vector of a text is (1, 0), or (0, 1) for one that ends in a full stop."""

    device, dim = torch.device("cpu"), 2

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.encoding = SimpleNamespace(text=SimpleNamespace(encode=self._encode))

    def _encode(self, texts):
        self.texts += texts
        return torch.tensor([[text.endswith(".")] for text in texts]).long()

    def text_vectors(self, text_BL):
        return torch.eye(2)[text_BL[:, 0]]


def test_the_vector_of_a_class_is_the_mean_of_its_templates():
    model = Alphabet()
    vectors = class_vectors(model, ["red", "blue"], ("{}", "a photo of a {}.", "a {}."))
    assert model.texts == ["red", "a photo of a red.", "a red.", "blue", "a photo of a blue.", "a blue."]
    # The mean of (1, 0), (0, 1) and (0, 1) has the direction (1, 2), whose length is the root of 5.
    assert vectors.tolist() == [pytest.approx([1 / math.sqrt(5), 2 / math.sqrt(5)])] * 2


def test_a_tie_is_no_answer():
    class_CD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    image_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    # Image 0 is right; 1 and 2 have two classes with the same product; 3 is nearest to class 0, which is wrong.
    assert zero_shot_accuracy(image_ND, torch.tensor([0, 1, 2, 1]), class_CD) == 1 / 4
    assert zero_shot_accuracy(image_ND * math.nan, torch.tensor([0, 1, 2, 1]), class_CD) == 0
    assert zero_shot_accuracy(image_ND, torch.tensor([0, 0, 0, 0]), class_CD[:1].expand(3, 2)) == 0


def test_scores_of_attributes():
    image_ND = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    label_NA = torch.tensor([[0, -1, -1], [0, 1, -1], [1, -1, -1], [0, -1, -1]])
    training = (
        torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 1.0], [0.0, 0.9]]),
        torch.tensor([[0, 1, 0]] * 2 + [[1, 1, 0]] * 2),
    )
    attributes = {"colour": ("red", "blue"), "size": ("small", "large"), "unknown": ("a", "b")}
    texts = {"colour": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    colour, size = class_scores(image_ND, label_NA, attributes, texts, training)
    # Three of four images are red. The last one has the vector of a blue one.
    assert (colour.attribute, colour.classes, colour.images, colour.commonest) == ("colour", 2, 4, 3 / 4)
    assert (colour.zero_shot, colour.probe) == (3 / 4, 3 / 4)
    # One image has a known size; the training images have one size alone, so that there is nothing to learn.
    assert (size.images, size.commonest, size.zero_shot, size.probe) == (1, 1.0, None, None)


def test_each_image_is_read_once():
    model, batch = retriever().eval(), pair_batch(4)
    twice = batch._replace(image_B=torch.tensor([7, 8, 7, 9]), label_BA=torch.arange(8).view(4, 2))
    with torch.no_grad():
        vectors, labels = image_vectors(model, [twice, twice], most=5)
        assert labels.tolist() == [[0, 1], [2, 3], [6, 7]]
        torch.testing.assert_close(vectors, model.image_vectors(batch.image[[0, 1, 3]]))
        assert len(image_vectors(model, [twice, batch], most=3)[0]) == 3
        assert image_vectors(model, [], most=3)[1].shape == (0, 0)


def test_templates_that_are_refused():
    rule = r"report.templates is empty: give at least one template, such as 'a photo of a"
    refused(rule, check_templates, "report.templates", ())
    rule = r"the template 'a photo' must have \{\} once, where the class stands"
    refused(rule, check_templates, "report.templates", ("{}", "a photo"))
