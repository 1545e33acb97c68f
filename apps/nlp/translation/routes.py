"""What a translation model's experts are used for, read from test sentences: tables, files and pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Side
from apps.nlp.text.batch import TranslationBatch
from apps.nlp.translation import pictures
from apps.nlp.translation.pictures import Curve, ExpertMap, Routes
from apps.nlp.translation.specialisation import (
    CLASSES,
    SPECIAL,
    ExpertUse,
    LayerUse,
    Specialisation,
    by_class,
    by_label,
    layer_name,
    shares,
    side_of,
    specialisation,
    typical_pieces,
)
from apps.report import plots
from apps.report.routed import experts_of_token
from apps.report.tables import print_table, write_csv

_MOST_PAIRS = 16  # language pairs up to which each has a row
_MOST_LAYERS = 4  # of a side, that are drawn; the CSV files have all
_USUAL_LENGTH = 14  # source subwords of a sentence that is drawn, about
_MOST_EXPERTS = 2  # of a subword, written in its cell


def report_routes(
    module: Any, batches: Sequence[TranslationBatch], folder: Path, num_sentences: int, num_drawn: int
) -> list[Path]:
    """What ``report_use`` and ``report_sentence`` write, of some of the ``batches``.

    Args:
        module: a ``Translator`` in evaluation; a dense one has the attention alone.
        batches: with references.
        folder: of the files.
        num_sentences: sentences from which the experts' use is read, about; 0 reads none.
        num_drawn: sentences drawn; 0: no picture at all.
    """
    written: list[Path] = []
    if num_sentences and batches and core.moe_layers(module.model):
        total = sum(len(batch.index_B) for batch in batches)
        # Batches are in the order of length: not the first ones, but some at equal steps.
        wanted = min(len(batches), max(1, round(len(batches) * num_sentences / max(total, 1))))
        some = [batches[(2 * i + 1) * len(batches) // (2 * wanted)] for i in range(wanted)]
        written += report_use(expert_use(module, some), folder, draw=num_drawn > 0)
    for number, sentence in enumerate(usual_sentences(batches, num_drawn), 1):
        written += report_sentence(module, sentence, number, folder)
    return written


# ---- all sentences


@torch.no_grad()
def expert_use(module: Any, batches: Iterable[TranslationBatch]) -> ExpertUse:
    """Read the experts of ``batches`` under the references; ``module`` is a ``Translator`` in evaluation."""
    use = ExpertUse(module.subwords, module.pairs)
    for batch in batches:
        source_BS, read_BL, *ids = module.example_inputs(_on(module, batch))
        with core.record(module.model) as tape:
            module.model.decode(read_BL, module.model.encode(source_BS, *ids))
        use.add(tape, batch.pair_B)
    return use


def report_use(use: ExpertUse, folder: Path, draw: bool = True) -> list[Path]:
    """Print how specialised the layers are, and write ``specialisation.csv``, ``expert_subwords.csv`` and, with
    ``draw``, ``expert_language.png`` where there are several pairs, and ``expert_class.png``.
    """
    found = specialisation(use)
    _print(found)
    pieces = {side: use.subwords.pieces(range(use.subwords.size(side)), side) for side in _sides(use.layers)}
    typical = [
        {"layer": layer.name, "expert": expert, "share": share, "subwords": " ".join(own)}
        for layer in use.layers
        for expert, (share, own) in enumerate(
            zip(
                layer.by_piece.sum(0) / max(layer.num_pairs, 1),
                typical_pieces(layer, pieces[layer.side]),
                strict=True,
            )
        )
    ]
    written = [
        write_csv(folder / "specialisation.csv", [asdict(s) for s in found]),
        write_csv(folder / "expert_subwords.csv", typical),
    ]
    if not draw:
        return written
    if len(use.pairs) > 1:
        written.append(_save(language_picture(use), folder / "expert_language.png"))
    return [*written, _save(class_picture(use), folder / "expert_class.png")]


def _print(found: Sequence[Specialisation]) -> None:
    abouts = list(dict.fromkeys(s.about for s in found))
    cells: dict[str, dict[str, str]] = {}
    for s in found:
        cells.setdefault(s.layer, {})[s.about] = f"{s.bits:.3f} ({100 * s.share:.0f} %)"
    print_table(
        "What a token's expert says of it, in bits (of the most possible); by chance at most "
        f"{max(s.by_chance for s in found):.3f}",
        ("layer", *abouts),
        [[layer, *(own.get(about, "") for about in abouts)] for layer, own in cells.items()],
    )


def language_picture(use: ExpertUse) -> Any:
    """Maps of language pairs by experts; of many pairs, of the language whose tokens a layer sees."""
    bands = []
    for side, layers in _sides(use.layers).items():
        label_B, names = use.pair_B, use.pairs
        if len(use.pairs) > _MOST_PAIRS:
            labels = use.labels()
            own = labels.get("source language" if side == "source" else "target language")
            # Where all sentences share it, the other end.
            label_B, names = own or next(iter(labels.values()))
        bands.append(_maps([(layer, by_label(layer, label_B, len(names))) for layer in layers], names))
    return pictures.expert_maps(
        bands, "Which expert takes the tokens of a language pair (its share of all)", "share of the pair's tokens, %"
    )


def class_picture(use: ExpertUse) -> Any:
    """Maps of ``CLASSES`` by experts. Few shares of the text itself are so large that they go beyond the colours."""
    bands, usual = [], [np.zeros(1)]
    for side, layers in _sides(use.layers).items():
        class_V = use.classes_of(side)
        counts = [(layer, by_class(layer, class_V)) for layer in layers]
        bands.append(_maps(counts, CLASSES))
        # Classes of less than a hundredth are all on a few experts by chance.
        usual += [shares(c[SPECIAL:][c[SPECIAL:].sum(1) * 100 >= c.sum()]).ravel() for _, c in counts]
    return pictures.expert_maps(
        bands,
        "Which expert takes the subwords of a class (its share of all)",
        "share of the class's tokens, %",
        top=float(np.quantile(np.concatenate(usual), 0.97)),
    )


def _save(picture: Any, path: Path) -> Path:
    return plots.save_picture(picture, path, flat=True)


def _sides(layers: Sequence[LayerUse]) -> dict[Side, list[LayerUse]]:
    found: dict[Side, list[LayerUse]] = {}
    for layer in layers:
        found.setdefault(layer.side, []).append(layer)
    return found


def _maps(counts: Sequence[tuple[LayerUse, np.ndarray]], names: Sequence[str]) -> list[ExpertMap]:
    """The maps of a side: a row for each name that has a token, and one for all. Of many layers some, end to end."""
    if len(counts) > _MOST_LAYERS:
        counts = [counts[round(i)] for i in np.linspace(0, len(counts) - 1, _MOST_LAYERS)]
    total = np.sum([c.sum(1) for _, c in counts], axis=0)
    kept = np.flatnonzero(total).tolist()
    rows = (*(f"{names[i]} ({_percent(total[i] / total.sum())})" for i in kept), "all")
    return [
        ExpertMap(layer.name, rows, shares(np.concatenate([c[kept], c.sum(0, keepdims=True)]))) for layer, c in counts
    ]


def _percent(share: float) -> str:
    return "<1 %" if share < 0.005 else f"{100 * share:.0f} %"


# ---- single sentences


def usual_sentences(batches: Iterable[TranslationBatch], most: int) -> list[TranslationBatch]:
    """Batches of one sentence to be drawn: of each pair in turn, one whose source is about 14 subwords long."""
    of_pair: dict[int, list[tuple[int, int, TranslationBatch, int]]] = {}
    for batch in batches:
        lengths = (batch.source_BS != PAD_ID).sum(1).tolist()
        for row, (length, pair, index) in enumerate(
            zip(lengths, batch.pair_B.tolist(), batch.index_B.tolist(), strict=True)
        ):
            own = of_pair.setdefault(pair, [])
            own.append((abs(length - _USUAL_LENGTH), index, batch, row))
            own.sort(key=lambda c: c[:2])
            del own[most:]
    order = sorted((place, pair) for pair, own in of_pair.items() for place in range(len(own)))
    chosen = [of_pair[pair][place] for place, pair in order[:most]]
    return [TranslationBatch(*(part[row : row + 1] for part in batch)) for _, _, batch, row in chosen]


@torch.no_grad()
def report_sentence(module: Any, sentence: TranslationBatch, number: int, folder: Path) -> list[Path]:
    """Translate one sentence and draw ``sentence_<number>_attention.png`` and, of a sparse model, ``_experts.png``.

    The attention is the mean over the heads of the last decoder layer but one, where it follows the words best
    (arXiv 1909.02074).
    """
    source = sentence.source_BS[0][sentence.source_BS[0] != PAD_ID]
    one = _on(module, sentence._replace(source_BS=source[None]))
    said = [*module.translate(one, module.decode).best[0], EOS_ID]
    one = one._replace(target_BL=one.source_BS.new_tensor([[BOS_ID, *said]]))
    source_1S, read_1L, *ids = module.example_inputs(one)
    with core.record(module.model) as tape:
        weights = module.model.cross_attention(source_1S, read_1L, *ids)[:, 0].float()
    subwords, pair = module.subwords, module.pairs[int(sentence.pair_B)]
    source_pieces = tuple(subwords.pieces(source.tolist(), "source"))
    read_pieces, said_pieces = (tuple(subwords.pieces(x, "target")) for x in (read_1L[0].tolist(), said))
    heading = f"{pair}, sentence {int(sentence.index_B) + 1}"
    layer, heads = max(len(weights) - 2, 0), weights.shape[1]
    picture = pictures.attention_map(
        weights[layer].mean(0).cpu().numpy(),
        source_pieces,
        said_pieces,
        f"{heading}: attention of decoder layer {layer}, mean of {heads} heads",
    )
    written = [_save(picture, folder / f"sentence_{number}_attention.png")]
    experts: dict[Side, dict[str, np.ndarray]] = {"source": {}, "target": {}}
    for entry in tape.entries:
        chosen = experts_of_token(entry.routing, _MOST_EXPERTS).cpu().numpy()
        experts[side_of(entry.name)][layer_name(entry.name)] = chosen
    if len(tape):
        sides = [
            Routes("encoder layer", source_pieces, experts["source"]),
            Routes("decoder layer", read_pieces, experts["target"]),
        ]
        num_experts = max(len(entry.routing.tokens_per_expert_E) for entry in tape.entries)
        several = any((ids[:, 1:] < num_experts).any() for side in sides for ids in side.experts.values())
        what = "experts of each subword, by falling gate" if several else "expert of each subword"
        picture = pictures.sentence_routes(sides, num_experts, f"{heading}: {what}")
        written.append(_save(picture, folder / f"sentence_{number}_experts.png"))
    return written


def _on(module: Any, batch: TranslationBatch) -> TranslationBatch:
    return TranslationBatch(*(part.to(module.device) for part in batch))


# ---- the training


def report_curves(metrics: Path, folder: Path, label_smoothing: float = 0.0) -> list[Path]:
    """Draw a run's ``metrics.csv`` as ``learning_curves.png``; nothing where there is no such file, or no curve in it.

    Args:
        metrics: the file.
        folder: of the picture.
        label_smoothing: that the training loss has and the validation loss has not.
    """
    if not metrics.is_file():
        return []
    panels = {name: curves for name, curves in read_curves(metrics, label_smoothing).items() if curves}
    if not panels:
        return []
    picture = pictures.learning_curves(panels, "Learning curves", best="BLEU")
    return [_save(picture, folder / "learning_curves.png")]


def read_curves(metrics: Path, label_smoothing: float = 0.0) -> Mapping[str, list[Curve]]:
    """Loss, scores of validation translations and load imbalance of ``metrics.csv``, what it has of them."""
    smoothed = f" (label smoothing {label_smoothing:g})" if label_smoothing else ""
    wanted = {
        "loss": {f"train{smoothed}": "train/loss", "validation": "val/loss"},
        "validation translations": {"BLEU": "val/bleu", "chrF++": "val/chrf"},
        "most loaded expert over the mean": {
            "train": "routing/load_imbalance",
            "validation": "val/routing/load_imbalance",
        },
    }
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]  # a kill may cut the last row
    found: dict[str, list[Curve]] = {}
    for panel, columns in wanted.items():
        found[panel] = []
        for label, column in columns.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                steps, values = zip(*points, strict=True)
                found[panel].append(Curve(label, np.array(steps), np.array(values)))
    return found
