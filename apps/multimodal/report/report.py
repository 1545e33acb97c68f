"""The test report of an image-text model: retrieval both ways, classes by texts, and the use of the experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.multimodal.pairs.encoding import PairEncoding
from apps.multimodal.report.metrics import Gallery, PairMetrics
from apps.multimodal.report.use import PairUse, Shown
from apps.multimodal.search.zero_shot import (
    TEMPLATES,
    ClassScore,
    check_templates,
    class_scores,
    class_vectors,
    image_vectors,
)
from apps.multimodal.towers.stack import MODALITIES
from apps.report.base import Report, ReportConfig, computed_metrics, is_left_out, spread_places
from apps.report.images import Tile, save_images
from apps.report.page import BarChart, Part, Picture, Section, Table, Text, Words
from apps.report.page.parts import START
from apps.report.tables import write_csv
from apps.report.use import load_parts, map_parts, some_layers, typical_parts
from apps.vision.report import patch_rows
from core.fields import CountOrZero

_logger = logging.getLogger(__name__)

_RETRIEVED = 6
"""Images that are shown for a sentence."""
_MOST_PIECES = 30
"""Pieces of texts that have a row in a map."""


@core.register_config
@dataclass(frozen=True)
class PairReportConfig(ReportConfig):
    """Options of the report that ``moesaic test`` adds to the metrics of an image-text model.

    Attributes:
        routing_examples: test pairs whose routing is read, to the end of a batch; 0 reads none.
        zero_shot: attributes whose classes are told by their names; None: all of the data; empty: none.
        templates: texts that name a class, which replaces the braces.
        attribute_templates: templates of single attributes, by name, instead of ``templates``.
        probe_images: training images of the linear probe, to the end of a batch; 0 leaves it out.
        queries: sentences for which the retrieved images are shown.
        samples: pairs that are shown with the experts of their patches and text tokens.

    Raises:
        ValueError: a number out of its range, or a template without a place for the class.
    """

    zero_shot: tuple[str, ...] | None = None
    templates: tuple[str, ...] = TEMPLATES
    attribute_templates: dict[str, tuple[str, ...]] | None = None
    probe_images: CountOrZero = 10_000
    queries: CountOrZero = 6
    samples: CountOrZero = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_templates("report.templates", self.templates)
        for name, templates in (self.attribute_templates or {}).items():
            check_templates(f"report.attribute_templates.{name}", templates)

    def brief(self) -> Self:
        return replace(self, probe_images=0)

    def templates_of(self, attribute: str) -> tuple[str, ...]:
        """Return the templates of an attribute."""
        return tuple((self.attribute_templates or {}).get(attribute, self.templates))


@dataclass(frozen=True)
class PairTest:
    """The data that a report has read of a test.

    Attributes:
        metrics: values of the test's metrics by name.
        gallery: the vectors of the images and texts.
        image_I, caption_J: int64, numbers of these images and texts in the data.
        scores: how well the attributes' classes are told.
        use: the use of the experts.
        encoding: how images and texts become the model's input.
        data: the data module.
    """

    metrics: Mapping[str, float]
    gallery: Gallery
    image_I: Tensor
    caption_J: Tensor
    scores: Sequence[ClassScore]
    use: PairUse
    encoding: PairEncoding
    data: Any


@dataclass(frozen=True)
class Retrieved:
    """The retrieved images for one sentence.

    Attributes:
        sentence: the text.
        rank: rank of the best of its own images among all.
        images: (n, H, W, C) or (n, H, W), values in 0..1, the best first.
        is_right: whether each of them is the sentence's own.
    """

    sentence: str
    rank: int
    images: np.ndarray
    is_right: tuple[bool, ...]


class PairReport(Report):
    """The report of a test in one process.

    It writes ``retrieval.csv``, ``retrieval.png``, with attributes ``attributes.csv``, and of a sparse model
    ``expert_modality.png``, ``expert_class.png``, ``expert_piece.png``, ``expert_pieces.csv``, ``patches.png`` and
    ``routing.png``. It logs ``test/zero_shot_<attribute>`` and ``test/linear_probe_<attribute>``.

    Args:
        config: what to do.
    """

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> PairTest | None:
        metrics = computed_metrics(pl_module, PairMetrics)
        if metrics is None or is_left_out(trainer):
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if pl_module.encoding_state is None:
            _logger.info("the report is left out: the data do not say how texts and classes are numbered")
            return None
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            test = self._read(trainer, pl_module, data, metrics.compute())
        for score in test.scores if test is not None else ():
            for name, value in (("zero_shot", score.zero_shot), ("linear_probe", score.probe)):
                if value is not None:
                    pl_module.log(f"test/{name}_{score.attribute}", value, batch_size=1, rank_zero_only=True)
        return test

    def _read(self, trainer: Trainer, module: Any, data: Any, values: Mapping[str, Tensor]) -> PairTest | None:
        """Return the readings of the test's pairs, in one more pass over them; None if there are none."""
        encoding = module.encoding
        attributes = encoding.attributes or {}
        use = PairUse(module, {name: len(own) for name, own in attributes.items()}, self.config.samples)
        columns: list[tuple[Tensor, ...]] = []
        pairs_read = 0
        for batch in batches_of_test(trainer):
            batch = trainer.strategy.batch_to_device(batch, module.device)
            with core.record(module) as tape:
                image_BD, text_BD = module(batch.image, batch.text_BL)[:2]
            if pairs_read < self.config.routing_examples:
                use.add(tape, batch)
            pairs_read += len(image_BD)
            columns.append((image_BD, text_BD, batch.image_B, batch.caption_B, batch.label_BA))
        if not columns:
            return None
        image_PD, text_PD, image_P, caption_P, label_PA = (torch.cat(c).cpu() for c in zip(*columns, strict=True))
        gallery = Gallery.of_pairs(image_PD.float(), text_PD.float(), image_P, caption_P)
        label_IA = torch.full((len(gallery.image_ID), len(attributes)), -1)
        label_IA[gallery.image_P] = label_PA
        scores = self._scores(module, data, attributes, gallery.image_ID, label_IA)
        numbers = {name: float(value) for name, value in values.items()}
        return PairTest(numbers, gallery, image_P.unique(), caption_P.unique(), scores, use, encoding, data)

    def _scores(
        self, module: Any, data: Any, attributes: Mapping[str, Sequence[str]], image_ID: Tensor, label_IA: Tensor
    ) -> list[ClassScore]:
        wanted = tuple(attributes) if self.config.zero_shot is None else self.config.zero_shot
        for name in wanted:
            if name not in attributes:
                known = ", ".join(attributes) or "none"
                raise ValueError(f"report.zero_shot names {name!r}, which is no attribute of the data ({known})")
        texts = {name: class_vectors(module, attributes[name], self.config.templates_of(name)) for name in wanted}
        labeled = None
        training = getattr(data, "train_eval_dataloader", None)
        if attributes and self.config.probe_images and training is not None:
            labeled = image_vectors(module, training(), self.config.probe_images)
        return class_scores(image_ID, label_IA, attributes, texts, labeled)

    def write(self, collected: PairTest, folder: Path) -> list[Section]:
        test = collected
        sections = [write_retrieval(test, folder, self.config.queries if self.config.pictures else 0)]
        if test.scores:
            sections.append(write_classes(test, folder))
        if test.use.counts["modality"]:
            sections.append(write_use(test, folder, self.config.pictures))
        words = [words_of(pair, test) for pair in test.use.shown if pair.pieces]
        return [*sections, Section("Words in sentences", tuple(words))]


