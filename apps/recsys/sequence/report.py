"""The test report of a next-item model: ranks by popularity and by length, the experts' items, and a few users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

import core
from apps.data.loader import batches_of_test
from apps.recsys.metrics import CUTOFF, target_ranks
from apps.recsys.ranks import POPULARITY, QUARTERS, popularity_groups, rank_parts
from apps.recsys.sequence.model import best_items
from apps.report.base import Report, ReportConfig, first_batches, is_left_out, spread_places
from apps.report.page import Part, Section, Table
from apps.report.use import ExpertUse, Labels, check_bounds, load_parts, map_parts, range_names, ranges_of, tokens_of
from core.fields import CountOrZero

BACK = (1, 5, 20, 50)
"""Bounds of the places of items in a history, counted from its end: 1 is the last item."""
PLACE = "place in the history"
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
        group_V: int64 (num_items + 1,), the place of each item in ``POPULARITY``; None: unknown.
        use: the experts' items; None: there are none.

    Attributes:
        users: the users, in their order.
        length_N: int64 (N,), items of each user's history.
    """

    group_V: np.ndarray | None
    use: ExpertUse | None = None
    users: list[User] = field(default_factory=list)
    length_N: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, module: Any, counts_V: np.ndarray | None) -> NextItemUse:
        """Return the empty use of a model, given how often each item trains."""
        back_V = np.append(0, ranges_of(np.arange(1, module.max_length + 1), BACK))
        labels = {PLACE: Labels("place from the end", len(BACK) + 1, back_V)}
        group_V = None if counts_V is None else popularity_groups(counts_V)
        if group_V is not None:
            labels = {"popularity": Labels("item", len(POPULARITY), group_V), **labels}
        return cls(group_V, ExpertUse(tokens_of(module), labels))

    @torch.no_grad()
    def add(self, module: Any, batch: Any) -> None:
        """Add a batch, given the module in evaluation and the batch on its device."""
        with core.record(module.model) as tape:
            out = module.task_loss(batch)
        kept_B = (batch.targets_BS > 0).any(1)
        rank_B = target_ranks(out.outputs, out.targets).tolist()
        best_B, _ = best_items(out.outputs, _BEST_SHOWN)
        rows = zip(batch.user_B[kept_B].tolist(), batch.items_BS[kept_B].tolist(), strict=True)
        for (user, items), target, rank, best in zip(rows, out.targets.tolist(), rank_B, best_B, strict=True):
            history = [item for item in items if item]
            self.length_N.append(len(history))
            self.users.append(User(user, tuple(history[-_LAST_SHOWN:]), target, rank, tuple(best)))
        assert self.use is not None
        self.use.add(tape, batch)


class NextItemReport(Report):
    """After a test in one process: the ranks by the popularity of the next item and by the length of the history, the
    items that each expert computes, and a few users with their recommendations.

    It writes ``lengths.csv``, ``popularity.csv``; and of a sparse model ``expert_popularity.png`` and
    ``expert_place.png``.

    Args:
        config: what to do.
    """

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if is_left_out(trainer):
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        use = NextItemUse.of(pl_module, getattr(data, "training_counts", None))
        batches = batches_of_test(trainer)
        for batch in first_batches(batches, self.config.routing_examples, lambda batch: len(batch.items_BS)):
            with trainer.precision_plugin.forward_context():
                use.add(pl_module, trainer.strategy.batch_to_device(batch, pl_module.device))
        return (use, data) if use.users else None

    def write(self, collected: Any, folder: Path) -> list[Section]:
        use, data = collected
        sections = [write_ranks(use, self.config.lengths, folder)]
        if use.use.stats.layers:
            sections.append(write_experts(use.use, folder, draw=self.config.pictures))
        shown = [use.users[place] for place in spread_places(len(use.users), self.config.samples)]
        return [*sections, Section("Users", (users_table(shown, data),))] if shown else sections


def write_ranks(use: NextItemUse, lengths: Sequence[int], folder: Path) -> Section:
    """Write ``popularity.csv`` and ``lengths.csv``, and return its page section."""
    rank_N, parts = [user.rank for user in use.users], list[Part]()
    same: dict[str, Any] = {"unit": "users", "recall_at": (CUTOFF,), "ndcg_at": (CUTOFF,)}
    if use.group_V is not None:
        group_N, path = use.group_V[[user.target for user in use.users]], folder / "popularity.csv"
        named: dict[str, Any] = {"what": "popularity", "about": "popularity of the next item", "note": QUARTERS}
        parts += rank_parts(rank_N, group_N, POPULARITY, path, **named, **same)
    group_N, path = ranges_of(np.array(use.length_N), lengths), folder / "lengths.csv"
    named = {"what": "items", "about": "items of the history"}
    parts += rank_parts(rank_N, group_N, range_names(lengths), path, **named, **same)
    return Section("Ranks of the next items", tuple(parts))


def write_experts(use: ExpertUse, folder: Path, draw: bool = True) -> Section:
    """Write, with ``draw``, ``expert_popularity.png`` and ``expert_place.png``, and return its page section."""
    _, *others = range_names(BACK)
    names = {"popularity": POPULARITY, PLACE: ("last item", *(f"{name} from the end" for name in others))}
    parts: list[Part] = []
    for label, counts in use.counts.items():
        path = folder / f"expert_{label.split()[0]}.png" if draw else None
        parts += map_parts([(counts, names[label])], f"items by {label}", label, path) if counts else []
    return Section("What the experts are used for", (*parts, *load_parts(use.stats)))


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
