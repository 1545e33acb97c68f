"""The use of a translation model's experts in test sentences: tables, files and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Side
from apps.nlp.text.batch import TranslationBatch
from apps.nlp.translation import pictures
from apps.nlp.translation.pictures import Routes
from apps.nlp.translation.specialisation import (
    CLASSES,
    SPECIAL,
    ExpertUse,
    LayerUse,
    Specialisation,
    by_class,
    by_label,
    side_of,
    specialisation,
    typical_pieces,
)
from apps.report.heatmaps import Heatmap, heatmaps, maps_by_label, shares
from apps.report.page import Part, Picture, Section, Table
from apps.report.page.experts import load_charts, map_charts
from apps.report.plots import save_picture
from apps.report.routed import experts_of_token, layer_label
from apps.report.tables import write_csv

_MOST_PAIRS = 16  # language pairs up to which each has a row
_MOST_LAYERS = 4  # of a side, that are drawn; the CSV files have all
_USUAL_LENGTH = 14  # source subwords of a sentence that is drawn, about
_MOST_EXPERTS = 2  # of a subword, written in its cell


def spread_batches(batches: Sequence[TranslationBatch], num_sentences: int) -> list[TranslationBatch]:
    """Return batches at equal steps, of about so many sentences: the first ones would all be of one length."""
    if not num_sentences or not batches:
        return []
    total = sum(len(batch.index_B) for batch in batches)
    wanted = min(len(batches), max(1, round(len(batches) * num_sentences / max(total, 1))))
    return [batches[(2 * i + 1) * len(batches) // (2 * wanted)] for i in range(wanted)]


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


def write_use(use: ExpertUse, folder: Path, draw: bool = True) -> Section:
    """Write how specialised the layers are: ``specialisation.csv``, ``expert_subwords.csv`` and, with
    ``draw``, ``expert_language.png`` where there are several pairs, and ``expert_class.png``.

    Returns:
        What a page shows of it.
    """
    rows = specialisation(use)
    table = _table(rows)
    write_csv(folder / "specialisation.csv", [asdict(row) for row in rows])
    pieces = {side: use.subwords.pieces(range(use.subwords.size(side)), side) for side in _sides(use.layers)}
    typical = []
    for layer in use.layers:
        share_E = layer.by_piece.sum(0) / max(layer.num_pairs, 1)
        for expert, own in enumerate(typical_pieces(layer, pieces[layer.side])):
            row = {"layer": layer.name, "expert": expert, "share": share_E[expert], "subwords": " ".join(own)}
            typical.append(row)
    write_csv(folder / "expert_subwords.csv", typical)
    maps = map_charts(_flat(class_maps(use)), "Which expert takes a class of subwords", "class")
    if len(use.pairs) > 1:
        maps += map_charts(_flat(language_maps(use)), "Which expert takes a language", "language")
    if draw and len(use.pairs) > 1:
        save_picture(language_picture(use), folder / "expert_language.png")
    if draw:
        save_picture(class_picture(use), folder / "expert_class.png")
    words = Table(
        "Typical subwords of each expert",
        ("layer", "expert", "share, %", "subwords"),
        tuple((r["layer"], str(r["expert"]), f"{100 * r['share']:.1f}", r["subwords"]) for r in typical),
        sortable=True,
    )
    counts = {layer.name: layer.by_piece.sum(0) for layer in use.layers}
    return Section("What the experts are used for", (table, *maps, *load_charts(counts), words))


def _flat(bands: Sequence[Sequence[Heatmap]]) -> list[Heatmap]:
    return [m for band in bands for m in band]


def _table(rows: Sequence[Specialisation]) -> Table:
    abouts = list(dict.fromkeys(s.about for s in rows))
    cells: dict[str, dict[str, str]] = {}
    for s in rows:
        cells.setdefault(s.layer, {})[s.about] = f"{s.bits:.3f} ({100 * s.share:.0f} %)"
    return Table(
        "What a token's expert says of it, in bits (of the most possible); by chance at most "
        f"{max(s.by_chance for s in rows):.3f}",
        ("layer", *abouts),
        tuple((layer, *(own.get(about, "") for about in abouts)) for layer, own in cells.items()),
    )


def language_maps(use: ExpertUse) -> list[list[Heatmap]]:
    """Return maps of language pairs by experts, a side each; of many pairs, of the language whose tokens it sees."""
    bands = []
    for side, layers in _sides(use.layers).items():
        label_B, names = use.pair_B, use.pairs
        if len(use.pairs) > _MOST_PAIRS:
            labels = use.labels()
            own = labels.get("source language" if side == "source" else "target language")
            # Where all sentences share it, the other end.
            label_B, names = own or next(iter(labels.values()))
        bands.append(_maps({layer.name: by_label(layer, label_B, len(names)) for layer in layers}, names))
    return bands


def language_picture(use: ExpertUse) -> Any:
    """Draw ``language_maps``."""
    title = "Which expert takes the tokens of a language pair (its share of all)"
    return heatmaps(language_maps(use), title, "share of the pair's tokens, %")


def class_maps(use: ExpertUse) -> list[list[Heatmap]]:
    """Return maps of ``CLASSES`` by experts, a side each."""
    return [_maps(_class_counts(use, side, layers), CLASSES) for side, layers in _sides(use.layers).items()]


def _class_counts(use: ExpertUse, side: Side, layers: Sequence[LayerUse]) -> dict[str, np.ndarray]:
    class_V = use.classes_of(side)
    return {layer.name: by_class(layer, class_V) for layer in layers}


def class_picture(use: ExpertUse) -> Any:
    """Draw ``class_maps``; the colours end where few shares of the text itself are larger."""
    usual = [np.zeros(1)]
    for side, layers in _sides(use.layers).items():
        counts = _class_counts(use, side, layers)
        # Classes of less than a hundredth are all on a few experts by chance.
        usual += [shares(c[SPECIAL:][c[SPECIAL:].sum(1) * 100 >= c.sum()]).ravel() for c in counts.values()]
    title, top = (
        "Which expert takes the subwords of a class (its share of all)",
        np.quantile(np.concatenate(usual), 0.97),
    )
    return heatmaps(class_maps(use), title, "share of the class's tokens, %", top=float(top))


def _sides(layers: Sequence[LayerUse]) -> dict[Side, list[LayerUse]]:
    by_side: dict[Side, list[LayerUse]] = {}
    for layer in layers:
        by_side.setdefault(layer.side, []).append(layer)
    return by_side


def _maps(counts: dict[str, np.ndarray], names: Sequence[str]) -> list[Heatmap]:
    """Return the maps of a side; of many layers some, end to end."""
    if len(counts) > _MOST_LAYERS:
        kept = {round(i) for i in np.linspace(0, len(counts) - 1, _MOST_LAYERS)}
        counts = {name: c for i, (name, c) in enumerate(counts.items()) if i in kept}
    return maps_by_label(counts, names)[0]


# ---- single sentences


def usual_sentences(batches: Iterable[TranslationBatch], most: int) -> list[TranslationBatch]:
    """Return sentences to draw as batches of one: of each pair in turn, one whose source is about 14 subwords long."""
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
def write_sentence(module: Any, sentence: TranslationBatch, number: int, folder: Path) -> list[Part]:
    """Translate one sentence and draw ``sentence_<number>_attention.png`` and, of a sparse model, ``_experts.png``.

    The attention is the mean over the heads of the last decoder layer but one, where it follows the words best
    (arXiv 1909.02074).

    Returns:
        What a page shows of it.
    """
    source = sentence.source_BS[0][sentence.source_BS[0] != PAD_ID]
    one = _on(module, sentence._replace(source_BS=source[None]))
    written = [*module.translate(one, module.decode).best[0], EOS_ID]
    one = one._replace(target_BL=one.source_BS.new_tensor([[BOS_ID, *written]]))
    source_1S, read_1L, *ids = module.example_inputs(one)
    with core.record(module.model) as tape:
        weights = module.model.cross_attention(source_1S, read_1L, *ids)[:, 0].float()
    subwords, pair = module.subwords, module.pairs[int(sentence.pair_B)]
    source_pieces = tuple(subwords.pieces(source.tolist(), "source"))
    read_pieces, written_pieces = (tuple(subwords.pieces(x, "target")) for x in (read_1L[0].tolist(), written))
    heading = f"{pair}, sentence {int(sentence.index_B) + 1}"
    layer, heads = max(len(weights) - 2, 0), weights.shape[1]
    picture = pictures.attention_map(
        weights[layer].mean(0).cpu().numpy(),
        source_pieces,
        written_pieces,
        f"{heading}: attention of decoder layer {layer}, mean of {heads} heads",
    )
    name = f"sentence_{number}_attention.png"
    save_picture(picture, folder / name)
    seen = (
        f"which of the {len(source_pieces)} source subwords each of the {len(written_pieces)} written ones attends to"
    )
    shown: list[Part] = [Picture(name, f"{heading}: {seen}", f"{heading}: attention of the decoder.")]
    if not len(tape):
        return shown
    experts: dict[Side, dict[str, np.ndarray]] = {"source": {}, "target": {}}
    for entry in tape.entries:
        chosen = experts_of_token(entry.routing, _MOST_EXPERTS).cpu().numpy()
        experts[side_of(entry.name)][layer_label(entry.name)] = chosen
    sides = [
        Routes("encoder layer", source_pieces, experts["source"]),
        Routes("decoder layer", read_pieces, experts["target"]),
    ]
    num_experts = max(len(entry.routing.tokens_per_expert_E) for entry in tape.entries)
    several = any((ids[:, 1:] < num_experts).any() for side in sides for ids in side.experts.values())
    what = "experts of each subword, by falling gate" if several else "expert of each subword"
    picture = pictures.sentence_routes(sides, num_experts, f"{heading}: {what}")
    name = f"sentence_{number}_experts.png"
    save_picture(picture, folder / name)
    return [Picture(name, f"{heading}: {what}, by layer", f"{heading}: {what}."), *shown]


def _on(module: Any, batch: TranslationBatch) -> TranslationBatch:
    return TranslationBatch(*(part.to(module.device) for part in batch))
