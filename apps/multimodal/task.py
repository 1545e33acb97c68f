"""An image-text model in use: takes an image and texts, returns the best text and the experts of all tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import core
from apps.data.given import GivenConfig, GivenData
from apps.data.subwords import EOS_ID, PAD_ID
from apps.multimodal import own_data
from apps.multimodal.report.use import PassLayout, tokens
from apps.multimodal.search.search import shares_of
from apps.multimodal.search.vectors import encode_texts, vectors_of_pixels
from apps.nlp.text.words import words_of
from apps.report.exhibit import Bars, Example, Exhibit, ImageField, Images, LayerPart, Part, Patches, Pieces, TextField
from apps.report.page import Table
from apps.report.routed import expert_names, layer_label
from apps.task import MOST_EXPERTS, Input, Loss, Output, Sizes, Task, Trial, ids_on_meta
from apps.task.outputs import SHARE
from apps.train.publish.exporting import Exported, Graph
from apps.vision.image_files import to_array
from apps.vision.image_input import image_input, images_on_meta
from core.convert.read.calls import evaluating

SUBWORDS = "subwords.model"
"""The sentencepiece model of an export, where texts are cut into subwords."""
_MOST_TEXTS, _LONGEST, _TOP = 100, 2_000, 5
"""Texts of a request, characters of one, and the best texts of an answer, as ``ImageTextRetriever.predict`` has it."""
_MOST_LINES, _MOST_DRAWN = 20, 4
"""Texts that a page reads, and the first of them, whose experts it shows."""
_SEARCHED, _BEST = 200, 6
"""Images of the data that a text searches, and the best that are shown."""


@dataclass(frozen=True)
class Matched:
    """The answer to an image, to texts, or to both.

    Attributes:
        texts: the vector of each text.
        image: the image's vector; None: no image.
        logits: the logits (C,) of each attribute of the image, if the model predicts attributes.
        shares: probabilities of the texts that fit the image best, best first.
    """

    texts: Mapping[str, Tensor]
    image: Tensor | None = None
    logits: Sequence[Tensor] = ()
    shares: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the texts that fit, or the vector of an image or a text by itself."""
        if not self.shares:
            vector_D = self.image if self.image is not None else next(iter(self.texts.values()))
            return {"vector": vector_D.tolist()}
        text, share = next(iter(self.shares.items()))
        return {"text": text, "probability": share, "top": self.shares}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_VECTOR = {"type": "array", "items": {"type": "number"}, "description": "Of length 1: a product is a similarity."}
_FIT = {
    "text": {"type": "string", "description": "The text that fits best."},
    "probability": {**SHARE, "description": "Its probability, to 6 places."},
    "top": {"type": "object", "additionalProperties": SHARE, "description": "The best texts, best first."},
}
_ANSWER = {"title": "Answer", "oneOf": [_object(**_FIT), _object(vector=_VECTOR)]}


def _sent(texts: Sequence[str]) -> Sequence[str]:
    if not all(text.strip() for text in texts):
        raise ValueError("a text is empty")
    return texts


def _typed(lines: str) -> list[str]:
    texts = list(dict.fromkeys(lines.splitlines()))
    if len(texts) > _MOST_LINES:
        raise ValueError(f"Texts: {len(texts)} are too many, at most {_MOST_LINES} are read")
    return texts


