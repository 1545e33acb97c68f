"""SparseArch: the categorical columns' embeddings, all columns in one lookup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import core
from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
from apps.recsys.tables.rows.batch import Ragged
from apps.train.torch_internals import assert_on_device
from core.fields import Checked, Count, NotNegative, Positive

_FUSED_OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}


@core.register_config
@dataclass(frozen=True)
class EmbeddingConfig(Checked):
    """Options of the columns' embeddings.

    The three kinds compute the same numbers and start alike; they differ in how the tables are held and stepped:

    - "joined": one weight holds the rows of all tables, and the model's optimizer steps it. The fastest where tables
      are small; Adam touches every row in every step, so not for tables of millions of rows.
    - "fused": TorchRec's ``FusedEmbeddingBagCollection``; an optimizer of its own steps the rows of a batch inside the
      backward. Time and memory follow the batch, not the tables. Its kernels know no Adam on a CPU. The gradient exists
      nowhere: clipping and accumulation cannot reach it. One process only.
    - "collection": TorchRec's ``EmbeddingBagCollection``, one tensor a table: what ``TorchRecStrategy`` shards over
      processes, whose rows are then stepped as those of "fused".

    Attributes:
        kind: "joined", "fused" or "collection".
        dim: width of the embeddings.
        dims: widths of single columns, by name, in place of ``dim``. "joined" has one width for all.
        by_cardinality: whether a column that ``dims`` does not name is ``6 * rows^(1/4)`` wide, up to the next multiple
            of 4, and at most ``dim``, which must be above 8, the narrowest of them.
        pooling: how the values of a multi-valued column are put together: "mean" or "sum". No value gives 0.
        init_std: standard deviation of the initial rows. Row 0, of unseen and missing values, starts at 0.
        weight_decay: whether the tables decay as other weights do; rows that are stepped in the backward ("fused", and
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

    def build(
        self, features: Sequence[CategoricalFeature], copies: int = 1, sequences: Sequence[SequenceFeature] = ()
    ) -> SparseArch:
        """Return the embeddings of some columns; see ``SparseArch``."""
        kind = self.kind if features or sequences else "joined"  # TorchRec makes no collection without tables
        return _KINDS[kind](features, self, copies, sequences)


def check_rows_are_stepped(trainer: Any, stepper: str, advice: str = "") -> None:
    """Refuse a trainer that acts on gradients after the backward, in which ``stepper`` steps the tables' rows.

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


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of an optimizer that is fused into the backward."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()  # hands the rate to the kernels, and no more: the rows are stepped in the backward


class SparseArch(nn.Module):
    """The embeddings of F columns, side by side. Each kind of ``EmbeddingConfig`` is a subclass, which ``build`` makes.

    Args:
        features: the columns in the order of the batches: those of one value, the multi-valued ones, then the bins of
            the continuous columns.
        config: widths, kind and start.
        copies: number of separate embeddings of each column, for models that share nothing; a row holds them all.
        sequences: columns of sequences, whose values are averaged; they follow all others. One with ``items`` reads the
            table of that column.

    Attributes:
        features: the columns with a table of their own, in the order of the tables.
        dims: width of each column in one copy.
        out_dim: H, the sum of ``dims``.

    Raises:
        ValueError: ``config.dims`` names a column that is not there, or two columns have one name.
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
            # Column c of copy k stands at (its column's start) * copies + k * width.
            starts = [copies * sum(self.dims[:i]) for i in range(len(self.dims))]
            order = [
                s + k * d + j for k in range(copies) for s, d in zip(starts, self.dims, strict=True) for j in range(d)
            ]
            self.register_buffer("_order_H", torch.tensor(order, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def _make_tables(self, rows_T: Tensor) -> None:
        """Make the tables, which have so many rows each."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return the rows of each column, (num_rows, copies * width), by name, as they are trained."""
        raise NotImplementedError

    def _look_up(self, columns: _Columns, plain: bool) -> Tensor:
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
        """Return the parameters that do not decay; see ``apps.train.step.module.parameter_groups``."""
        return set() if self.config.weight_decay else {n for n, _ in self.named_parameters()}

    def set_fused_lr(self, factor: float) -> None:
        """Set the fused optimizer's learning rate as a part of its peak; other kinds have none."""

    def fused_state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the fused optimizer's state by table; empty for other kinds."""
        return {}

    def load_fused_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue with a state of ``fused_state``.

        Raises:
            ValueError: it is of other tables, or of another kind.
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
        """Return where the embeddings of some columns stand in a row of the output, int64.

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
            (B, H); (copies, B, H) where there are several copies.

        Raises:
            ValueError: other numbers of columns than the model's, or a column's table lacks a row. Away from the CPU
                such a row is a failed assertion of the device, since an error here would wait for it.
        """
        bins_CB = single_FB[:0] if bins_CB is None else bins_CB
        columns = _Columns(single_FB, lists[: self._num_multi], bins_CB, lists[self._num_multi :])
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
        """Refuse rows that the tables of the columns from ``first`` lack: a joined weight has others' there."""
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


@dataclass(frozen=True)
class _Columns:
    """The rows of all columns of a batch, as ``SparseArch.forward`` takes them."""

    single_FB: Tensor
    multi: Sequence[Ragged]
    bins_CB: Tensor
    sequences: Sequence[Ragged]

    @property
    def B(self) -> int:
        return self.single_FB.shape[1]

    def parts(self) -> Iterator[tuple[int, Tensor | Ragged]]:
        """Yield the columns in their order, those of one value at a time, each with the place of the first."""
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


class JoinedTables(SparseArch):
    """The kind "joined": one weight holds the rows of all tables."""

    _first_row_F1: Tensor
    weight: Any  # a Parameter where there is a column

    def _make_tables(self, rows_T: Tensor) -> None:
        self.register_buffer("_first_row_F1", (rows_T.cumsum(0) - rows_T)[self._tables, None], persistent=False)
        empty = torch.empty(sum(f.num_rows for f in self.features), self.copies * self.config.dim)
        self.register_parameter("weight", nn.Parameter(empty) if self.features else None)

    def weights(self) -> dict[str, Tensor]:
        parts = self.weight.split([f.num_rows for f in self.features]) if self.features else ()
        return {f.name: part for f, part in zip(self.features, parts, strict=True)}

    def _rows_of(self, c: int, row_N: Tensor) -> Tensor:
        return self.weight.index_select(0, row_N + self._first_row_F1[c])

    def _look_up(self, columns: _Columns, plain: bool) -> Tensor:
        if columns.has_lists:
            return self._look_up_bags(columns)
        row_FB = torch.cat([rows + self._first_row_F1[f : f + len(rows)] for f, rows in columns.parts()])  # type: ignore[operator, arg-type]
        row_N, dim = row_FB.t().reshape(-1), self.weight.shape[1]
        if self.weight.device.type == "cpu" and dim < 16 and not plain:
            # Number by number: adding 32,768 gradients of 4 numbers to 528 rows takes 0.2 ms so, and 1.6 ms row by row
            # (8 numbers: 0.3 and 0.9; 16: 0.6 and 0.3; F.embedding: 1.2). An Intel Xeon, 2 threads.
            number_Nd = row_N[:, None] * dim + torch.arange(dim)
            return self.weight.reshape(-1).gather(0, number_Nd.view(-1)).view(columns.B, -1)
        return self.weight.index_select(0, row_N).view(columns.B, -1)

    def _look_up_bags(self, columns: _Columns) -> Tensor:
        # A gather and an index_add, forward and backward: on a CPU 3 times as fast as embedding_bag at these sizes.
        B, F, row, bag = columns.B, len(self._names), [], []
        first_bag_B = F * torch.arange(B, device=columns.single_FB.device)
        place_F1 = torch.arange(F, device=columns.single_FB.device)[:, None]
        for f, rows in columns.parts():
            if isinstance(rows, Ragged):
                row.append(rows.values_N + self._first_row_F1[f])
                bag.append(F * rows.row_N + f)
            else:
                row.append((rows + self._first_row_F1[f : f + len(rows)]).reshape(-1))
                bag.append((first_bag_B + place_F1[f : f + len(rows)]).reshape(-1))
        x_Nd = self.weight.index_select(0, torch.cat(row))
        y = x_Nd.new_zeros((B + 1) * F, x_Nd.shape[1]).index_add(0, torch.cat(bag), x_Nd)[: B * F]
        if self.config.pooling == "mean":
            y = y / torch.cat(columns.lengths()).t().reshape(-1, 1).clamp_min(1)
        return y.view(B, -1)


class CollectionTables(SparseArch):
    """The kind "collection": TorchRec's collection of a tensor a table, which ``TorchRecStrategy`` may shard."""

    collection: Any

    def _make_tables(self, rows_T: Tensor) -> None:
        with torch.random.fork_rng(devices=[]):  # TorchRec draws a start of its own
            self.collection = self._make_collection()

    def _make_collection(self, device: torch.device | None = None) -> nn.Module:
        device = torch.device("meta") if self.config.deferred else device
        return EmbeddingBagCollection(tables=self._table_configs(), device=device)

    def _table_configs(self) -> list[EmbeddingBagConfig]:
        return [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=self.copies * self.config.width(f),
                num_embeddings=f.num_rows,
                feature_names=[self._names[column] for column in self._columns_of(table)],
                pooling=PoolingType.MEAN if self.config.pooling == "mean" else PoolingType.SUM,
            )
            for table, (f, name) in enumerate(zip(self.features, table_names(self.features), strict=True))
        ]

    def _columns_of(self, table: int) -> list[int]:
        """Return the columns that read a table: its own, then sequences of its items."""
        return [column for column, own in enumerate(self._tables) if own == table]

    def weights(self) -> dict[str, Tensor]:
        bags, names = self.collection.embedding_bags, table_names(self.features)
        return {f.name: bags[name].weight for f, name in zip(self.features, names, strict=True)}

    def _look_up(self, columns: _Columns, plain: bool) -> Tensor:
        if plain:
            return self._look_up_by_torch(columns)
        values_N, lengths = columns.flat()
        # Sharded tables answer in the order of the processes that hold them.
        pooled = self.collection(self._jagged(values_N, torch.ones_like(values_N) if lengths is None else lengths))
        in_order = list(pooled.keys()) == self._names
        return pooled.values() if in_order else torch.cat([pooled[name] for name in self._names], dim=1)

    def _jagged(self, values_N: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=self._names, values=values_N, lengths=lengths)

    def _look_up_by_torch(self, columns: _Columns) -> Tensor:
        parts: list[Tensor] = []
        for f, rows in columns.parts():
            if not isinstance(rows, Ragged):
                parts += [self._rows_of(f + i, own_B) for i, own_B in enumerate(rows)]
                continue
            x_Nd = self._rows_of(f, rows.values_N)
            y_Bd = x_Nd.new_zeros(columns.B + 1, x_Nd.shape[1]).index_add(0, rows.row_N, x_Nd)[: columns.B]
            parts.append(y_Bd / rows.length_B[:, None].clamp_min(1) if self.config.pooling == "mean" else y_Bd)
        return torch.cat(parts, dim=1)

    def _apply(self, fn: Any, recurse: bool = True) -> CollectionTables:
        if not any(p.is_meta for p in self.collection.parameters()):
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        return self._apply_to_others(fn, recurse)  # deferred tables have nothing to move yet

    def _apply_to_others(self, fn: Any, recurse: bool) -> CollectionTables:
        held, self.collection = self.collection, None
        super()._apply(fn, recurse)
        self.collection = held
        return self


class FusedTables(CollectionTables):
    """The kind "fused": TorchRec's collection whose rows are stepped in the backward."""

    def _make_collection(self, device: torch.device | None = None) -> nn.Module:
        optimizer, options = _FUSED_OPTIMIZERS[self.config.fused_optimizer], {"lr": self.config.fused_lr}
        device = device or torch.device("cpu")
        return FusedEmbeddingBagCollection(self._table_configs(), optimizer, options, device=device)

    def _look_up(self, columns: _Columns, plain: bool) -> Tensor:
        if plain:
            return self._look_up_by_torch(columns)
        # The collection's own forward takes the columns apart and joins them again, which takes as long as its kernel.
        values_N, lengths = columns.flat()
        order = [column for table in range(len(self.features)) for column in self._columns_of(table)]
        if lengths is None or order == list(range(len(order))):
            return self._run_kernel(values_N, lengths)
        given = self._jagged(values_N, lengths).permute(order)  # a sequence beside the column of its items
        parts = self._run_kernel(given.values(), given.lengths()).split([self.copies * self.dims[c] for c in order], 1)
        return torch.cat([parts[order.index(column)] for column in range(len(order))], dim=1)

    def _run_kernel(self, values: Tensor, lengths: Tensor | None) -> Tensor:
        # One pooling and one dtype for all columns: there is one kernel, with the tables in our order.
        (kernel,) = self.collection._emb_modules
        if lengths is None:
            offsets = torch.arange(len(values) + 1, dtype=torch.int32, device=values.device)
        else:
            offsets = torch.cat((lengths.new_zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)))
        if not torch.is_inference_mode_enabled():
            return kernel(values.int(), offsets, None)
        # On a CPU the kernel exists as an autograd function alone, which inference mode leaves out.
        with torch.inference_mode(False), torch.no_grad():
            return kernel(values.int(), offsets, None)

    # ---- the optimizer

    def set_fused_lr(self, factor: float) -> None:
        set_lr(self.collection.fused_optimizer(), self.config.fused_lr * factor)

    def fused_state(self) -> dict[str, dict[str, Tensor]]:
        state = self.collection.fused_optimizer().state_dict()["state"]
        return {table: {k: v.detach().clone() for k, v in values.items()} for table, values in state.items()}

    def load_fused_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        own = self.collection.fused_optimizer().state_dict()["state"]
        if {t: set(v) for t, v in own.items()} != {t: set(v) for t, v in state.items()}:
            raise ValueError("the fused optimizer's state is of other tables, or of another fused_optimizer")
        for table, values in state.items():
            for name, value in values.items():
                own[table][name].copy_(value)

    # The collection's parameters are views of its kernel's one weight; a move, copy or pickle would part them.

    def _apply(self, fn: Any, recurse: bool = True) -> FusedTables:
        self._apply_to_others(fn, recurse)
        device = fn(torch.empty(0, device=self.collection.device)).device
        if device != self.collection.device:
            self._restore(self.tables(), self.fused_state(), device)
        return self

    def _restore(
        self,
        tables: Mapping[str, Tensor],
        state: Mapping[str, Mapping[str, Tensor]],
        device: torch.device | None = None,
    ) -> None:
        """Make the collection anew, with these rows and this state of its optimizer."""
        self.collection = self._make_collection(device)
        for name, weight in self.tables().items():
            weight.copy_(tables[name])
        self.load_fused_state(state)

    def __getstate__(self) -> dict[str, Any]:
        saved = {name: weight.clone() for name, weight in self.tables().items()}
        modules = {k: v for k, v in self._modules.items() if k != "collection"}
        return {**self.__dict__, "_modules": modules, "_fused": (saved, self.fused_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fused = state.pop("_fused")
        super().__setstate__(state)
        self._restore(*fused)


_KINDS: dict[str, type[SparseArch]] = {"joined": JoinedTables, "fused": FusedTables, "collection": CollectionTables}


def table_names(features: Sequence[CategoricalFeature]) -> list[str]:
    """Return the name of each column's table in TorchRec, which is a module's: without dots, and unique."""
    names: list[str] = []
    for f in features:
        name = "table_" + f.name.replace(".", "_")  # a bare "type" or "values" would be an attribute of the container
        while name in names:
            name += "_"
        names.append(name)
    return names
