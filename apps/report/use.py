"""Which expert takes what: one collector for all apps' test reports, and the parts of a page that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from apps import registry
from apps.report.base import spread_places
from apps.report.page import BarChart, HeatmapChart, Table, save_charts
from apps.report.routed import choosing, expert_label_counts, layer_label, layer_names
from apps.report.tables import write_csv

QUARTERS = ("frequent", "2nd quarter", "3rd quarter", "rare")
"""The names of the quarters, by number."""


def quarters(counts_V: np.ndarray) -> np.ndarray:
    """Return the quarter of each of V things, int64 (V,), 0 to 3: "frequent" are the first ones by falling count, as
    many as make up a quarter of all that was counted, then come the "2nd" and the "3rd quarter", and the "rare" are the
    last. Among equal counts the lower place goes first.

    Args:
        counts_V: how often each came.
    """
    order = np.argsort(-counts_V, kind="stable")
    counts = counts_V[order].astype(np.int64)
    before = np.cumsum(counts) - counts
    quarter_V = np.empty(len(counts_V), np.int64)
    quarter_V[order] = np.minimum(4 * before // max(int(counts.sum()), 1), 3)
    return quarter_V


def range_names(bounds: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the ranges up to each of ascending bounds, and beyond the last: "1-5", ..., "over 50"."""
    names = [f"{low + 1}-{high}" for low, high in zip((0, *bounds), bounds, strict=False)]
    return (*names, f"over {bounds[-1]}" if bounds else "all")


def ranges_of(values_N: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Return the place of each value's range in ``range_names``, int64 (N,)."""
    return np.searchsorted(np.asarray(bounds, np.int64), values_N, side="left")


def check_bounds(name: str, bounds: Sequence[int]) -> None:
    """Raise a ``ValueError`` that names the option, unless the bounds rise from 1 on."""
    if any(a >= b for a, b in zip((0, *bounds), bounds, strict=False)):
        raise ValueError(f"{name}={tuple(bounds)} must be ascending numbers of at least 1")


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of the shares of ``counts``, in bits; 0 without any."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) if len(p) else 0.0


def mutual_information(counts_CE: np.ndarray) -> float:
    """Return I(E; C) in bits, from counts of labels by experts; 0 without any."""
    bits = entropy(counts_CE.sum(0)) + entropy(counts_CE.sum(1)) - entropy(counts_CE.ravel())
    return max(bits, 0.0)


def typical_labels(counts_CE: np.ndarray, names: Sequence[str], most: int = 10) -> list[list[str]]:
    """Return for each expert the labels that it takes far more of than by chance, the clearest first.

    In the order of ``p(e, c) log(p(e, c) / (p(e) p(c)))``, each label's contribution to the mutual information; labels
    that the expert takes less often than by chance are left out.

    Args:
        counts_CE: routed pairs by label and expert.
        names: names of the labels.
        most: number of labels of an expert.
    """
    joint = counts_CE / max(int(counts_CE.sum()), 1)
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    gain = joint * np.log(np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0))
    typical = []
    for e in range(counts_CE.shape[1]):
        order = np.argsort(-gain[:, e], kind="stable")[:most]
        typical.append([names[c] for c in order if gain[c, e] > 0])
    return typical


def numbers(count: int) -> tuple[str, ...]:
    """Return "0", "1", ...: the names of columns without names."""
    return tuple(map(str, range(count)))


def row_names(names: Sequence[str], shares_of_all: Iterable[float]) -> tuple[str, ...]:
    """Return the names of a map's rows: each name with its share, and "all" for the last row."""
    percent = ("<1 %" if share < 0.005 else f"{100 * share:.0f} %" for share in shares_of_all)
    return (*(f"{name} ({text})" for name, text in zip(names, percent, strict=True)), "all")