class ImageTextMatching(Task):
    """The use of an ``ImageTextRetriever``. A page with data also searches their images for the first text."""

    app, noun, verb, alternatives = "image_text", "Image and texts", "Compare", _MOST_LINES
    combinations: ClassVar[Mapping[str, Sequence[str]]] = {
        "Compare": ("image", "texts"),
        "Image": ("image",),
        "Text": ("text",),
    }
    description = "An image and texts: the answer is which text fits. An image or a text alone: its vector."

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoding = model.encoding
        self.searched: _Searched | None = None
        text = {"type": "string", "maxLength": _LONGEST, "pattern": r"\S"}
        texts = {"type": "array", "items": text, "minItems": 1, "maxItems": _MOST_TEXTS, "uniqueItems": True}
        field = TextField("Texts, one a line", lines=4, by_line=True)
        self.inputs = {
            "image": image_input(self.encoding),
            "texts": Input(texts, ["a red dress", "blue jeans"], lambda own, _: _sent(own), field, _typed, default=()),
            "text": Input(text, "a hat", lambda own, _: _sent([own]), default=()),
        }
        self.output = Output(_ANSWER, Matched.to_json, self._parts)

    @property
    def instructions(self) -> str:
        search = "" if self.searched is None else " The first text also searches the validation images."
        return (
            "Give an image and some texts, each on a line: the model says which of them fits, and which expert took "
            f"each patch and each subword.{search}"
        )

    @torch.no_grad()
    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = _TOP) -> list[Matched]:
        outputs = self._images([example["image"] for example in examples if example["image"] is not None])
        given = [[*example["texts"], *example["text"]] for example in examples]
        unique = list(dict.fromkeys(text for texts in given for text in texts))
        vector_of = dict(zip(unique, encode_texts(self.model, unique), strict=True))
        answers = []
        for example, texts in zip(examples, given, strict=True):
            answer = Matched({text: vector_of[text] for text in texts})
            if example["image"] is not None:
                image_D, *logits = next(outputs)
                answer = replace(answer, image=image_D, logits=logits)
                if texts:
                    text_CD = torch.stack(list(answer.texts.values()))
                    (shares,) = shares_of(self.model, image_D[None], text_CD, texts, most)
                    answer = replace(answer, shares=shares)
            answers.append(answer)
        return answers

    def _images(self, pixels: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Return the vector of each image, and the logits of its attributes."""
        if not pixels:
            return iter(())
        image = self.encoding.normalized(torch.stack(list(pixels)), self.model.device)
        with evaluating(self.model):
            outputs = self.model.model.image_outputs(image)
        return zip(*(part.float().cpu() for part in outputs), strict=True)

    def _parts(self, answer: Matched) -> tuple[Part, ...]:
        parts: list[Part] = []
        if answer.image is not None:
            parts.append(Bars("Texts for this image", tuple(answer.shares.items())))
        if answer.logits:
            rows = []
            for (name, classes), logits_C in zip((self.encoding.attributes or {}).items(), answer.logits, strict=True):
                share, likeliest = logits_C.softmax(-1).max(-1)
                rows.append((name, classes[int(likeliest)], f"{100 * float(share):.1f} %"))
            parts.append(Table("Attributes", ("attribute", "likeliest", "probability"), tuple(rows)))
        if self.searched is not None:
            parts.append(self.searched.images(*next(iter(answer.texts.items()))))
        return tuple(parts)

    def layers(self, tape: core.Tape, example: Mapping[str, Any], answer: Any) -> Mapping[str, tuple[LayerPart, ...]]:
        text, num_patches = self.encoding.text, self.model.model.towers.num_patches
        ids = [text.ids(one) for one in example["texts"][:_MOST_DRAWN]]
        layers: dict[str, tuple[LayerPart, ...]] = {}
        for entry in tape.entries:
            rows = PassLayout.of_entry(entry)
            if rows is None:
                continue
            parts: list[LayerPart] = []
            routing, names = entry.routing, expert_names(entry.routing)
            grid = rows.patch_experts(routing, num_patches, MOST_EXPERTS)
            if grid is not None:
                parts.append(Patches(to_array(example["image"]), grid[0].numpy(), names))
            for own, experts_LK in zip(ids, rows.piece_experts(routing, MOST_EXPERTS), strict=False):
                words = tuple(words_of(text.marked(own)))
                title = " ".join("".join(word) for word in words[1:-1])
                parts.append(Pieces(title, words, experts_LK[: len(own)].numpy(), names))
            name = layer_label(entry.name)
            layers[name] = (*layers.get(name, ()), *parts)
        return {name: parts for name, parts in layers.items() if parts}

    def exhibit(self, data: Any, most: int) -> Exhibit:
        if data is not None:  # a text can search them without an image
            self.searched = _Searched(self.model, data)
            self.inputs = {**self.inputs, "image": replace(self.inputs["image"], field=ImageField("Image", True))}
        return super().exhibit(data, most)

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return images of different texts, each with its own text and the next ones' texts."""
        pairs = _pairs(data)
        places = range(0, len(pairs), max(1, len(pairs) // max(most, 1)))[:most]
        chosen = pairs.index[list(places)]
        pixels, texts = data.pixels(pairs.image_N[chosen]), [data.texts[i] for i in pairs.caption_N[chosen].tolist()]
        examples = []
        for place, image in enumerate(pixels):
            own = dict.fromkeys(texts[(place + step) % len(texts)] for step in range(3))
            examples.append(Example(texts[place], (to_array(image), "\n".join(own))))
        return tuple(examples)

    def exported(self) -> Exported:
        """Return the graphs "image_tower" and "text_tower", and how images and texts become their inputs.

        The first output of both is "vectors", float32 (B, dim) of length 1; the images' output is followed by the
        logits of each attribute, if the model predicts attributes. ``scale`` times the product of two vectors, plus
        ``bias``, is the logit of their pair, of which ``probability`` says whether a softmax over the texts or a
        sigmoid follows.
        """
        model, encoding, draw = self.model, self.encoding, torch.Generator().manual_seed(0)
        image = torch.randn(2, model.in_chans, model.image_size, model.image_size, generator=draw)
        length = min(5, model.max_tokens)
        text_BL = torch.randint(EOS_ID + 1, max(model.vocab_size, EOS_ID + 2), (2, length), generator=draw)
        text_BL[1, length - 1] = PAD_ID
        logits = [f"logits_{name}" for name in model.attributes] if model.attribute_head is not None else []
        images, texts = _ImageTower(model.model), _TextTower(model.model)
        graphs = (
            Graph("image_tower", images, {"image": image}, ("vectors", *logits), {"image": {0: "batch"}}),
            Graph("text_tower", texts, {"text": text_BL}, ("vectors",), {"text": {0: "batch", 1: "length"}}),
        )
        state, files = encoding.state(), {}
        if encoding.text.subwords is not None:
            files[SUBWORDS] = base64.b64decode(encoding.text.subwords.models[0])
            state["text"]["subwords"] = {**state["text"]["subwords"], "models": [SUBWORDS]}
        loss = {
            "scale": float(model.loss.log_scale.exp()),
            "bias": float(getattr(model.loss, "bias", 0.0)),
            "probability": "sigmoid" if hasattr(model.loss, "bias") else "softmax",
        }
        return Exported(self.app, graphs, {**state, **loss}, files)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = _Pairs(graphs["image_tower"], graphs["text_tower"])

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        of_loss = ("scale", "bias", "probability")
        state = {name: own for name, own in exported.description.preprocessing.items() if name not in of_loss}
        subwords = state["text"]["subwords"]
        if subwords is not None:
            models = [base64.b64encode(exported.file(name)).decode() for name in subwords["models"]]
            state["text"] = {**state["text"], "subwords": {**subwords, "models": models}}
        return state

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
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

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return modalities, tokens of texts and classes of images."""
        return tokens(entry, batch)

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length = min(sizes.length or model.max_tokens, model.max_tokens)
        per_pair = model.model.towers.num_patches + length
        batch = sizes.examples(per_pair)
        image = images_on_meta(model, batch, dtype)
        loss = Loss(working=4.0 * 4 * batch**2, flops=2.0 * 2 * batch**2 * model.dim)
        run = lambda: model.model(image, ids_on_meta(batch, length))  # noqa: E731
        return Trial(run, batch, batch * per_pair, loss, "patches and subwords")

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        return own_data.config_for(given)


class _Searched:
    """The images that a text searches, which are encoded when they are first asked for.

    Args:
        model: the model.
        data: the data whose validation images they are, or test images if there are none.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self._model, self._data = model, data

    @cached_property
    def _numbers(self) -> Tensor:
        pairs = _pairs(self._data)
        return pairs.image_N[pairs.index].unique()[:_SEARCHED]

    @cached_property
    def _vectors(self) -> Tensor:
        with evaluating(self._model), torch.no_grad():
            return vectors_of_pixels(self._model, self._data.pixels(self._numbers))

    def images(self, text: str, vector_D: Tensor) -> Images:
        """Return the best images for a text."""
        score_I = self._vectors @ vector_D
        best = score_I.topk(min(_BEST, len(score_I)))
        scores, pixels = best.values.tolist(), self._data.pixels(self._numbers[best.indices])
        rows = tuple((f"{score:.2f}", to_array(image)) for score, image in zip(scores, pixels, strict=True))
        return Images(f"The best of {len(score_I):,} images for {text!r}, with their products", rows)


def _pairs(data: Any) -> Any:
    """Return the validation pairs, or the test pairs if there are none."""
    pairs = data.examples("val")
    return pairs if len(pairs) else data.examples("test")


class _Tower(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.training = model, model.training


class _ImageTower(_Tower):
    """The images' graph. A program of ``torch.export`` takes the name of the parameter."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors (B, dim) of normalized images, and the logits (B, C) of each attribute."""
        return self.model.image_outputs(image)


class _TextTower(_Tower):
    """The texts' graph."""

    def forward(self, text: Tensor) -> Tensor:
        """Return the vectors (B, dim) of texts' ids (B, L), padded with 0."""
        return self.model.text_vectors(text)


class _Pairs(nn.Module):
    """Graphs under the interface of ``PairModel``."""

    def __init__(self, image_tower: Any, text_tower: Any) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower

    def forward(self, image: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the vectors of images and texts, and the logits of the attributes."""
        vectors_BD, *logits = self.image_outputs(image)
        return vectors_BD, self.text_vectors(text_BL), tuple(logits)

    def image_outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of images, and the logits of each attribute."""
        return self.image_tower({"image": image})

    def image_vectors(self, image: Tensor) -> Tensor:
        """Return the vectors of images."""
        return self.image_outputs(image)[0]

    def text_vectors(self, text_BL: Tensor) -> Tensor:
        """Return the vectors of texts."""
        return self.text_tower({"text": text_BL})[0]


TASK = ImageTextMatching
