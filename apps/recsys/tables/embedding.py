"""SparseArch: the categorical columns' embeddings, all columns in one lookup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import core
from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
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
    """The embeddings of F columns, side by side.

    Args:
        features: the columns in the order of the batches; the bins of continuous columns follow the categorical ones.
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
    _first_row_F1: Tensor
    _order_H: Tensor
    weight: Any  # a Parameter with "joined"

    def __init__(
        self,
        features: Sequence[CategoricalFeature],
        config: EmbeddingConfig = EmbeddingConfig(),
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
        # The table of each column, as a place among ``features``.
        self._tables = [*range(len(features)), *(with_table.index(s.items or s.name) for s in sequences)]
        self.dims = tuple(config.width(self.features[table]) for table in self._tables)
        self.out_dim = sum(self.dims)
        self._ragged = bool(sequences) or any(f.multi_valued for f in features)
        self.collection: nn.Module | None = None
        rows_T = torch.tensor([f.num_rows for f in self.features], dtype=torch.int64)
        first_row_T = rows_T.cumsum(0) - rows_T
        self.register_buffer("_rows_F1", rows_T[self._tables, None], persistent=False)
        self.register_buffer("_first_row_F1", first_row_T[self._tables, None], persistent=False)
        if not self.features:
            self.register_parameter("weight", None)
        elif config.kind == "joined":
            self.weight = nn.Parameter(torch.empty(sum(f.num_rows for f in self.features), copies * config.dim))
        else:
            self.register_parameter("weight", None)
            with torch.random.fork_rng(devices=[]):  # TorchRec draws a start of its own
                self.collection = self._make_collection()
        if copies > 1:
            # Column c of copy k stands at (its column's start) * copies + k * width.
            starts = [copies * sum(self.dims[:i]) for i in range(len(self.dims))]
            order = [
                s + k * d + j for k in range(copies) for s, d in zip(starts, self.dims, strict=True) for j in range(d)
            ]
            self.register_buffer("_order_H", torch.tensor(order, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def _make_collection(self, device: torch.device | None = None) -> nn.Module:
        config = self.config
        tables = [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=self.copies * config.width(f),
                num_embeddings=f.num_rows,
                feature_names=[self._names[column] for column in self._columns_of(table)],
                pooling=PoolingType.MEAN if config.pooling == "mean" else PoolingType.SUM,
            )
            for table, (f, name) in enumerate(zip(self.features, table_names(self.features), strict=True))
        ]
        if config.kind == "fused":
            return FusedEmbeddingBagCollection(
                tables,
                _FUSED_OPTIMIZERS[config.fused_optimizer],
                {"lr": config.fused_lr},
                device=device or torch.device("cpu"),
            )
        return EmbeddingBagCollection(tables=tables, device=torch.device("meta") if config.deferred else device)

    def _columns_of(self, table: int) -> list[int]:
        """Return the columns that read a table: its own, then sequences of its items."""
        return [column for column, own in enumerate(self._tables) if own == table]

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
        """Return the parameters that do not decay; see ``apps.train.module.parameter_groups``."""
        return set() if self.config.weight_decay else {n for n, _ in self.named_parameters()}

    def tables(self) -> dict[str, Tensor]:
        """Return the rows of each column, (num_rows, copies * width), by name; they are views, whatever the kind."""
        if self.collection is not None:
            bags: Any = self.collection.embedding_bags
            return {
                f.name: bags[k].weight.detach() for f, k in zip(self.features, table_names(self.features), strict=True)
            }
        if self.weight is None:
            return {}
        parts = self.weight.detach().split([f.num_rows for f in self.features])
        return {f.name: part for f, part in zip(self.features, parts, strict=True)}

    def rows_of(self, column: str, row_N: Tensor) -> Tensor:
        """Return the embeddings of single rows of a column's table, (N, copies * width).

        Raises:
            ValueError: the table lacks a row.
        """
        c = self._names.index(column)
        self._check_rows(row_N, self._rows_F1[c].expand_as(row_N), lambda n: c)
        if self.collection is None:
            return self.weight.index_select(0, row_N + self._first_row_F1[c])
        bags: Any = self.collection.embedding_bags
        return nn.functional.embedding(row_N, bags[table_names(self.features)[self._tables[c]]].weight)

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
        self,
        sparse: KeyedJaggedTensor | None,
        bins_CB: Tensor | None = None,
        sequences: KeyedJaggedTensor | None = None,
    ) -> Tensor:
        """Look up all columns of a batch at once.

        Args:
            sparse: rows of the categorical columns, in the order of ``features``.
            bins_CB: int64 (C, B), the bins of the continuous columns that come after them; None: there are none.
            sequences: rows of the columns of sequences; None: there are none.

        Returns:
            (B, H); (copies, B, H) where there are several copies.

        Raises:
            ValueError: the columns are not the model's, or a column's table lacks a row. Away from the CPU such a row
                is a failed assertion of the device, since an error here would wait for it.
        """
        values, lengths = self._values(sparse, bins_CB, sequences)
        F = len(self._names)
        B = values.numel() // F if lengths is None else lengths.numel() // F
        self._check(values, lengths, B)
        if isinstance(self.collection, FusedEmbeddingBagCollection):
            y_BH = self._look_up_fused(values, lengths, F, B)
        elif self.collection is not None:
            if lengths is None:
                lengths = torch.ones(F * B, dtype=torch.int32, device=values.device)
            # TorchRec asks for a jagged tensor of exactly its own columns.
            pooled = self.collection(KeyedJaggedTensor(keys=self._names, values=values, lengths=lengths))
            # Sharded tables answer in the order of the processes that hold them.
            in_order = list(pooled.keys()) == self._names
            y_BH = pooled.values() if in_order else torch.cat([pooled[name] for name in self._names], dim=1)
        elif lengths is None:
            y_BH = self._look_up(values, F, B)
        else:
            y_BH = self._look_up_bags(values, lengths, F, B)
        if self._num_sequences and self.config.pooling == "sum":
            assert lengths is not None
            y_BH = self._averaged(y_BH, lengths.view(F, B)[-self._num_sequences :])
        if self.copies == 1:
            return y_BH
        return y_BH.index_select(1, self._order_H).unflatten(1, (self.copies, self.out_dim)).transpose(0, 1)

    def _averaged(self, y_BH: Tensor, length_SB: Tensor) -> Tensor:
        """Return the output with the sums of the sequences, its last columns, divided by their numbers of values."""
        dims = [self.copies * dim for dim in self.dims[-self._num_sequences :]]
        sums = y_BH[:, y_BH.shape[1] - sum(dims) :].split(dims, dim=1)
        means = [own / length_B1.clamp_min(1) for own, length_B1 in zip(sums, length_SB.unsqueeze(2), strict=True)]
        return torch.cat((y_BH[:, : y_BH.shape[1] - sum(dims)], *means), dim=1)

    def _look_up_fused(self, values: Tensor, lengths: Tensor | None, F: int, B: int) -> Tensor:
        # The collection's own forward takes the columns apart and joins them again, which takes as long as its kernel.
        # One pooling and one dtype for all columns: there is one kernel, with the tables in our order.
        collection: Any = self.collection
        (kernel,) = collection._emb_modules
        order = [column for table in range(len(self.features)) for column in self._columns_of(table)]
        if order != list(range(F)):  # the kernel has a sequence beside the column of its items
            assert lengths is not None
            given = KeyedJaggedTensor(keys=self._names, values=values, lengths=lengths).permute(order)
            y_BH = self._run_kernel(kernel, given.values(), given.lengths(), F * B)
            parts = y_BH.split([self.copies * self.dims[column] for column in order], dim=1)
            return torch.cat([parts[order.index(column)] for column in range(F)], dim=1)
        return self._run_kernel(kernel, values, lengths, F * B)

    @staticmethod
    def _run_kernel(kernel: Any, values: Tensor, lengths: Tensor | None, num_bags: int) -> Tensor:
        if lengths is None:
            offsets = torch.arange(num_bags + 1, dtype=torch.int32, device=values.device)
        else:
            offsets = torch.cat((lengths.new_zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)))
        if not torch.is_inference_mode_enabled():
            return kernel(values.int(), offsets, None)
        # On a CPU the kernel exists as an autograd function alone, which inference mode leaves out.
        with torch.inference_mode(False), torch.no_grad():
            return kernel(values.int(), offsets, None)

    def _look_up(self, values: Tensor, F: int, B: int) -> Tensor:
        row_N = (values.view(F, B) + self._first_row_F1).t().reshape(-1)
        dim = self.weight.shape[1]
        if self.weight.device.type == "cpu" and dim < 16:
            # Number by number: adding 32,768 gradients of 4 numbers to 528 rows takes 0.2 ms so, and 1.6 ms row by row
            # (8 numbers: 0.3 and 0.9; 16: 0.6 and 0.3; F.embedding: 1.2). An Intel Xeon, 2 threads.
            number_Nd = row_N[:, None] * dim + torch.arange(dim)
            return self.weight.reshape(-1).gather(0, number_Nd.view(-1)).view(B, -1)
        return self.weight.index_select(0, row_N).view(B, -1)

    def _look_up_bags(self, values: Tensor, lengths: Tensor, F: int, B: int) -> Tensor:
        # A gather and an index_add, forward and backward: on a CPU 3 times as fast as embedding_bag at these sizes.
        length_FB = lengths.view(F, B)
        row_N = values + self._first_row_F1[:, 0].repeat_interleave(length_FB.sum(1), output_size=values.numel())
        bag_FB = torch.arange(B * F, device=values.device).view(B, F).t()
        bag_N = bag_FB.reshape(-1).repeat_interleave(lengths, output_size=values.numel())
        y = self.weight.new_zeros(B * F, self.weight.shape[1])
        y = y.index_add(0, bag_N, self.weight.index_select(0, row_N))
        if self.config.pooling == "mean":
            y = y / length_FB.t().reshape(-1, 1).clamp_min(1)
        return y.view(B, -1)

    def _values(
        self, sparse: KeyedJaggedTensor | None, bins_CB: Tensor | None, sequences: KeyedJaggedTensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the rows of all columns, column after column, and how many each example has; None: one each."""
        C, S = 0 if bins_CB is None else len(bins_CB), self._num_sequences
        names = self._names[: len(self._names) - C - S]
        check_keys(sparse, names, "columns")
        check_keys(sequences, self._names[len(self._names) - S :], "sequences")
        parts = [] if sparse is None else [self._values_of(sparse, names)]
        if bins_CB is not None:
            parts.append((bins_CB.reshape(-1), bins_CB.new_ones(bins_CB.numel()) if self._ragged else None))
        if sequences is not None:
            parts.append((sequences.values(), sequences.lengths()))
        if len(parts) == 1:
            return parts[0]
        values = torch.cat([own.to(parts[0][0].dtype) for own, _ in parts])
        lengths = [own for _, own in parts if own is not None]
        return values, torch.cat([own.to(lengths[0].dtype) for own in lengths]) if lengths else None

    def _values_of(self, sparse: KeyedJaggedTensor, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        values, lengths = sparse.values(), sparse.lengths() if self._ragged else None
        if lengths is None and values.numel() != len(names) * sparse.stride():
            raise ValueError(
                f"{values.numel()} values for {len(names)} columns and {sparse.stride()} examples: "
                "a column that is not multi_valued has exactly one value an example"
            )
        return values, lengths

    def _check(self, values: Tensor, lengths: Tensor | None, B: int) -> None:
        """Refuse rows that a column's table does not have: in the joined weight they are another column's."""
        if not values.numel():
            return
        if lengths is None:
            self._check_rows(values, self._rows_F1.expand(-1, B).reshape(-1), lambda n: n // B)
        else:
            count_F = lengths.view(-1, B).sum(1)
            rows_N = self._rows_F1[:, 0].repeat_interleave(count_F, output_size=values.numel())
            self._check_rows(values, rows_N, lambda n: int((count_F.cumsum(0) <= n).sum()))

    def _check_rows(self, values: Tensor, rows_N: Tensor, column_of: Callable[[int], int]) -> None:
        """Refuse values (N,) that are no rows of tables with so many rows; ``column_of`` is a value's column."""
        bad_N = (values < 0) | (values >= rows_N)
        if values.device.type != "cpu":
            assert_on_device(~bad_N.any(), "a row is not in its column's embedding table")
        elif bool(bad_N.any()):
            n = int(bad_N.nonzero()[0])
            column, rows = self._names[column_of(n)], int(rows_N[n])
            raise ValueError(
                f"column {column!r} has the row {int(values[n])}, and its table {rows} rows, 0 to {rows - 1}"
            )

    # ---- the optimizer of "fused"

    def set_fused_lr(self, factor: float) -> None:
        """Set the fused optimizer's learning rate as a part of its peak; other kinds have none."""
        if isinstance(self.collection, FusedEmbeddingBagCollection):
            set_lr(self.collection.fused_optimizer(), self.config.fused_lr * factor)

    def fused_state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the fused optimizer's state by table; empty for other kinds."""
        if not isinstance(self.collection, FusedEmbeddingBagCollection):
            return {}
        state = self.collection.fused_optimizer().state_dict()["state"]
        return {table: {k: v.detach().clone() for k, v in values.items()} for table, values in state.items()}

    def load_fused_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue with a state of ``fused_state``.

        Raises:
            ValueError: it is of other tables.
        """
        if not isinstance(self.collection, FusedEmbeddingBagCollection):
            if state:
                raise ValueError(f"a fused optimizer's state does not fit embedding.kind={self.config.kind!r}")
            return
        own = self.collection.fused_optimizer().state_dict()["state"]
        if {t: set(v) for t, v in own.items()} != {t: set(v) for t, v in state.items()}:
            raise ValueError("the fused optimizer's state is of other tables, or of another fused_optimizer")
        for table, values in state.items():
            for name, value in values.items():
                own[table][name].copy_(value)

    # The fused collection's parameters are views of its kernel's one weight; a move, copy or pickle would part them.

    def _apply(self, fn: Any, recurse: bool = True) -> SparseArch:
        held: Any = self.collection
        fused = isinstance(held, FusedEmbeddingBagCollection)
        # Deferred tables have nothing to move yet.
        if held is None or not (fused or any(p.is_meta for p in held.parameters())):
            return super()._apply(fn, recurse)
        self.collection = None
        super()._apply(fn, recurse)
        self.collection = held
        if fused:
            device = fn(torch.empty(0, device=held.device)).device
            if device != held.device:
                self._restore(self.tables(), held.fused_optimizer().state_dict()["state"], device)
        return self

    def _restore(
        self,
        tables: Mapping[str, Tensor],
        state: Mapping[str, Mapping[str, Tensor]],
        device: torch.device | None = None,
    ) -> None:
        """Make the fused collection anew, with these rows and this state of its optimizer."""
        self.collection = self._make_collection(device)
        for name, weight in self.tables().items():
            weight.copy_(tables[name])
        self.load_fused_state(state)

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self.collection, FusedEmbeddingBagCollection):
            return self.__dict__
        saved = {name: weight.clone() for name, weight in self.tables().items()}
        modules = {k: v for k, v in self._modules.items() if k != "collection"}
        return {**self.__dict__, "_modules": modules, "_fused": (saved, self.fused_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fused = state.pop("_fused", None)
        super().__setstate__(state)
        if fused is not None:
            self._restore(*fused)


def check_keys(given: KeyedJaggedTensor | None, names: Sequence[str], what: str) -> None:
    """Refuse jagged columns of other names.

    Raises:
        ValueError: a column is missing, too many, or elsewhere in the order.
    """
    keys = [] if given is None else given.keys()
    if keys != list(names):
        differing = [n for n in names if n not in keys] or [n for n in keys if n not in names] or keys
        raise ValueError(f"the batch has the {what} {keys}, the model {list(names)}: {differing[0]!r} is not as it was")


def table_names(features: Sequence[CategoricalFeature]) -> list[str]:
    """Return the name of each column's table in TorchRec, which is a module's: without dots, and unique."""
    names: list[str] = []
    for f in features:
        name = "table_" + f.name.replace(".", "_")  # a bare "type" or "values" would be an attribute of the container
        while name in names:
            name += "_"
        names.append(name)
    return names