# ---- retrieval


def write_retrieval(test: PairTest, folder: Path, queries: int) -> Section:
    """Write ``retrieval.csv``, and with ``queries`` ``retrieval.png``; return its page section."""
    images, texts = len(test.gallery.image_ID), len(test.gallery.text_JD)
    ways = {
        "an image for a text": ("text_to_image_", texts, images),
        "a text for an image": ("image_to_text_", images, texts),
    }
    ks = sorted(int(name.removeprefix("recall_")) for name in test.metrics if name.startswith("recall_"))
    rows: list[dict[str, Any]] = []
    for way, (prefix, of_queries, candidates) in ways.items():
        recall = {f"recall_{k}": test.metrics[f"{prefix}recall_{k}"] for k in ks}
        counts = {"queries": of_queries, "candidates": candidates}
        rows.append({"way": way, **counts, **recall, "median_rank": test.metrics[f"{prefix}median_rank"]})
    write_csv(folder / "retrieval.csv", rows)
    table = Table(
        "Retrieval over the whole test",
        ("what is sought", "queries", "candidates", *(f"recall@{k}, %" for k in ks), "median rank"),
        tuple(
            (
                row["way"],
                f"{row['queries']:,}",
                f"{row['candidates']:,}",
                *(f"{100 * row[f'recall_{k}']:.2f}" for k in ks),
                f"{row['median_rank']:,.4g}",
            )
            for row in rows
        ),
        note="By chance recall@k is k over the candidates. recall_k of the log is the mean of both rows.",
    )
    parts: list[Part] = [table]
    if queries and hasattr(test.data, "pixels") and hasattr(test.data, "texts"):
        shown = retrieved(test, spread_places(texts, queries))
        tiles = [
            [Tile(image, is_framed=right) for image, right in zip(one.images, one.is_right, strict=True)]
            for one in shown
        ]
        names = [f"{one.sentence} (rank {one.rank:,})" for one in shown]
        title = f"The best of {images:,} images for a sentence; its own is framed"
        save_images(tiles, folder / "retrieval.png", title, names, side=1.05)
        seen = "; ".join(f"for {one.sentence!r} the right image has rank {one.rank:,}" for one in shown)
        caption = "The images retrieved for sentences of the test, the best first; the sentence's own is framed."
        parts.append(Picture("retrieval.png", f"Images for sentences: {seen}.", caption))
    return Section("What is retrieved", tuple(parts))


