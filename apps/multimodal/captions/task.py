"""A captioner in use: it takes an image, and returns a caption and the experts of patches and subwords."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import core
from apps.multimodal.captions.traced import traced
from apps.multimodal.task import ImageTextMatching
from apps.nlp.decode.exported import ExportedMemoryDecoder
from apps.nlp.decode.graphs import exported_writer, graphs_with_memory
from apps.nlp.text.words import words_of
from apps.report.exhibit import Example, LayerPart
from apps.task import Missing, Sizes, Task, Trial, ids_on_meta, patches_by_layer, vocabulary_loss, words_by_layer
from apps.task.outputs import Written, texts
from apps.train.publish.exporting import Exported
from apps.vision.image_files import to_array
from apps.vision.image_input import image_input, images_on_meta
from apps.vision.task import placed
from core.convert.read.calls import evaluating


class Captioning(Task):
    """The use of an ``ImageCaptioner``."""

    app, noun, verb, alternatives = "captions", "Image", "Describe", 3
    description = "An image: the answer is what it shows, in words."
    instructions = "Drop an image: the model writes what it sees, and shows which experts took each subword of that."

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoding = model.encoding
        self.inputs = {"image": image_input(self.encoding)}
        self.output = texts("Caption", "The caption.", "Caption")

    @torch.no_grad()
    def answers(self, examples: Sequence[Mapping[str, Tensor]], most: int = 1) -> list[Written]:
        model = self.model
        config = dataclasses.replace(model.decode, num_return_sequences=min(most, model.decode.width))
        pixels = torch.stack([example["image"] for example in examples])
        # Draws depend on an image's number, and it is the first of its request whatever others come with it.
        parts = pixels.split(1) if config.method == "sample" else (pixels,)
        written = []
        with evaluating(model):
            for part in parts:
                image = self.encoding.normalized(part, model.device)
                found = model.hypotheses_of(image, config, torch.arange(len(part)))
                for ids, own in zip(found.ids, model.spelled(found), strict=True):
                    captions, scores = zip(*own, strict=True)
                    written.append(Written(captions, scores, ids[0]))
        return written

    def layers(self, tape: core.Tape, example: Any, answer: Written) -> Mapping[str, tuple[LayerPart, ...]]:
        with evaluating(self.model):
            trace = traced(self.model, self.encoding.normalized(example["image"][None], self.model.device), answer.ids)
        patches = placed(self.model.model.encoder, trace.of_encoder, "encoder.")
        title = "Subwords of the caption, as they are read"
        return {
            **patches_by_layer(patches, to_array(example["image"])),
            **words_by_layer(trace.of_decoder, words_of(trace.read), title),
        }

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return validation images, at equal steps, with their texts as labels."""
        batch = next(iter(data.val_dataloader()), None)
        if batch is None:
            return ()
        first: dict[int, int] = {}
        for row, number in enumerate(batch.image_B.tolist()):
            first.setdefault(number, row)
        rows = list(first.values())[:most]
        pixels = data.pixels(batch.image_B[rows])
        labels = [data.texts[number] for number in batch.caption_B[rows].tolist()]
        return tuple(Example(text, (to_array(image),)) for text, image in zip(labels, pixels, strict=True))

    def exported(self) -> Exported:
        """Return the graphs, the encoding of images, and what spells the ids of texts; an image counts as
        ``max_tokens`` ids in the maximal length of a text."""
        model = self.model
        image = torch.randn(2, model.in_chans, model.image_size, model.image_size, device=model.device)
        graphs = graphs_with_memory(model.model, "image", image, {0: "batch"}, None)
        how = {"encoding": self.encoding.state(), "max_tokens": model.max_tokens}
        return exported_writer(self.app, model, graphs, how)

    # ---- without a trained model

    @classmethod
    def attach(cls, model: Any, graphs: Mapping[str, Any]) -> None:
        model.model = ExportedMemoryDecoder(graphs["encoder"], graphs["decoder"], model.transformer)

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        return dict(exported.description.preprocessing["encoding"])

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return the sizes of images and texts. The vocabulary's must be given: the output has a row for each id."""
        known = ImageTextMatching.data_arguments(given, sizes)
        if "vocab_size" not in {**given, **known}:
            raise Missing("the vocabulary's size comes from the data: give --data.tokenizer.vocab_size N")
        return {name: value for name, value in known.items() if name != "attributes"}

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the subwords of the decoder's passes; the batch are those that it reads, (B, L)."""
        return {"subword": batch.flatten()} if entry.name.startswith("decoder.") else {}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length = min(sizes.length or model.max_tokens, model.max_tokens)
        batch = sizes.examples(length)
        image, tokens = images_on_meta(model, batch, dtype), batch * length
        loss = vocabulary_loss(tokens, model.model.output_weight, dtype)
        run = lambda: model.model.decode(ids_on_meta(batch, length), model.model.encode(image))  # noqa: E731
        return Trial(run, batch, tokens, loss)


TASK = Captioning
