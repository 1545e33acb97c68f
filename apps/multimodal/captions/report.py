"""The test report of a captioner: scores, captioned images, the words that experts take, and where words look."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

import core
from apps.base.files import replacing
from apps.data.text_files import num_words
from apps.multimodal.captions.metrics import CaptionedImage, CaptionMetrics, num_references, signatures
from apps.multimodal.captions.traced import Traced, traced
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.report.report import displayed
from apps.nlp.text.report import WrittenReport
from apps.nlp.text.scores import scorer
from apps.nlp.text.teacher_forced import read_ids
from apps.report.base import ReportConfig, computed_metrics, spread_batches, spread_places
from apps.report.images import Tile, data_url, heated, save_images
from apps.report.page import Gallery, Part, Picture, Section, Table, Thumbnail, Words
from apps.report.routed import experts_by_layer, largest_number
from apps.report.use import ExpertUse, Labels, load_parts, tokens_of, typical_parts
from core.fields import CountOrZero

_COLUMNS = {"bleu": "BLEU", "chrf": "chrF++", "token_accuracy": "token acc., %", "perplexity": "perplexity"}
_SIDE_BY_SIDE = 6
"""Images side by side that show where words look."""
_THUMBNAIL = 96
"""Least height and width of a picture in the gallery, in pixels."""


@core.register_config
@dataclass(frozen=True)
class CaptionReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the scores of a captioner.

    Attributes:
        samples: captioned images shown, at equal steps through the test set.
        images: images plotted with the place where each word looks and the experts that computed it; 0 plots none.

    Raises:
        ValueError: a number out of its range.
    """

    routing_examples: CountOrZero = 2000
    samples: CountOrZero = 12
    images: CountOrZero = 3

    def brief(self) -> Self:
        return dataclasses.replace(self, samples=0)  # a comparison shows them of all models


@dataclass(frozen=True)
class _Collected:
    """The metrics of a test, and its batches; none where processes share the model."""

    metrics: CaptionMetrics
    values: dict[str, float]
    module: Any
    data: Any
    batches: Sequence[PairBatch]
    run: Path


class CaptionReport(WrittenReport):
    """After a test: the scores with sacrebleu's signatures, captioned images, and the words that each expert takes.

    It writes ``captions.jsonl`` (name, caption, references, sentence chrF++ and search score of each image),
    ``signatures.txt``, ``expert_subwords.csv``, ``image_1_words.png``, ...; and, after a training too,
    ``learning_curves.png`` of the run's ``metrics.csv``.

    Args:
        config: what to do.
    """

    config: CaptionReportConfig
    of_batches = "captioned images and the use of experts"

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> _Collected | None:
        metrics = computed_metrics(pl_module, CaptionMetrics)
        if metrics is None or not metrics.images:
            return None
        values = {name: float(value) for name, value in metrics.compute().items()}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = self.batches(trainer, pl_module)
        return _Collected(metrics, values, pl_module, data, batches, Path(trainer.default_root_dir))

    def write(self, collected: _Collected, folder: Path) -> list[Section]:
        config, module, metrics = self.config, collected.module, collected.metrics
        lowers = module.encoding.text.lower_case
        sections = [write_scores(metrics, collected.values, collected.data, folder, lowers)]
        pictures = _Pictures(collected.batches, collected.data)
        chosen = [metrics.images[place] for place in spread_places(len(metrics.images), config.samples)]
        if gallery := pictures.gallery(chosen):
            sections[0] = dataclasses.replace(sections[0], parts=(*sections[0].parts, gallery))
        if core.moe_layers(module.model) and (some := spread_batches(collected.batches, config.routing_examples)):
            sections.append(write_use(module, some, folder))
        if config.pictures:
            shown: list[Part] = []
            drawn = [metrics.images[place] for place in spread_places(len(metrics.images), config.images)]
            for number, captioned in enumerate(drawn, 1):
                shown += pictures.write_words(module, captioned, number, folder)
            if shown:
                sections.append(Section("Words and where they look", tuple(shown)))
            self.write_curves(collected.run, folder)
        return sections


def write_scores(
    metrics: CaptionMetrics, values: dict[str, float], data: Any, folder: Path, lowercase: bool = False
) -> Section:
    """Write ``captions.jsonl`` and ``signatures.txt``; return the table of the scores.

    Args:
        metrics: of the test.
        values: their outputs.
        data: names the images, if it can.
        folder: folder of the files.
        lowercase: whether the texts were lowered.
    """
    images = metrics.images
    signed = signatures(metrics.tokenize, num_references(images), lowercase)
    with replacing(folder / "signatures.txt") as file:
        file.writelines(f"{name} {text}\n" for name, text in signed.items())
    write_captions(folder / "captions.jsonl", images, data)
    words = [num_words(image.caption) for image in images]
    of_texts = [num_words(text) for image in images for text in image.references]
    row = (
        f"{len(images):,}",
        *(f"{100 * values[name] if name == 'token_accuracy' else values[name]:.2f}" for name in _COLUMNS),
        f"{np.mean(words):.1f}",
        f"{np.mean(of_texts):.1f}",
        f"{len({image.caption for image in images}):,}",
    )
    header = ("images", *_COLUMNS.values(), "words a caption", "words a text", "different captions")
    signatures_line = "; ".join(f"{_COLUMNS[name]} {text}" for name, text in signed.items())
    return Section("Captions", (Table(signatures_line, header, (row,)),))