def maps_by_label(
    counts: Mapping[str, np.ndarray], names: Sequence[str], title: str, row_title: str, most_rows: int = 40
) -> list[HeatmapChart]:
    """Return a map for each layer: the share of each label's tokens, and of all tokens, that each expert takes.

    A label without a token has no row. The names of the rows show each label's share of all tokens.

    Args:
        counts: layer name to (labels, E) tokens.
        names: names of the labels.
        title: title of the maps; each has the layer's name too.
        row_title: name of a label.
        most_rows: with more labels only the ones with the highest peaks have a row.
    """
    size_C = np.sum([counts_CE.sum(1) for counts_CE in counts.values()], axis=0)
    kept = np.flatnonzero(size_C)
    if len(kept) > most_rows:
        title += f": the most specialized of {len(names)}"
        peak_C = np.max([np.nan_to_num(shares(counts_CE)).max(1) for counts_CE in counts.values()], axis=0)
        kept = kept[np.sort(np.argsort(-peak_C[kept], kind="stable")[:most_rows])]
    rows = row_names([names[c] for c in kept.tolist()], size_C[kept] / max(size_C.sum(), 1))
    return [
        HeatmapChart.of(
            shares(np.concatenate([c[kept], c.sum(0, keepdims=True)])),
            rows,
            title=f"{title}, {layer}",
            row_title=row_title,
            value_title=f"share of the {row_title}'s tokens, %",
        )
        for layer, c in counts.items()
    ]


def shares(counts: np.ndarray) -> np.ndarray:
    """Return counts as shares of their row; NaN in a row without any."""
    sums = counts.sum(1, keepdims=True)
    return np.where(sums > 0, counts / np.maximum(sums, 1), np.nan)


MOST_LAYERS = 4
"""Layers of a model of many that are shown."""

Tokens = Callable[[Any, Any], Mapping[str, Tensor]]
"""What the tokens of a tape's entry are, given the batch too: as ``apps.task.Task.tokens``."""


@dataclass(frozen=True)
class Labels:
    """Labels of tokens.

    Attributes:
        of: meaning of the tokens' numbers, a key of ``Tokens``.
        count: number of labels; None: each number of a batch is a label of its own, after the labels of earlier
            batches.
        group_V: int64 (V,), the label of each number; None: a number is a label.
    """

    of: str
    count: int | None
    group_V: np.ndarray | None = None


class ExpertUse:
    """Adds up, batch by batch, which tokens each expert computes.

    Args:
        tokens: labels the tokens.
        labels: how they are labeled, by any name.

    Attributes:
        counts: computed pairs, int64 (labels, E), by the name of the labels and by layer in words.
        stats: the loads of the layers.
    """

    def __init__(self, tokens: Tokens, labels: Mapping[str, Labels]) -> None:
        self._tokens, self._labels = tokens, dict(labels)
        self.counts: dict[str, dict[str, np.ndarray]] = {name: {} for name in labels}
        self.stats = core.RoutingStats({})
        self._seen = dict.fromkeys(labels, 0)

    @torch.no_grad()
    def add(self, tape: core.Tape, batch: Any) -> None:
        """Add the ``choosing`` passes of a batch; a layer that is used twice counts twice."""
        tape = core.Tape(tuple(choosing(tape.entries)))
        self.stats = self.stats + core.RoutingStats.from_tape(tape)
        seen = dict(self._seen)
        for entry in tape.entries:
            numbers = self._tokens(entry, batch)
            for name, labels in self._labels.items():
                if labels.of in numbers:
                    counts = self._counted(entry.routing, numbers[labels.of], labels, seen[name])
                    self._seen[name] = len(counts)
                    own, layer = self.counts[name], layer_label(entry.name)
                    before = own.get(layer, counts[:0])
                    own[layer] = counts + np.pad(before, ((0, len(counts) - len(before)), (0, 0)))

    def _counted(self, routing: Any, number: Tensor, labels: Labels, seen: int) -> np.ndarray:
        """Return the pairs of a pass by label; tokens with negative numbers are left out."""
        count = seen + len(number) if labels.count is None else labels.count
        label = number.cpu() + (seen if labels.count is None else 0)
        if labels.group_V is not None:
            label = torch.where(label < 0, label, torch.from_numpy(labels.group_V)[label])
        label = torch.where(label < 0, count, label)
        return expert_label_counts(routing, label, count + 1)[:count].cpu().numpy()


def tokens_of(module: Any) -> Tokens:
    """Return the labels that a model's task gives to the tokens of its tapes."""
    return partial(registry.task_of(type(module), "report").tokens, module)