def retrieved(test: PairTest, places: Sequence[int]) -> list[Retrieved]:
    """Return the retrieved images for the texts at these places of the gallery."""
    gallery = test.gallery
    score_QI = gallery.text_JD[list(places)] @ gallery.image_ID.T
    best_Qk = score_QI.topk(min(_RETRIEVED, score_QI.shape[1]), dim=1).indices
    rank_J = gallery.ranks().image_J
    rows = []
    for place, best_k in zip(places, best_Qk, strict=True):
        own = set(gallery.image_P[gallery.text_P == place].tolist())
        pixels = test.data.pixels(test.image_I[best_k]).permute(0, 2, 3, 1).numpy() / 255
        text = str(test.data.texts[int(test.caption_J[place])])
        rows.append(Retrieved(text, int(rank_J[place]), pixels, tuple(int(i) in own for i in best_k)))
    return rows


# ---- classes


def write_classes(test: PairTest, folder: Path) -> Section:
    """Write ``attributes.csv``, and return its page section of the attributes."""
    rows = []
    for score in test.scores:
        head = {name: test.metrics.get(f"{name}_{score.attribute}") for name in ("accuracy", "macro_f1")}
        rows.append({**asdict(score), "head_accuracy": head["accuracy"], "head_macro_f1": head["macro_f1"]})
    write_csv(folder / "attributes.csv", rows)
    names = {
        "zero_shot": "by its name",
        "probe": "linear probe",
        "head_accuracy": "head",
        "head_macro_f1": "head, macro-F1",
        "commonest": "commonest class",
    }
    kept = {key: name for key, name in names.items() if any(row[key] is not None for row in rows)}
    table = Table(
        "Classes of the test images, accuracy in %",
        ("attribute", "classes", "images", *kept.values()),
        tuple(
            (
                row["attribute"],
                f"{row['classes']:,}",
                f"{row['images']:,}",
                *("–" if row[key] is None else f"{100 * row[key]:.2f}" for key in kept),
            )
            for row in rows
        ),
        note="By its name: the nearest class among the vectors of texts that name it, without training for it. The "
        "linear probe learns from the vectors of training images. The commonest class is one answer for all images.",
    )
    series = {
        name: tuple(float("nan") if row[key] is None else 100 * row[key] for row in rows) for key, name in kept.items()
    }
    best, worst = (f(rows, key=lambda row: _gain(row)) for f in (max, min))
    summary = f"Above the commonest class most is told of {best['attribute']}, least of {worst['attribute']}."
    groups = tuple(row["attribute"] for row in rows)
    return Section("Classes", (table, BarChart("Classes by attribute", summary, "attribute", "%", groups, series)))


def _gain(row: Mapping[str, Any]) -> float:
    """Return how far the best accuracy lies above the commonest class's share."""
    known = [row[key] for key in ("zero_shot", "probe", "head_accuracy") if row[key] is not None]
    return max(known, default=0.0) - float(row["commonest"])


# ---- experts


def write_use(test: PairTest, folder: Path, draw: bool) -> Section:
    """Write the tables and, with ``draw``, the pictures of the experts' use; return its page section."""
    use, text = test.use, test.encoding.text
    alarms = use.alarms()
    for line in alarms:
        _logger.warning(line)

    def path(name: str) -> Path | None:
        return folder / f"expert_{name}.png" if draw else None

    parts: list[Part] = [Text(tuple(alarms))] if alarms else []
    by_modality = _of_some_layers(use.counts["modality"])
    parts += map_parts([(by_modality, MODALITIES)], "a modality", "modality", path("modality"))
    if told := use.class_information():
        parts.append(_information_table(told, use.attributes))
        attribute = use.attributes[int(np.argmax(np.sum(list(told.values()), axis=0)))]
        classes = (_of_some_layers(use.counts[attribute]), (test.encoding.attributes or {})[attribute])
        parts += map_parts([classes], f"the patches, by {attribute}", "class", path("class"))
    pieces = use.frequent_pieces(list(by_modality), _MOST_PIECES)
    if len(pieces):
        counts = {name: own[pieces] for name, own in use.counts["piece"].items() if name in by_modality}
        names = [_plain(word) for word in text.marked(pieces.tolist())]
        parts += map_parts([(counts, names)], "a frequent subword of the texts", "piece", path("piece"))
        names = [_plain(word) for word in text.marked(range(text.vocab_size))]
        by_piece = use.counts["piece"]
        parts.append(typical_parts(by_piece, dict.fromkeys(by_piece, names), "subwords", folder / "expert_pieces.csv"))
    if draw:
        parts += _draw_patches(test, folder)
    return Section("What the experts are used for", (*parts, *load_parts(use.stats)))