def write_captions(path: Path, images: Sequence[CaptionedImage], data: Any) -> None:
    """Write one JSON object a line for each image."""
    chrf = scorer("chrf")
    with replacing(path) as file:
        for image in images:
            score = round(chrf.sentence_score(image.caption, list(image.references)).score, 2)
            row = {"image": image_name(data, image.image), "caption": image.caption, "references": image.references}
            file.write(json.dumps({**row, "chrf": score, "search_score": image.log_prob}, ensure_ascii=False) + "\n")


def image_name(data: Any, number: int) -> str:
    """Return the name that the data give an image, else its number."""
    name = getattr(data, "image_name", None)
    return f"image {number}" if name is None else str(name(number))


def side_by_side(systems: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    """Return ``count`` test images, at equal steps, with their first text and each system's caption.

    Args:
        systems: ``ImageCaptioner.examples_of_test`` of each system, by its heading; all describe the same images.
        count: how many images.
    """
    first = next(iter(systems.values()), ())
    width = max((len(name) for name in (*systems, "text")), default=0) + 2
    lines: list[str] = []
    for place in spread_places(len(first), count):
        lines += ["", str(first[place]["image"]), f"  {'text':<{width}}{first[place]['references'][0]}"]
        lines += [f"  {name:<{width}}{own[place]['caption']}" for name, own in systems.items()]
    return "\n".join(lines[1:])


# ---- single images


class _Pictures:
    """The images of a test's batches, by number."""

    def __init__(self, batches: Sequence[PairBatch], data: Any) -> None:
        self.data = data
        self._images = {
            number: batch.image[row] for batch in batches for row, number in enumerate(batch.image_B.tolist())
        }

    def pixels(self, number: int) -> np.ndarray:
        """Return an image as it is seen, float (H, W) or (H, W, 3) in 0..1."""
        (pixels,) = displayed(self._images[number][None].float().cpu(), self.data.encoding)
        return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels

    def gallery(self, chosen: Sequence[CaptionedImage]) -> Gallery | None:
        """Return the captioned images as small pictures; None if there are none."""
        pictures = tuple(
            thumbnail(self.pixels(captioned.image), captioned, image_name(self.data, captioned.image))
            for captioned in chosen
            if captioned.image in self._images
        )
        note = "Below each image: what the model wrote, and in brackets what the data say of it."
        return Gallery("Captioned images, at equal steps through the test", pictures, note) if pictures else None

    def write_words(self, module: Any, captioned: CaptionedImage, number: int, folder: Path) -> list[Part]:
        """Caption an image and draw ``image_<number>_words.png``; return its page section."""
        if captioned.image not in self._images:
            return []
        batch: Tensor = self._images[captioned.image][None].to(module.device)
        index = torch.tensor([captioned.image], device=module.device)
        trace = traced(module, batch, module.hypotheses_of(batch, module.decode, index).best[0])
        words, looks = trace.looks()
        name = f"image_{number}_words.png"
        heading = image_name(self.data, captioned.image)
        image = self.pixels(captioned.image)
        tiles = [Tile(image, "the image"), *(heated(image, own, word) for word, own in zip(words, looks, strict=True))]
        rows = [tiles[first : first + _SIDE_BY_SIDE] for first in range(0, len(tiles), _SIDE_BY_SIDE)]
        save_images(rows, folder / name, f"{heading}: where each word looks")
        seen = f"{heading}, and for each word of {captioned.caption!r} the patches that the decoder attends to"
        caption = f"{heading}: attention of the decoder, word by word."
        return [*_words_of(trace, heading), Picture(name, seen, caption)]


def _words_of(trace: Traced, heading: str) -> list[Words]:
    """Return the subwords of a caption with the experts of the decoder; nothing for a dense decoder."""
    entries = trace.of_decoder
    if not entries:
        return []
    title = f"{heading}: experts of each subword as it is read, by falling gate"
    return [Words.of_pieces(title, trace.read, experts_by_layer(entries), largest_number(entries))]


def thumbnail(pixels: np.ndarray, captioned: CaptionedImage, name: str) -> Thumbnail:
    """Return a small picture of an image, float (H, W) or (H, W, 3), above its caption and its texts."""
    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    times = -(-_THUMBNAIL // min(image.size))
    size = (image.width * times, image.height * times)
    source = data_url(image.resize(size, Image.Resampling.NEAREST))
    return Thumbnail(source, size, name, (captioned.caption, *(f"[{text}]" for text in captioned.references)))


# ---- all words


@torch.no_grad()
def write_use(module: Any, batches: Sequence[PairBatch], folder: Path) -> Section:
    """Read the experts of texts that the model is given, write ``expert_subwords.csv``, and return its page section.

    Args:
        module: an ``ImageCaptioner`` in evaluation.
        batches: of the test.
        folder: folder of the file.
    """
    vocab = module.vocab_size
    use = ExpertUse(tokens_of(module), {"subword": Labels("subword", vocab)})
    for batch in batches:
        read_BL = read_ids(batch.text_BL).to(module.device)
        with core.record(module.model) as tape:
            module(batch.image.to(module.device), read_BL)
        use.add(tape, read_BL)
    parts: list[Part] = [*load_parts(use.stats)]
    if counts := use.counts["subword"]:
        names = dict.fromkeys(counts, module.subwords.pieces(range(vocab), "source"))
        parts.append(typical_parts(counts, names, "subwords", folder / "expert_subwords.csv"))
    return Section("What the experts are used for", tuple(parts))
