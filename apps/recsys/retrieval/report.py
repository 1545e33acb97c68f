"""The test report of a retriever: recall by the popularity of the item, which experts take which items, and pairs."""

from __future__ import annotations

from collections.abc import Sequence
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
from apps.recsys.ranks import POPULARITY, QUARTERS, popularity_groups, rank_parts
from apps.recsys.retrieval.catalog import Catalog
from apps.recsys.retrieval.columns import column_of
from apps.recsys.retrieval.index import FILE, ItemIndex
from apps.recsys.tables.rows.scoring import encoding_of
from apps.report.base import Report, ReportConfig, first_batches, is_left_out, spread_places
from apps.report.page import Section, Table
from apps.report.use import ExpertUse, Labels, load_parts, map_parts, tokens_of
from core.fields import CountOrZero

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

    samples: CountOrZero = 5


@dataclass(frozen=True)
class RetrievalUse:
    """The ranks of a test's pairs, and the experts of users and items.

    Attributes:
        ks: numbers of best items.
        group_V: int64 (I + 1,), the place of each item in ``POPULARITY``, by number.
        item_N: int64 (N,), the pairs' items, by number; 0: the catalog lacks it.
        rank_N: int64 (N,), their ranks.
        best_Nk: int64 (N, k), the best items of each pair's user.
        users: the pairs' users, by name, or by the number of their row.
        index: the items' vectors.
        use: the experts of the users over the pairs, and of the items over the catalog, those by "popularity".
    """

    ks: Sequence[int]
    group_V: NDArray[np.int64]
    item_N: NDArray[np.int64]
    rank_N: NDArray[np.int64]
    best_Nk: NDArray[np.int64]
    users: Sequence[str]
    index: ItemIndex
    use: ExpertUse

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, batches: Sequence[Any]) -> RetrievalUse:
        """Return the use of a model in evaluation, given batches of pairs on its device."""
        catalog, index = Catalog.from_state(encoding_of(module)["catalogue"]), module.index()
        group_V = popularity_groups(np.concatenate(([0], catalog.count_I.numpy())))
        column = encoding_of(module)["user_column"]
        known = () if column is None else Encoding.from_state(encoding_of(module)).vocabularies[column].texts()
        use = ExpertUse(tokens_of(module), {"popularity": Labels("item", len(POPULARITY), group_V)})
        items, ranks, best, users = [], [], [], []
        for batch in batches:
            with core.record(module) as tape:
                vectors_BD = module.user_tower(batch.user)
            use.add(tape, batch)
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
        first = 1
        for rows in catalog.batches(module.item_features):
            with core.record(module) as tape:
                module.item_tower(rows.to(module.device))
            use.add(tape, torch.arange(first, first + len(rows)))
            first += len(rows)
        item_N, rank_N, best_Nk = (torch.cat(parts).numpy() for parts in (items, ranks, best))
        return cls(module.ks, group_V, item_N, rank_N, best_Nk, users, index, use)


class RetrievalReport(Report):
    """After a test in one process: recall by the popularity of the item, the items that each expert computes, and a few
    pairs with the retrieved items.

    It writes ``popularity.csv``, the items' vectors (``items.safetensors``), and of a sparse model
    ``expert_popularity.png``.

    Args:
        config: what to do.
    """

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
        if counts := use.use.counts["popularity"]:
            path = folder / "expert_popularity.png" if self.config.pictures else None
            parts = [*map_parts([(counts, POPULARITY)], "items by popularity", "popularity", path)]
            sections.append(Section("What the experts are used for", (*parts, *load_parts(use.use.stats))))
        shown = spread_places(len(use.rank_N), self.config.samples)
        return [*sections, Section("Pairs", (pairs_table(use, shown),))] if shown else sections


def write_ranks(use: RetrievalUse, folder: Path) -> Section:
    """Write ``popularity.csv``, and return its page section."""
    group_N = use.group_V[use.item_N]  # number 0, of an item that the catalog lacks, is not in training
    named: dict[str, Any] = {"what": "popularity", "about": "popularity of the item", "unit": "pairs", "note": QUARTERS}
    path = folder / "popularity.csv"
    parts = rank_parts(use.rank_N, group_N, POPULARITY, path, recall_at=use.ks, **named)
    return Section("What is retrieved", tuple(parts))


def pairs_table(use: RetrievalUse, places: Sequence[int]) -> Table:
    """Return pairs with the rank of their item, and the items retrieved for their user."""

    def named(number: int) -> str:
        return str(use.index.values[number - 1]) if number else "not in the catalog"

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
