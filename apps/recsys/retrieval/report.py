"""The test report of a retriever: recall by the popularity of the item, which experts take which items, and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray

import core
from apps.data.loader import batches_of_test
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.retrieval.catalogue import Catalogue
from apps.recsys.retrieval.columns import column_of
from apps.recsys.retrieval.index import FILE, ItemIndex
from apps.recsys.sequence.report import POPULARITY, popularity_groups
from apps.recsys.tables.scoring import encoding_of
from apps.report.base import Report, ReportConfig, first_batches, is_left_out, spread_places
from apps.report.heatmaps import heatmaps, maps_by_label
from apps.report.page import BarChart, Part, Section, Table
from apps.report.page.experts import load_charts, map_charts
from apps.report.plots import save_picture
from apps.report.routed import expert_label_counts
from apps.report.tables import write_csv

_BEST_SHOWN = 5


@core.register_config
@dataclass(frozen=True)
class RetrievalReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the metrics of a retriever.

    Attributes:
        routing_examples: test pairs whose ranks and routing are read once more, to the end of a batch; 0 reads none.
        samples: pairs that are shown, at equal steps through those that are read.

    Raises:
        ValueError: a number out of its range.
    """

    samples: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(samples=0)


@dataclass(frozen=True)
class RetrievalUse:
    """The ranks of a test's pairs, and the experts of users and items.

    Attributes:
        ks: numbers of best items.
        group_V: int64 (I + 1,), the place of each item in ``POPULARITY``, by number.
        item_N: int64 (N,), the pairs' items, by number; 0: the catalogue lacks it.
        rank_N: int64 (N,), their ranks.
        best_Nk: int64 (N, k), the best items of each pair's user.
        users: the pairs' users, by name, or by the number of their row.
        index: the items' vectors.
        popularity: the catalogue's items by popularity, (len(POPULARITY), E) for each layer of the items' tower.
        stats: the loads of the users' layers over the pairs, and of the items' layers over the catalogue.
    """

    ks: Sequence[int]
    group_V: NDArray[np.int64]
    item_N: NDArray[np.int64]
    rank_N: NDArray[np.int64]
    best_Nk: NDArray[np.int64]
    users: Sequence[str]
    index: ItemIndex
    popularity: Mapping[str, NDArray[np.int64]]
    stats: core.RoutingStats

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, batches: Sequence[Any]) -> RetrievalUse:
        """Return the use of a model in evaluation, given batches of pairs on its device."""
        catalogue, index = Catalogue.from_state(encoding_of(module)["catalogue"]), module.index()
        group_V = popularity_groups(np.concatenate(([0], catalogue.count_I.numpy())))
        column = encoding_of(module)["user_column"]
        known = () if column is None else Encoding.from_state(encoding_of(module)).vocabularies[column].texts()
        items, ranks, best, users, stats = [], [], [], [], core.RoutingStats({})
        for batch in batches:
            with core.record(module) as tape:
                vectors_BD = module.user_tower(batch.user)
            stats = stats + core.RoutingStats.from_tape(tape)
            items.append(batch.item_B.cpu())
            if column is None:
                users += [f"row {row}" for row in batch.index_B.tolist()]
            else:
                users += [
                    known[row - 1] if row else "unknown"
                    for row in column_of(batch.user, module.user_features, column).tolist()
                ]
            ranks.append(index.ranks(vectors_BD, batch.item_B, batch.seen_BH).cpu())
            best.append(index.search(vectors_BD, _BEST_SHOWN, batch.seen_BH)[0].cpu())
        popularity: dict[str, NDArray[np.int64]] = {}
        first = 1
        for rows in catalogue.batches(module.item_features):
            group_B = torch.from_numpy(group_V[first : first + len(rows)])
            first += len(rows)
            with core.record(module) as tape:
                module.item_tower(rows.to(module.device))
            stats = stats + core.RoutingStats.from_tape(tape)
            for entry in tape.entries:
                counts = expert_label_counts(entry.routing, group_B, len(POPULARITY)).cpu().numpy()
                popularity[tower_label(entry.name)] = popularity.get(tower_label(entry.name), 0) + counts
        item_N, rank_N, best_Nk = (torch.cat(parts).numpy() for parts in (items, ranks, best))
        return cls(module.ks, group_V, item_N, rank_N, best_Nk, users, index, popularity, stats)

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of the pairs by the popularity of their item: a row for each group that has some."""
        rows = []
        group_N = self.group_V[self.item_N]  # number 0, of an item that the catalogue lacks, is not in training
        for place, name in enumerate(POPULARITY):
            rank_N = self.rank_N[group_N == place]
            if len(rank_N):
                recall = {f"recall_{k}": float((rank_N <= k).mean()) for k in self.ks}
                middle = {"mrr": float((1 / rank_N).mean()), "median_rank": float(np.median(rank_N))}
                rows.append({"popularity": name, "pairs": len(rank_N), **recall, **middle})
        return rows


class RetrievalReport(Report):
    """After a test in one process: recall by the popularity of the item, the items that each expert computes, and a few
    pairs with what the model retrieves.

    It writes ``popularity.csv``, the items' vectors (``items.safetensors``), and of a sparse model
    ``expert_popularity.png``.

    Args:
        config: what to do.
    """

    def __init__(self, config: RetrievalReportConfig) -> None:
        self.config = config

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if is_left_out(trainer):
            return None
        with trainer.precision_plugin.forward_context():
            batches = [
                trainer.strategy.batch_to_device(batch, pl_module.device)
                for batch in first_batches(batches_of_test(trainer), self.config.routing_examples)
            ]
            return RetrievalUse.of(pl_module, batches) if batches else None

    def write(self, collected: Any, folder: Path) -> list[Section]:
        use: RetrievalUse = collected
        use.index.save(folder / FILE)
        sections = [write_ranks(use, folder)]
        if use.popularity:
            sections.append(write_experts(use, folder, draw=self.config.pictures))
        shown = spread_places(len(use.rank_N), self.config.samples)
        return [*sections, Section("Pairs", (pairs_table(use, shown),))] if shown else sections


def write_ranks(use: RetrievalUse, folder: Path) -> Section:
    """Write ``popularity.csv``, and return what a page shows of it."""
    rows = use.rows()
    write_csv(folder / "popularity.csv", rows)
    names = [f"recall_{k}" for k in use.ks]
    titles = [f"recall@{k}, %" for k in use.ks]
    lines = tuple(
        (
            row["popularity"],
            f"{row['pairs']:,}",
            *(f"{100 * row[name]:.2f}" for name in (*names, "mrr")),
            f"{row['median_rank']:,.0f}",
        )
        for row in rows
    )
    columns = ("popularity", "pairs", *titles, "MRR, %", "median rank")
    note = "Quarters of the training's pairs: few popular items make up the first one."
    series = {title: tuple(100 * row[name] for row in rows) for title, name in zip(titles, names, strict=True)}
    last = series[titles[-1]]
    best, worst = (f(range(len(rows)), key=last.__getitem__) for f in (max, min))
    summary = (
        f"Recall@{use.ks[-1]} is highest for {rows[best]['popularity']}, {last[best]:.1f} %, and lowest for "
        f"{rows[worst]['popularity']}, {last[worst]:.1f} %."
    )
    groups = tuple(row["popularity"] for row in rows)
    chart = BarChart("Recall by popularity of the item", summary, "popularity of the item", "%", groups, series)
    return Section("What is retrieved", (Table("By the popularity of the item", columns, lines, note=note), chart))


def write_experts(use: RetrievalUse, folder: Path, draw: bool = True) -> Section:
    """Write, with ``draw``, ``expert_popularity.png``, and return what a page shows of the experts."""
    maps = maps_by_label(use.popularity, POPULARITY)[0]
    parts: list[Part] = [*map_charts(maps, "Which expert takes items by popularity", "popularity")]
    if draw:
        title = "Which expert takes items by popularity (its share of all)"
        save_picture(heatmaps([maps], title, "share of the items, %"), folder / "expert_popularity.png")
    layers = {tower_label(name): stats for name, stats in use.stats.layers.items()}
    loads = {name: stats.tokens_per_expert.double().cpu().numpy() for name, stats in layers.items()}
    parts += load_charts(loads, {name: stats.drop_rate for name, stats in layers.items()})
    return Section("What the experts are used for", tuple(parts))


def pairs_table(use: RetrievalUse, places: Sequence[int]) -> Table:
    """Return pairs with the rank of their item, and what the model retrieves for their user."""

    def named(number: int) -> str:
        return str(use.index.values[number - 1]) if number else "not in the catalogue"

    rows = tuple(
        (
            use.users[n],
            named(use.item_N[n]),
            f"{use.rank_N[n]:,}",
            " · ".join(named(number) for number in use.best_Nk[n] if number),
        )
        for n in places
    )
    return Table(
        "Pairs of the test, with what is retrieved", ("user", "item", "its rank", "retrieved, best first"), rows
    )


def tower_label(layer: str) -> str:
    """Return "items, block 0" for ``item_tower.blocks.0.ffn``."""
    tower, _, rest = layer.partition("_tower.blocks.")
    return f"{tower}s, block {rest.partition('.')[0]}"