def _of_some_layers(of_layers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: of_layers[name] for name in some_layers(list(of_layers))}


def _information_table(told: Mapping[str, Sequence[float]], attributes: Sequence[str]) -> Table:
    return Table(
        "What a patch's expert says of the class of its image, % of all that it could",
        ("layer", *attributes),
        tuple((layer, *(f"{100 * share:.1f}" for share in shares)) for layer, shares in told.items()),
        note="The share of the experts' entropy that the classes explain, less what chance explains.",
    )


def _draw_patches(test: PairTest, folder: Path) -> list[Part]:
    """Write ``patches.png`` and ``routing.png`` where layers see every patch; return its page section."""
    parts: list[Part] = []
    use, encoding = test.use, test.encoding
    samples = _of_some_layers(use.patches)
    if samples:
        most = max(len(sample.gate_En) for sample in samples.values())
        rows: list[list[Tile | None]] = [[] for _ in range(most)]
        for layer, (gate_En, patch_EnCHW) in samples.items():
            for expert, row in enumerate(rows):
                row += [None] * bool(row)  # a gap between two layers
                kept = patch_EnCHW[expert][gate_En[expert] > 0] if expert < len(gate_En) else patch_EnCHW[0, :0]
                own = [
                    Tile(patch, layer if n == expert == 0 else "") for n, patch in enumerate(displayed(kept, encoding))
                ]
                row += [*own, *[None] * (patch_EnCHW.shape[1] - len(own))]
        title = "Patches of each expert, those of its largest gates"
        save_images(rows, folder / "patches.png", title, list(map(str, range(most))), side=0.42)
        seen = f"For each expert of {', '.join(samples)} up to 8 patches of different test images."
        parts.append(Picture("patches.png", seen, "The patches to which each expert gives its largest gates."))
    shown = [pair for pair in use.shown if pair.grids]
    if shown:
        layers = some_layers(list(shown[0].grids))
        images = displayed(torch.stack([pair.image for pair in shown]), encoding)
        grids = [{name: pair.grids[name].numpy() for name in layers} for pair in shown]
        rows = patch_rows(list(zip(images, grids, strict=True)), _most_experts(use))
        names = [str(number) for number in range(1, len(shown) + 1)]
        save_images(rows, folder / "routing.png", "Expert of each patch", names, _most_experts(use))
        texts = "; ".join(f"{number}: {caption_of(pair, test)}" for number, pair in enumerate(shown, 1))
        seen = f"{len(shown)} test images, and each again with its patches in the color of their expert. {texts}"
        parts.append(Picture("routing.png", seen, f"Patches and their experts, a column a layer. {texts}"))
    return parts


def words_of(pair: Shown, test: PairTest) -> Words:
    """Return a text with the experts of its tokens, as a part of a page."""
    number = next(i for i, one in enumerate(test.use.shown, 1) if one is pair)
    return Words.of_pieces(
        f"Text {number}, with the experts of each subword",
        test.encoding.text.marked(pair.ids),
        _of_some_layers(pair.pieces),
        _most_experts(test.use),
    )


def _most_experts(use: PairUse) -> int:
    return max(own.shape[1] for own in use.counts["modality"].values())


def caption_of(pair: Shown, test: PairTest) -> str:
    """Return the text of a pair, as the data has it, else as its tokens spell it."""
    if hasattr(test.data, "texts"):
        return str(test.data.texts[pair.caption])
    return _plain("".join(test.encoding.text.marked(pair.ids)))


def displayed(images: Tensor, encoding: PairEncoding) -> np.ndarray:
    """Return normalized images (N, C, H, W) as values in 0..1, (N, H, W, C)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoding.mean, encoding.std))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _plain(piece: str) -> str:
    """Return a token without the mark of a word's start."""
    return piece.replace(START, " ").strip() or piece
