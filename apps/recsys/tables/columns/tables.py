"""The embedding tables of one process: plain, as a collection of TorchRec, and fused with their optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from apps.recsys.encoding.features import CategoricalFeature, SequenceFeature
from apps.recsys.tables.columns.embedding import EmbeddingConfig, LookedUp, SparseArch
from apps.recsys.tables.rows.batch import Ragged

_FUSED_OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of an optimizer that is fused into the backward."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()  # hands the rate to the kernels, and no more: the rows are updated in the backward


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

    def _look_up(self, columns: LookedUp, plain: bool) -> Tensor:
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

    def _look_up_bags(self, columns: LookedUp) -> Tensor:
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

    def _look_up(self, columns: LookedUp, plain: bool) -> Tensor:
        if plain:
            return self._look_up_by_torch(columns)
        values_N, lengths = columns.flat()
        # Sharded tables answer in the order of the processes that hold them.
        pooled = self.collection(self._jagged(values_N, torch.ones_like(values_N) if lengths is None else lengths))
        in_order = list(pooled.keys()) == self._names
        return pooled.values() if in_order else torch.cat([pooled[name] for name in self._names], dim=1)

    def _jagged(self, values_N: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=self._names, values=values_N, lengths=lengths)

    def _look_up_by_torch(self, columns: LookedUp) -> Tensor:
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
    """The kind "fused": TorchRec's collection whose rows are updated in the backward."""

    def _make_collection(self, device: torch.device | None = None) -> nn.Module:
        optimizer, options = _FUSED_OPTIMIZERS[self.config.fused_optimizer], {"lr": self.config.fused_lr}
        device = device or torch.device("cpu")
        return FusedEmbeddingBagCollection(self._table_configs(), optimizer, options, device=device)

    def _look_up(self, columns: LookedUp, plain: bool) -> Tensor:
        if plain:
            return self._look_up_by_torch(columns)
        # The collection's own forward takes the columns apart and joins them again, which takes as long as its kernel.
        values_N, lengths = columns.flat()
        order = [column for table in range(len(self.features)) for column in self._columns_of(table)]
        if lengths is None or order == list(range(len(order))):
            return self._run_kernel(values_N, lengths)
        given = self._jagged(values_N, lengths).permute(order)  # a sequence next to the column of its items
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
        # On a CPU the kernel exists only as an autograd function, which inference mode leaves out.
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
        """Make the collection again, with these rows and this state of its optimizer."""
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


def table_names(features: Sequence[CategoricalFeature]) -> list[str]:
    """Return the name of each column's table in TorchRec, which is a module's: without dots, and unique."""
    names: list[str] = []
    for f in features:
        name = "table_" + f.name.replace(".", "_")  # a bare "type" or "values" would be an attribute of the container
        while name in names:
            name += "_"
        names.append(name)
    return names


_KINDS: dict[str, type[SparseArch]] = {"joined": JoinedTables, "fused": FusedTables, "collection": CollectionTables}


def sparse_arch(
    config: EmbeddingConfig,
    features: Sequence[CategoricalFeature],
    copies: int = 1,
    sequences: Sequence[SequenceFeature] = (),
) -> SparseArch:
    """Return the embeddings of some columns; see ``SparseArch``."""
    kind = config.kind if features or sequences else "joined"  # TorchRec makes no collection without tables
    return _KINDS[kind](features, config, copies, sequences)
