"""The use of a text model's experts over many tokens: tables, maps and pictures of each expert's use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from apps.data.subwords import Side
from apps.nlp.specialization import (
    CLASSES,
    SIDES,
    SPECIAL,
    LayerUse,
    Specialization,
    TextUse,
    by_class,
    by_label,
    specialization,
)
from apps.report.page import Section, Table
from apps.report.tables import write_csv
from apps.report.use import load_parts, map_parts, shares, some_layers, typical_parts

_MOST_PAIRS = 16  # language pairs up to which each has a row


def write_use(use: TextUse, folder: Path, draw: bool = True) -> Section:
    """Write how specialized the layers are: ``specialization.csv``, ``expert_subwords.csv`` and, with ``draw``,
    ``expert_language.png`` or ``expert_task.png`` if there are several of them, and ``expert_class.png``.

    Returns:
        The section for the page.
    """
    rows = specialization(use)
    write_csv(folder / "specialization.csv", [asdict(row) for row in rows])
    by_piece = {layer.name: layer.by_piece for layer in use.layers}
    pieces = {side: use.pieces(side) for side in SIDES}
    words = {layer.name: pieces[layer.side] for layer in use.layers}
    typical = typical_parts(by_piece, words, "subwords", folder / "expert_subwords.csv")
    classes = class_counts(use)
    path = folder / "expert_class.png" if draw else None
    maps = map_parts([(of, CLASSES) for of in classes], "a class of subwords", "class", path, _usual(classes))
    if len(use.pairs) > 1:
        what = "language" if use.noun == "pair" else use.noun
        path = folder / f"expert_{what}.png" if draw else None
        maps += map_parts(language_counts(use), f"a {what}", what, path)
    return Section("What the experts are used for", (_table(rows), *maps, *load_parts(use.stats), typical))


def _table(rows: Sequence[Specialization]) -> Table:
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


def language_counts(use: TextUse) -> list[tuple[dict[str, np.ndarray], Sequence[str]]]:
    """Return routed pairs of language pairs by experts, a side each; of many pairs, of the language whose tokens it
    sees."""
    sides: list[tuple[dict[str, np.ndarray], Sequence[str]]] = []
    for side, layers in _sides(use):
        label_B, names = use.pair_B, use.pairs
        if len(use.pairs) > _MOST_PAIRS:
            labels = use.labels()
            own = labels.get("source language" if side == "source" else "target language")
            # Where all sentences share it, the other end.
            label_B, names = own or next(iter(labels.values()))
        sides.append(({layer.name: by_label(layer, label_B, len(names)) for layer in layers}, names))
    return sides


def class_counts(use: TextUse) -> list[dict[str, np.ndarray]]:
    """Return routed pairs of ``CLASSES`` by experts, a side each."""
    return [{layer.name: by_class(layer, use.classes_of(side)) for layer in layers} for side, layers in _sides(use)]


def _usual(classes: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Return the share that few shares of the text itself exceed."""
    usual = [np.zeros(1)]
    for of_layers in classes:
        # Classes of less than a hundredth are all on a few experts by chance.
        usual += [shares(c[SPECIAL:][c[SPECIAL:].sum(1) * 100 >= c.sum()]).ravel() for c in of_layers.values()]
    return float(np.quantile(np.concatenate(usual), 0.97))


def _sides(use: TextUse) -> Iterator[tuple[Side, list[LayerUse]]]:
    """Yield the layers of each side; of many some, at equal steps."""
    for side in SIDES:
        layers = {layer.name: layer for layer in use.layers if layer.side == side}
        if layers:
            yield side, [layers[name] for name in some_layers(list(layers))]
