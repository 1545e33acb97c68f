"""The use of a text model's experts over many tokens: tables, maps and pictures of what each expert is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from apps.data.subwords import Side
from apps.nlp.specialisation import (
    CLASSES,
    SPECIAL,
    ExpertUse,
    LayerUse,
    Specialisation,
    by_class,
    by_label,
    specialisation,
)
from apps.report.heatmaps import Heatmap, heatmaps, maps_by_label, shares
from apps.report.page import Section, Table
from apps.report.page.experts import load_charts, map_charts
from apps.report.plots import save_picture
from apps.report.specialised import typical_labels
from apps.report.tables import write_csv

_MOST_PAIRS = 16  # language pairs up to which each has a row
MOST_LAYERS = 4
"""Layers of a side that are drawn; the CSV files have all."""


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
        for expert, own in enumerate(typical_labels(layer.by_piece, pieces[layer.side])):
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
    if len(counts) > MOST_LAYERS:
        kept = {round(i) for i in np.linspace(0, len(counts) - 1, MOST_LAYERS)}
        counts = {name: c for i, (name, c) in enumerate(counts.items()) if i in kept}
    return maps_by_label(counts, names)[0]
