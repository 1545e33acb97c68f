"""SparseArch: the categorical columns' embeddings, all columns in one lookup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import core
from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
from apps.recsys.tables.rows.batch import Ragged
from apps.train.torch_internals import assert_on_device
from core.fields import Checked, Count, NotNegative, Positive


@core.register_config
@dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """Options of the columns' embeddings.

    The three kinds compute the same numbers and start alike; they differ in how the tables are held and updated:

    - "joined": one weight holds the rows of all tables, and the model's optimizer updates it. The fastest for small
      tables; Adam touches every row in every step, so not for tables of millions of rows.
    - "fused": TorchRec's ``FusedEmbeddingBagCollection``; its own optimizer updates the rows of a batch inside the
      backward. Time and memory follow the batch, not the tables. Its kernels have no Adam on a CPU. The gradient is
      never stored, so it cannot be clipped or accumulated. One process only.
    - "collection": TorchRec's ``EmbeddingBagCollection``, one tensor per table: what ``TorchRecStrategy`` shards over
      processes, whose rows are then updated as with "fused".

    Attributes:
        kind: "joined", "fused" or "collection".
        dim: width of the embeddings.
        dims: widths of single columns, by name, instead of ``dim``. "joined" has one width for all.
        by_cardinality: whether a column that ``dims`` does not name is ``6 * rows^(1/4)`` wide, up to the next multiple
            of 4, and at most ``dim``, which must be above 8, the narrowest of them.
        pooling: reduction of the values of a multi-valued column: "mean" or "sum". No value gives 0.
        init_std: standard deviation of the initial rows. Row 0, of unseen and missing values, starts at 0.
        weight_decay: whether the tables decay as other weights do; rows that are updated in the backward ("fused", and
            sharded ones but "data_parallel") never do.
        fused_optimizer: optimizer of "fused" and of sharded tables: "rowwise_adagrad", "adagrad" or "sgd".
        fused_lr: its peak learning rate; the model's schedule applies to it.
        deferred: whether no process holds a whole table, with "collection": each draws its own rows once
            ``TorchRecStrategy`` has sharded them. For tables beyond the memory of one process. The initial rows depend
            on the sharding.

    Raises:
        ValueError: a value out of its range, or widths that the kind does not have.
    """

    prefix = "embedding."

    kind: Literal["joined", "fused", "collection"] = "joined"
    dim: Count = 8
    dims: Mapping[str, Count] = field(default_factory=dict)
    by_cardinality: bool = False
    pooling: Literal["mean", "sum"] = "mean"
    init_std: NotNegative = 0.01
    weight_decay: bool = False
    fused_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    fused_lr: Positive = 0.02
    deferred: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, dim in (("dim", self.dim), *((f"dims[{k!r}]", v) for k, v in self.dims.items())):
            if self.kind == "fused" and dim % 4:
                raise ValueError(f"embedding.{name}={dim} is not a multiple of 4, as kind='fused' needs it")
        if self.kind == "joined" and (self.by_cardinality or any(d != self.dim for d in self.dims.values())):
            raise ValueError("embedding.kind='joined' has one width for all columns: leave out dims and by_cardinality")
        if self.by_cardinality and self.dim <= 8:
            raise ValueError(f"embedding.by_cardinality=True gives widths from 8 to dim={self.dim}: give a larger dim")
        if self.deferred and self.kind != "collection":
            raise ValueError(f"embedding.deferred=True needs kind='collection', not {self.kind!r}")

    def width(self, feature: CategoricalFeature) -> int:
        """Return the width of a column's embedding."""
        if feature.name in self.dims:
            return self.dims[feature.name]
        if self.by_cardinality:
            return min(self.dim, 4 * math.ceil(6 * feature.num_rows**0.25 / 4))
        return self.dim


def check_rows_are_stepped(trainer: Any, stepper: str, advice: str = "") -> None:
    """Reject a trainer that acts on gradients after the backward, in which ``stepper`` steps the tables' rows.

    Raises:
        ValueError: gradients are accumulated, clipped or scaled; ``advice`` ends the message on the first two.
    """
    for name, value, neutral in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("gradient_clip_val", trainer.gradient_clip_val or None, None),
    ):
        if value != neutral:
            raise ValueError(
                f"{stepper} steps the rows in the backward, where trainer.{name}={value} does not reach: set it to "
                f"{neutral or 'null'}{advice}"
            )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{stepper} steps the rows in the backward, by gradients that trainer.precision={trainer.precision!r} has "
            "scaled up: take 'bf16-mixed'"
        )


