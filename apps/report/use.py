"""Which expert takes what: one collector for the test reports of all apps, and what a page shows of its counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from apps.report.heatmaps import maps_by_label
from apps.report.page import BarChart, HeatmapChart, Table, save_charts
from apps.report.routed import expert_label_counts, layer_label
from apps.report.specialised import typical_labels
from apps.report.tables import write_csv

MOST_LAYERS = 4
"""Layers of a model of many that are shown."""

Tokens = Callable[[Any, Any], Mapping[str, Tensor]]
"""What the tokens of a tape's entry are, given the batch too: as ``apps.task.Task.tokens``."""


@dataclass(frozen=True)
class Labels:
    """Labels of tokens.

    Attributes:
        of: what the numbers of the tokens are, a key of ``Tokens``.
        count: number of labels; None: each number of a batch is a label of its own, after those of earlier batches.
        group_V: int64 (V,), the label of each number; None: a number is a label.
    """

    of: str
    count: int | None
    group_V: np.ndarray | None = None


class ExpertUse:
    """Adds up, batch by batch, which tokens each expert computes.

    Args:
        tokens: says what the tokens are.
        labels: how they are labelled, by any name.

    Attributes:
        counts: computed pairs, int64 (labels, E), by the name of the labels and by layer in words.
        stats: the loads of all layers.
    """

    def __init__(self, tokens: Tokens, labels: Mapping[str, Labels]) -> None:
        self._tokens, self._labels = tokens, dict(labels)
        self.counts: dict[str, dict[str, np.ndarray]] = {name: {} for name in labels}
        self.stats = core.RoutingStats({})
        self._seen = dict.fromkeys(labels, 0)

    @torch.no_grad()
    def add(self, tape: core.Tape, batch: Any) -> None:
        """Add the passes of a batch; a layer that is used twice counts twice."""
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
        """Return the pairs of a pass by label; those of negative numbers are left out."""
        count = seen + len(number) if labels.count is None else labels.count
        label = number.cpu() + (seen if labels.count is None else 0)
        if labels.group_V is not None:
            label = torch.where(label < 0, label, torch.from_numpy(labels.group_V)[label])
        label = torch.where(label < 0, count, label)
        return expert_label_counts(routing, label, count + 1)[:count].cpu().numpy()


def tokens_of(module: Any) -> Tokens:
    """Return what the task of a model says of the tokens of its tapes."""
    return partial(registry.task_of(type(module), "report").tokens, module)


# ---- what a page shows


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
        what: what an expert takes, such as "a class".
        row: what a label is, such as "class".
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
    """Return a chart for each layer of the load of its experts, and draw all of them as the PNG file ``path``."""
    layers = {layer_label(name): layer for name, layer in stats.layers.items()}
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
    """Return a chart for each layer: the share of ``share_of`` that each expert has, beside the even share.

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
        what: what the labels are, such as "subwords".
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