# ---- parts of a page


def some_layers(names: Sequence[str]) -> list[str]:
    """Return at most ``MOST_LAYERS`` layers, at equal steps."""
    return [names[place] for place in spread_places(len(names), MOST_LAYERS)]


def map_parts(
    counts: Sequence[tuple[Mapping[str, np.ndarray], Sequence[str]]],
    what: str,
    row: str,
    path: Path | None,
    top: float | None = None,
) -> list[HeatmapChart]:
    """Return a chart for each layer of the share of each label's tokens that each expert takes.

    Args:
        counts: as ``ExpertUse.counts`` has them by layer, with the names of the labels; several if these differ.
        what: the thing that an expert takes, such as "a class".
        row: name of a label, such as "class".
        path: the PNG file of all charts; None: none is written.
        top: share at which the colors end; None: the largest.
    """
    title = f"Which expert takes {what}"
    charts = [chart for own, names in counts if own for chart in maps_by_label(own, names, title, row)]
    if top is not None:
        charts = [replace(chart, top=100 * top) for chart in charts]
    if path is not None and charts:
        save_charts(charts, path, f"{charts[0].title.rpartition(', ')[0]} (its share of all)")
    return charts


def load_parts(stats: core.RoutingStats, path: Path | None = None) -> list[BarChart]:
    """Return a chart for each layer of the load of its experts, and plot all of them in the PNG file ``path``."""
    layers = dict(zip(layer_names(list(stats.layers)), stats.layers.values(), strict=True))
    loads = {name: layer.tokens_per_expert.double().cpu().numpy() for name, layer in layers.items()}
    drops = {name: layer.drop_rate for name, layer in layers.items()}
    charts = load_charts(loads, drops)
    if path is not None:
        save_charts(charts, path, "Load of the experts")
    return charts


def load_charts(
    tokens_per_expert: Mapping[str, np.ndarray],
    drop_rate: Mapping[str, float] | None = None,
    share_of: str = "routed pairs",
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[BarChart]:
    """Return a chart for each layer: the share of ``share_of`` that each expert has, next to the even share.

    Args:
        tokens_per_expert: layer name to (E,) counts.
        drop_rate: layer name to the share of pairs that no expert computed.
        share_of: meaning of the counts.
        names: layer name to the names of its experts; None: they are numbers.
    """
    charts = []
    for layer, counts_E in tokens_per_expert.items():
        share_E = 100 * counts_E / max(float(counts_E.sum()), 1e-12)
        even = 100 / len(counts_E)
        own = tuple(map(str, range(len(counts_E)))) if names is None else tuple(names[layer])
        top = int(np.argmax(share_E))
        seen = (
            f"Expert {own[top]} has most, {share_E[top]:.1f} %, {share_E[top] / even:.2f} times the even {even:.3g} %"
        )
        if drop_rate is not None:
            seen += f"; {100 * drop_rate[layer]:.2g} % of the pairs were dropped"
        series = {layer or "load": tuple(map(float, share_E))}
        title = f"Load, {layer}" if layer else "Load"
        charts.append(BarChart(title, f"{seen}.", "expert", f"share of {share_of}, %", own, series, line=even))
    return charts


def typical_parts(counts: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]], what: str, path: Path) -> Table:
    """Write which labels are typical of each expert as a CSV file, and return them as a table.

    Args:
        counts: as ``ExpertUse.counts`` has them by layer.
        names: names of the labels, by layer.
        what: name of the labels, such as "subwords".
        path: the file.
    """
    rows: list[dict[str, Any]] = []
    for layer, counts_VE in counts.items():
        share_E = counts_VE.sum(0) / max(int(counts_VE.sum()), 1)
        for expert, own in enumerate(typical_labels(counts_VE, names[layer])):
            rows.append({"layer": layer, "expert": expert, "share": share_E[expert], what: " ".join(own)})
    write_csv(path, rows)
    lines = tuple((row["layer"], str(row["expert"]), f"{100 * row['share']:.1f}", row[what]) for row in rows)
    return Table(f"Typical {what} of each expert", ("layer", "expert", "share, %", what), lines, sortable=True)
