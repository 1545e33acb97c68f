"""The test report of a next-item model: ranks by popularity and by length, the experts' items, and a few users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.recsys.metrics import CUTOFF, target_ranks
from apps.report.base import Report, ReportConfig, first_batches, is_left_out, spread_places
from apps.report.groups import check_bounds, quarters, range_names, ranges_of
from apps.report.heatmaps import heatmaps, maps_by_label
from apps.report.page import BarChart, Part, Section, Table
from apps.report.page.experts import load_charts, map_charts
from apps.report.plots import save_picture
from apps.report.routed import expert_label_counts, layer_label
from apps.report.tables import write_csv
from core.fields import CountOrZero

POPULARITY = ("most popular", "2nd quarter", "3rd quarter", "least popular", "not in training")
"""The groups of items: quarters of the training's interactions, from the most popular items on."""
BACK = (1, 5, 20, 50)
"""Bounds of the places of items in a history, counted from its end: 1 is the last item."""
_LAST_SHOWN, _BEST_SHOWN = 6, 5


@core.register_config
@dataclass(frozen=True)
class NextItemReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the metrics of a next-item model.

    Attributes:
        routing_examples: test users whose ranks and routing are read once more, to the end of a batch; 0 reads none.
        lengths: items of a history up to which its users are one group, ascending; longer ones are the last.
        samples: users that are shown, at equal steps through those that are read.

    Raises:
        ValueError: a number out of its range.
    """

    lengths: tuple[int, ...] = (5, 10, 20, 50, 100)
    samples: CountOrZero = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("report.lengths", self.lengths)


@dataclass(frozen=True)
class User:
    """A user of the test: the last items of the history, the next one, its rank, and the best predicted ones, by id."""

    user: int
    history: tuple[int, ...]
    target: int
    rank: int
    best: tuple[int, ...]


@dataclass
class NextItemUse:
    """Ranks of the next items, and which expert computes which items, over the users of a test.

    Args:
        group_V: int64 (num_items + 1,), the place of each item in ``POPULARITY``; None: it is not known.

    Attributes:
        users: the users, in their order.
        length_N: int64 (N,), items of each user's history.
        popularity: computed pairs by the item's popularity, (len(POPULARITY), E) for each layer.
        back: computed pairs by the item's place from the end of the history, (len(BACK) + 1, E) for each layer.
        stats: the layers' loads; None before the first batch with MoE layers.
    """

    group_V: np.ndarray | None
    users: list[User] = field(default_factory=list)
    length_N: list[int] = field(default_factory=list)
    popularity: dict[str, np.ndarray] = field(default_factory=dict)
    back: dict[str, np.ndarray] = field(default_factory=dict)
    stats: core.RoutingStats | None = None

    @torch.no_grad()
    def add(self, module: Any, batch: Any) -> None:
        """Add a batch, given the module in evaluation and the batch on its device."""
        with core.record(module.model) as tape:
            out = module.task_loss(batch)
        kept_B = (batch.targets_BS > 0).any(1)
        rank_B = target_ranks(out.outputs, out.targets).tolist()
        best_Bk = out.outputs.topk(min(_BEST_SHOWN, module.num_items), dim=-1).indices.tolist()
        rows = zip(batch.user_B[kept_B].tolist(), batch.items_BS[kept_B].tolist(), strict=True)
        for (user, items), target, rank, best in zip(rows, out.targets.tolist(), rank_B, best_Bk, strict=True):
            history = [item for item in items if item]
            self.length_N.append(len(history))
            self.users.append(User(user, tuple(history[-_LAST_SHOWN:]), target, rank, tuple(best)))
        if not len(tape):
            return
        stats = core.RoutingStats.from_tape(tape)
        self.stats = stats if self.stats is None else self.stats + stats
        for entry in tape.entries:
            ids_BS = None if entry.context is None else entry.context.token_ids_BS
            if ids_BS is not None and ids_BS.numel() == entry.routing.num_tokens:
                self._add_items(layer_label(entry.name), entry.routing, ids_BS)

    def _add_items(self, layer: str, routing: Any, ids_BS: Tensor) -> None:
        real_BS = ids_BS > 0
        # 1 is the last item of a row, whose items stand at its begin.
        back_BS = real_BS.sum(1, keepdim=True) - torch.arange(ids_BS.shape[1], device=ids_BS.device)
        back_T = torch.from_numpy(ranges_of(back_BS.clamp_min(1).flatten().cpu().numpy(), BACK))
        labels = {"back": (self.back, back_T, len(BACK) + 1)}
        if self.group_V is not None:
            group_T = torch.from_numpy(self.group_V)[ids_BS.flatten().cpu()]
            labels["popularity"] = (self.popularity, group_T, len(POPULARITY))
        for counts, label_T, number in labels.values():
            own = expert_label_counts(routing, label_T, number).cpu().numpy()
            counts[layer] = counts.get(layer, 0) + own

    def rows(self, what: str, names: Sequence[str], group_N: np.ndarray) -> list[dict[str, Any]]:
        """Return the metrics of each group of users that has one: a row each, with its name as ``what``."""
        rank_N = np.array([user.rank for user in self.users], dtype=np.float64)
        rows = []
        for place, name in enumerate(names):
            own_N = rank_N[group_N == place]
            if len(own_N):
                hit_N = own_N <= CUTOFF
                rows.append(
                    {
                        what: name,
                        "users": len(own_N),
                        f"recall_{CUTOFF}": hit_N.mean(),
                        f"ndcg_{CUTOFF}": (hit_N / np.log2(1 + own_N)).mean(),
                        "mrr": (1 / own_N).mean(),
                        "median_rank": float(np.median(own_N)),
                    }
                )
        return rows


class NextItemReport(Report):
    """After a test in one process: the ranks by the popularity of the next item and by the length of the history, the
    items that each expert computes, and a few users with what the model recommends them.

    It writes ``lengths.csv``, ``popularity.csv``; and of a sparse model ``expert_popularity.png`` and
    ``expert_place.png``.

    Args:
        config: what to do.
    """

    def __init__(self, config: NextItemReportConfig) -> None:
        self.config = config

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if is_left_out(trainer):
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts_V = getattr(data, "training_counts", None)
        use = NextItemUse(None if counts_V is None else popularity_groups(counts_V))
        batches = batches_of_test(trainer)
        for batch in first_batches(batches, self.config.routing_examples, lambda batch: len(batch.items_BS)):
            with trainer.precision_plugin.forward_context():
                use.add(pl_module, trainer.strategy.batch_to_device(batch, pl_module.device))
        return (use, data) if use.users else None

    def write(self, collected: Any, folder: Path) -> list[Section]:
        use, data = collected
        sections = [write_ranks(use, self.config.lengths, folder)]
        if use.stats is not None:
            sections.append(write_experts(use, folder, draw=self.config.pictures))
        shown = [use.users[place] for place in spread_places(len(use.users), self.config.samples)]
        return [*sections, Section("Users", (users_table(shown, data),))] if shown else sections


def popularity_groups(counts_V: np.ndarray) -> np.ndarray:
    """Return the place of each item in ``POPULARITY``, given how often it trains, both by id; id 0 is padding."""
    return np.where(counts_V > 0, quarters(counts_V), len(POPULARITY) - 1)


def write_ranks(use: NextItemUse, lengths: Sequence[int], folder: Path) -> Section:
    """Write ``popularity.csv`` and ``lengths.csv``, and return what a page shows of them."""
    parts: list[Part] = []
    if use.group_V is not None:
        group_N = use.group_V[[user.target for user in use.users]]
        rows = use.rows("popularity", POPULARITY, group_N)
        write_csv(folder / "popularity.csv", rows)
        note = "Quarters of the training's interactions: few popular items make up the first one."
        parts += [_table("By the popularity of the next item", "popularity", rows, note), _bars(rows, "popularity")]
    rows = use.rows("items", range_names(lengths), ranges_of(np.array(use.length_N), lengths))
    write_csv(folder / "lengths.csv", rows)
    parts += [_table("By the items of the history", "items", rows), _bars(rows, "items")]
    return Section("Ranks of the next items", tuple(parts))


def _table(title: str, what: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    names = [f"recall_{CUTOFF}", f"ndcg_{CUTOFF}", "mrr"]
    lines = tuple(
        (row[what], f"{row['users']:,}", *(f"{100 * row[name]:.2f}" for name in names), f"{row['median_rank']:,.0f}")
        for row in rows
    )
    return Table(title, (what, "users", *_titles(), "MRR, %", "median rank"), lines, note=note)


def _titles() -> tuple[str, str]:
    return f"recall@{CUTOFF}, %", f"NDCG@{CUTOFF}, %"


def _bars(rows: Sequence[Mapping[str, Any]], what: str) -> BarChart:
    recall, ndcg = (tuple(100 * float(row[name]) for row in rows) for name in (f"recall_{CUTOFF}", f"ndcg_{CUTOFF}"))
    best, worst = (f(range(len(rows)), key=lambda i: recall[i]) for f in (max, min))
    about = {"popularity": "popularity of the next item", "items": "items of the history"}[what]
    summary = (
        f"Recall@{CUTOFF} is highest for {rows[best][what]}, {recall[best]:.1f} %, and lowest for {rows[worst][what]}, "
        f"{recall[worst]:.1f} %."
    )
    names = tuple(row[what] for row in rows)
    return BarChart(f"Ranks by {about}", summary, about, "%", names, dict(zip(_titles(), (recall, ndcg), strict=True)))


def write_experts(use: NextItemUse, folder: Path, draw: bool = True) -> Section:
    """Write, with ``draw``, ``expert_popularity.png`` and ``expert_place.png``, and return what a page shows."""
    assert use.stats is not None
    first, *others = range_names(BACK)
    place_names = ("last item", *(f"{name} from the end" for name in others))
    assert first == "1-1"
    parts: list[Part] = []
    for name, counts, names, what in (
        ("expert_popularity.png", use.popularity, POPULARITY, "popularity"),
        ("expert_place.png", use.back, place_names, "place in the history"),
    ):
        if not counts:
            continue
        maps = maps_by_label(counts, names)[0]
        parts += map_charts(maps, f"Which expert takes items by {what}", what)
        if draw:
            title = f"Which expert takes items by {what} (its share of all)"
            save_picture(heatmaps([maps], title, "share of the items, %"), folder / name)
    layers = {layer_label(name): stats for name, stats in use.stats.layers.items()}
    loads = {name: stats.tokens_per_expert.double().cpu().numpy() for name, stats in layers.items()}
    parts += load_charts(loads, {name: stats.drop_rate for name, stats in layers.items()})
    return Section("What the experts are used for", tuple(parts))


def users_table(users: Sequence[User], data: Any) -> Table:
    """Return users with their last items, the next one with its rank, and the best predicted ones, by the names that
    the data have."""
    items = getattr(data, "item_names", None) or getattr(data, "item_values", None)
    names = getattr(data, "user_names", None)

    def named(ids: Sequence[int]) -> str:
        return " · ".join(str(i) if items is None else items[i] for i in ids)

    rows = tuple(
        (
            str(u.user) if names is None else names[u.user],
            named(u.history),
            named((u.target,)),
            f"{u.rank:,}",
            named(u.best),
        )
        for u in users
    )
    columns = ("user", f"last {_LAST_SHOWN} items, newest last", "next item", "its rank", "predicted, best first")
    return Table("Users of the test, with what the model recommends them", columns, rows)