@dataclass(frozen=True)
class LookedUp:
    """The rows of all columns of a batch, as ``SparseArch.forward`` takes them."""

    single_FB: Tensor
    multi: Sequence[Ragged]
    bins_CB: Tensor
    sequences: Sequence[Ragged]

    @property
    def B(self) -> int:
        return self.single_FB.shape[1]

    def parts(self) -> Iterator[tuple[int, Tensor | Ragged]]:
        """Yield the columns in their order, single-valued ones at a time, each with the place of the first."""
        first, parts = 0, cast(Sequence[Tensor | Ragged], (self.single_FB, *self.multi, self.bins_CB, *self.sequences))
        for part in parts:
            count = 1 if isinstance(part, Ragged) else len(part)
            if count:
                yield first, part
            first += count

    def flat(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows of all columns, column after column, and how many each example has; None: one each."""
        parts = [rows for _, rows in self.parts()]
        values = [rows.values_N if isinstance(rows, Ragged) else rows.reshape(-1) for rows in parts]
        values_N = torch.cat([own.to(values[0].dtype) for own in values])
        return values_N, torch.cat([own.reshape(-1) for own in self.lengths()]) if self.has_lists else None

    def lengths(self) -> list[Tensor]:
        """Return how many values each example has in each column, int32 (n, B) for n columns of one value at a time."""
        one = torch.ones(1, dtype=torch.int32, device=self.single_FB.device)
        parts = (rows for _, rows in self.parts())
        return [rows.length_B[None].int() if isinstance(rows, Ragged) else one.expand(rows.shape) for rows in parts]

    @property
    def has_lists(self) -> bool:
        return bool(self.multi or self.sequences)


class SparseArch(nn.Module):
    """The embeddings of F columns, side by side. Each kind of ``EmbeddingConfig`` is a subclass, which ``build`` makes.

    Args:
        features: the columns in the order of the batches: single-valued ones, multi-valued ones, then the bins of the
            continuous columns.
        config: widths, kind and start.
        copies: number of separate embeddings of each column, for models that share nothing; a row holds them all.
        sequences: columns of sequences, whose values are averaged; they follow all others. One with ``items`` reads the
            table of that column.

    Attributes:
        features: the columns with a table of their own, in the order of the tables.
        dims: width of each column in one copy.
        out_dim: H, the sum of ``dims``.

    Raises:
        ValueError: ``config.dims`` names a column that is missing, or two columns have one name.
    """

    _rows_F1: Tensor
    _order_H: Tensor

    def __init__(
        self,
        features: Sequence[CategoricalFeature],
        config: EmbeddingConfig,
        copies: int = 1,
        sequences: Sequence[SequenceFeature] = (),
    ) -> None:
        super().__init__()
        names = [*(f.name for f in features), *(s.name for s in sequences)]
        if len(set(names)) != len(names):
            raise ValueError(f"column {next(n for n in names if names.count(n) > 1)!r} is there twice")
        own = (CategoricalFeature(s.name, s.num_rows, True, s.hashed) for s in sequences if s.items is None)
        self.features, self.config, self.copies = (*features, *own), config, copies
        with_table = [f.name for f in self.features]
        unknown = [name for name in config.dims if name not in with_table]
        if unknown:
            raise ValueError(
                f"embedding.dims names {unknown[0]!r}, which is no column; there is {', '.join(with_table)}"
            )
        self._names, self._num_sequences = names, len(sequences)
        self._num_multi = sum(f.multi_valued for f in features)
        # The table of each column, as a place among ``features``.
        self._tables = [*range(len(features)), *(with_table.index(s.items or s.name) for s in sequences)]
        self.dims = tuple(config.width(self.features[table]) for table in self._tables)
        self.out_dim = sum(self.dims)
        rows_T = torch.tensor([f.num_rows for f in self.features], dtype=torch.int64)
        self.register_buffer("_rows_F1", rows_T[self._tables, None], persistent=False)
        self._make_tables(rows_T)
        if copies > 1:
            # Column c of copy k is at (its column's start) * copies + k * width.
            starts = [copies * sum(self.dims[:i]) for i in range(len(self.dims))]
            order = [
                s + k * d + j for k in range(copies) for s, d in zip(starts, self.dims, strict=True) for j in range(d)
            ]
            self.register_buffer("_order_H", torch.tensor(order, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def _make_tables(self, rows_T: Tensor) -> None:
        """Make the tables, with these numbers of rows."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return the rows of each column, (num_rows, copies * width), by name, as they are trained."""
        raise NotImplementedError

    def _look_up(self, columns: LookedUp, plain: bool) -> Tensor:
        """Return the embeddings, (B, copies * H)."""
        raise NotImplementedError

    def tables(self) -> dict[str, Tensor]:
        """Return the rows of each column by name, without gradient; they are views, whatever the kind."""
        return {name: weight.detach() for name, weight in self.weights().items()}

    def reset_parameters(self) -> None:
        """Draw rows from N(0, ``init_std``), table after table, so that all kinds start alike; row 0 starts at 0."""
        with torch.no_grad():
            for weight in self.tables().values():
                weight.normal_(0.0, self.config.init_std)
                weight[0].zero_()

    def draw_rows(self, rows: Tensor, first: int, generator: torch.Generator) -> None:
        """Start the rows ``first`` on of a deferred table, or some columns of them, in place."""
        with torch.no_grad():
            rows.normal_(0.0, self.config.init_std, generator=generator)
            if first == 0 and len(rows):
                rows[0].zero_()

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that do not decay; see ``apps.train.optim.optimizers.parameter_groups``."""
        return set() if self.config.weight_decay else {n for n, _ in self.named_parameters()}

    def set_fused_lr(self, factor: float) -> None:
        """Set the fused optimizer's learning rate as a part of its peak; other kinds have none."""

    def fused_state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the fused optimizer's state by table; empty for other kinds."""
        return {}

    def load_fused_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue with a state of ``fused_state``.

        Raises:
            ValueError: it has other tables, or another kind.
        """
        if state:
            raise ValueError(f"a fused optimizer's state does not fit embedding.kind={self.config.kind!r}")

    def rows_of(self, column: str, row_N: Tensor, plain: bool = False) -> Tensor:
        """Return the embeddings of single rows of a column's table, (N, copies * width).

        Raises:
            ValueError: the table lacks a row, and ``plain`` does not say that none does.
        """
        c = self._names.index(column)
        if not plain:
            self._check_rows(row_N[None], c)
        return self._rows_of(c, row_N)

    def _rows_of(self, c: int, row_N: Tensor) -> Tensor:
        return nn.functional.embedding(row_N, self.weights()[self.features[self._tables[c]].name])

    def places(self, columns: Sequence[str], option: str) -> Tensor:
        """Return the positions of some columns' embeddings in a row of the output, int64.

        Args:
            columns: names of the columns, in the order in which they are wanted.
            option: name of the option that gives them, for the message.

        Raises:
            ValueError: a column has no embedding.
        """
        ends = list(itertools.accumulate(self.dims))
        places: list[int] = []
        for name in columns:
            if name not in self._names:
                raise ValueError(f"{option} names {name!r}, which has no embedding; there is {', '.join(self._names)}")
            i = self._names.index(name)
            places += range(ends[i] - self.dims[i], ends[i])
        return torch.tensor(places, dtype=torch.int64)

    def forward(
        self, single_FB: Tensor, lists: Sequence[Ragged] = (), bins_CB: Tensor | None = None, plain: bool = False
    ) -> Tensor:
        """Look up all columns of a batch at once.

        Args:
            single_FB: (F, B), rows of the columns of one value.
            lists: rows of the multi-valued columns, then of the sequences.
            bins_CB: int64 (C, B), the bins of the continuous columns; None: there are none.
            plain: compute by torch's own operators, which a graph for another runtime needs, and check no row.

        Returns:
            (B, H); (copies, B, H) if there are several copies.

        Raises:
            ValueError: other numbers of columns than the model's, or a column's table lacks a row. Away from the CPU
                such a row is a failed assertion of the device, since an error here would wait for it.
        """
        bins_CB = single_FB[:0] if bins_CB is None else bins_CB
        columns = LookedUp(single_FB, lists[: self._num_multi], bins_CB, lists[self._num_multi :])
        single, several = len(single_FB) + len(bins_CB), self._num_multi + self._num_sequences
        if (single, len(lists)) != (own := len(self._names) - several, several):
            raise ValueError(
                f"the batch has {single} columns of one value and {len(lists)} of several, the model {own} and "
                f"{several}"
            )
        if not plain:
            for first, rows in columns.parts():
                self._check_rows(rows.values_N[None] if isinstance(rows, Ragged) else rows, first)
        y_BH = self._look_up(columns, plain)
        if self._num_sequences and self.config.pooling == "sum":
            y_BH = self._averaged(y_BH, columns.sequences)
        if self.copies == 1:
            return y_BH
        return y_BH.index_select(1, self._order_H).unflatten(1, (self.copies, self.out_dim)).transpose(0, 1)

    def _averaged(self, y_BH: Tensor, sequences: Sequence[Ragged]) -> Tensor:
        """Return the output with the sums of the sequences, its last columns, divided by their numbers of values."""
        dims = [self.copies * dim for dim in self.dims[-self._num_sequences :]]
        sums = y_BH[:, y_BH.shape[1] - sum(dims) :].split(dims, dim=1)
        means = [sum_Bd / own.length_B.clamp_min(1)[:, None] for sum_Bd, own in zip(sums, sequences, strict=True)]
        return torch.cat((y_BH[:, : y_BH.shape[1] - sum(dims)], *means), dim=1)

    def _check_rows(self, rows_FN: Tensor, first: int) -> None:
        """Reject rows that the tables of the columns from ``first`` lack: a joined weight has others' there."""
        num_rows_F1 = self._rows_F1[first : first + len(rows_FN)]
        bad_FN = (rows_FN < 0) | (rows_FN >= num_rows_F1)
        if rows_FN.device.type != "cpu":
            assert_on_device(~bad_FN.any(), "a row is not in its column's embedding table")
        elif bool(bad_FN.any()):
            f, n = bad_FN.nonzero()[0].tolist()
            raise ValueError(
                f"column {self._names[first + f]!r} has the row {int(rows_FN[f, n])}, and its table "
                f"{int(num_rows_F1[f])} rows, 0 to {int(num_rows_F1[f]) - 1}"
            )
