"""The table recommender's network, in TorchRec's terms: SparseArch and DenseArch, InteractionArch, OverArch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionArch as DotProducts
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

import core
from apps.recsys.encoding.features import Features
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.dense import DenseArch, DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.history import HistoryArch, HistoryConfig
from apps.recsys.tables.columns.personal import EmbeddingGate, TowerGates, TwoLayers
from apps.recsys.tables.columns.tables import sparse_arch
from apps.recsys.tables.columns.vectors import VectorArch
from apps.recsys.tables.rows.batch import Ragged, TableBatch
from apps.recsys.tables.tasks import HeadConfig
from core.fields import Checked, Count, Depth
from core.kernels import cpu


@core.register_config
@dataclass(frozen=True)
class InteractionConfig(Checked):
    """The interaction, which joins the columns before the shared layer.

    - "concat": side by side.
    - "dot": the dot products of all pairs of embeddings, next to the numbers (DLRM, arXiv 1906.00091). The embeddings
      need one width d; the numbers become one more vector of width d by a linear map and ReLU.
    - "cross": side by side, then ``x_{l+1} = x_0 * (W x_l + b) + x_l`` (DCN-v2, arXiv 2008.13535).

    Attributes:
        kind: "concat", "dot" or "cross".
        num_layers: number of layers of "cross".
        low_rank: rank of W = U V of "cross"; None: a full W.

    Raises:
        ValueError: a value out of its range, or one that the kind does not use.
    """

    prefix = "interaction."

    kind: Literal["concat", "dot", "cross"] = "concat"
    num_layers: Depth = 2
    low_rank: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_rank is not None and self.kind != "cross":
            raise ValueError(f"interaction.low_rank={self.low_rank} needs kind='cross'")


class InteractionArch(nn.Module):
    """Joins the numbers and embeddings of an example to one vector.

    Args:
        config: how they are joined.
        dense_dim: width of the numbers; 0: there are none.
        sparse_dims: widths of the embeddings.

    Attributes:
        out_dim: width D of the output.

    Raises:
        ValueError: embeddings of several widths, or none, with "dot".
    """

    def __init__(self, config: InteractionConfig, dense_dim: int, sparse_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.sparse_dims = config, sparse_dims
        self.out_dim = dense_dim + sum(sparse_dims)
        self.project: nn.Linear | None = None
        self.interact: nn.Module | None = None
        if config.kind == "dot":
            if not sparse_dims or len(set(sparse_dims)) > 1:
                widths = ", ".join(map(str, sorted(set(sparse_dims)))) or "none"
                raise ValueError(f"interaction.kind='dot' needs embeddings of one width; there is {widths}")
            d, columns = sparse_dims[0], len(sparse_dims)
            if dense_dim:
                self.project = cpu.Linear(dense_dim, d)
                self.interact = DotProducts(num_sparse_features=columns)
                self.out_dim = d + (columns + 1) * columns // 2
            else:
                # The first column takes the place of the numbers.
                self.interact = DotProducts(num_sparse_features=columns - 1)
                self.out_dim = d + columns * (columns - 1) // 2
        elif config.kind == "cross" and config.low_rank is None:
            self.interact = CrossNet(self.out_dim, config.num_layers)
        elif config.kind == "cross":
            self.interact = LowRankCrossNet(self.out_dim, config.num_layers, config.low_rank)

    def forward(self, dense_BD: Tensor | None, sparse_BH: Tensor | None) -> Tensor:
        """Map (B, dense_dim) and (B, sum of sparse_dims), of which one may be None, to (B, out_dim)."""
        if self.config.kind == "dot":
            assert sparse_BH is not None
            assert self.interact is not None
            sparse_BFd = sparse_BH.unflatten(1, (len(self.sparse_dims), self.sparse_dims[0]))
            if self.project is None:
                return self.interact(sparse_BFd[:, 0], sparse_BFd[:, 1:])
            return self.interact(F.relu(self.project(dense_BD)), sparse_BFd)
        parts = [x for x in (dense_BD, sparse_BH) if x is not None]
        x_BD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x_BD if self.interact is None else self.interact(x_BD)


_EMBEDDING, _DENSE, _INTERACTION, _HEAD = EmbeddingConfig(), DenseConfig(), InteractionConfig(), HeadConfig()
_HISTORY = HistoryConfig()


class TableColumns(nn.Module):
    """The part of a network that reads a table's columns and makes one vector of each row.

    ``sparse`` (SparseArch), ``dense`` (DenseArch), ``vectors`` (VectorArch) and ``history`` (HistoryArch) read the
    columns, and ``interaction`` (InteractionArch) joins them.

    Args:
        features: columns of the data.
        embedding, dense, interaction: configs of the parts.
        dropout: dropout of the vectors.
        copies: number of separate weights, for models that share nothing.
        history: how sequences become one vector each.

    Attributes:
        input_dim: width D of the vectors.

    Raises:
        ValueError: parts that do not go together, such as target attention without a sequence that names its items.
    """

    def __init__(
        self,
        features: Features,
        embedding: EmbeddingConfig = _EMBEDDING,
        dense: DenseConfig = _DENSE,
        interaction: InteractionConfig = _INTERACTION,
        dropout: float = 0.0,
        copies: int = 1,
        history: HistoryConfig = _HISTORY,
    ) -> None:
        super().__init__()
        self.dropout, self.copies = dropout, copies
        self.num_continuous = len(features.continuous)
        self.dense = DenseArch(features.continuous, dense, copies, features.numbers)
        attended = tuple(s for s in features.sequences if history.pooling == "din" and s.items is not None)
        if history.pooling == "din" and features.sequences and not attended:
            names = ", ".join(s.name for s in features.sequences)
            raise ValueError(f"history.pooling='din' needs a sequence that names its items, and {names} names none")
        averaged = tuple(s for s in features.sequences if s not in attended)
        self.num_multi = sum(f.multi_valued for f in features.categorical)
        self.is_attended = [s in attended for s in features.sequences]
        columns = (*features.categorical, *self.dense.bin_features)
        self.sparse = sparse_arch(embedding, columns, copies, averaged)
        self.history = HistoryArch(attended, self.sparse, history) if attended else None
        self.vectors = VectorArch(features.vectors, embedding.dim, copies) if features.vectors else None
        others = (part for part in (self.vectors, self.history) if part is not None)
        self.sparse_dims = (*self.sparse.dims, *(dim for part in others for dim in part.dims))
        parts = [InteractionArch(interaction, self.dense.out_dim, self.sparse_dims) for _ in range(copies)]
        self.interaction, self.input_dim = nn.ModuleList(parts), parts[0].out_dim

    def read(self, batch: TableBatch, plain: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Return the numbers of a batch's rows, (B, width), and their embeddings, vectors and histories side by side.

        Several copies have (copies, B, width) each. None: no such columns.

        Args:
            batch: the rows.
            plain: compute as a graph for other runtimes does; see ``SparseArch.forward``.

        Raises:
            ValueError: the columns are not the model's, or a row is beyond its table.
        """
        if batch.dense_BC.shape[1] != self.num_continuous:
            given = batch.dense_BC.shape[1]
            raise ValueError(f"the batch has {given} continuous columns, the model {self.num_continuous}")
        if len(batch.lists) != self.num_multi + len(self.is_attended):
            own = self.num_multi + len(self.is_attended)
            raise ValueError(f"the batch has {len(batch.lists)} multi-valued columns and sequences, the model {own}")
        pooled = None
        if self.sparse.dims:
            lists = (*batch.lists[: self.num_multi], *self._sequences(batch, attended=False))
            pooled = self.sparse(batch.single_FB, lists, self.dense.bins(batch.dense_BC), plain)
        return self.read_beside(pooled, batch, plain)

    def read_beside(
        self, pooled: Tensor | None, batch: TableBatch, plain: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what ``read`` returns, given the output of ``sparse``, None without its columns."""
        embedded = [] if pooled is None else [pooled]
        if self.vectors is not None:
            if batch.vector_BV is None or batch.vector_BV.shape[1] != sum(self.vectors.sizes):
                numbers = 0 if batch.vector_BV is None else batch.vector_BV.shape[1]
                raise ValueError(f"the batch has vectors of {numbers} numbers, the model {sum(self.vectors.sizes)}")
            embedded.append(self.vectors(batch.vector_BV))
        if self.history is not None:
            embedded.append(self.history(self._sequences(batch, attended=True), self.sparse, embedded[0], plain))
        sparse = torch.cat(embedded, dim=-1) if len(embedded) > 1 else embedded[0] if embedded else None
        return self.dense(batch.dense_BC), sparse

    def _sequences(self, batch: TableBatch, attended: bool) -> list[Ragged]:
        """Return the sequences that are attended to, or those that are averaged."""
        pairs = zip(batch.lists[self.num_multi :], self.is_attended, strict=True)
        return [own for own, is_attended in pairs if is_attended == attended]

    def cross(self, dense: Tensor | None, sparse: Tensor | None) -> Tensor:
        """Return the vectors (B, D), or (copies, B, D), of what ``read`` returns."""
        if self.copies == 1:
            x: Tensor = self.interaction[0](dense, sparse)
            return x
        return torch.stack(
            [
                part(None if dense is None else dense[k], None if sparse is None else sparse[k])
                for k, part in enumerate(self.interaction)
            ]
        )

    def join(self, dense: Tensor | None, sparse: Tensor | None) -> Tensor:
        """Return the vectors of ``cross`` with dropout, only in training."""
        return self.dropped(self.cross(dense, sparse))

    def dropped(self, x: Tensor) -> Tensor:
        """Return the vectors with dropout, only in training."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class MultiTaskModel(TableColumns):
    """A network from a batch of table rows to the outputs of all tasks.

    ``TableColumns`` makes one vector of a row's columns, and the OverArch is ``shared``, the layer that the tasks share
    in whole or in part, and ``head``.

    Args:
        features: columns and tasks of the data.
        shared: config of a multi-gate layer or of a bottom.
        embedding, head: configs of the parts.
        gate_embeddings: width of the hidden layer of a gate of the columns by domain (EPNet); 0: none.
        columns: ``dense``, ``interaction``, ``dropout`` and ``history`` of ``TableColumns``.

    Raises:
        ValueError: a gate needs domains or columns that are missing, or is in models that share nothing.
    """

    _personal_P: Tensor

    def __init__(
        self,
        features: Features,
        shared: core.MultiGateConfig,
        embedding: EmbeddingConfig = _EMBEDDING,
        head: HeadConfig = _HEAD,
        gate_embeddings: int = 0,
        **columns: Any,
    ) -> None:
        _check_gates(features, shared, head, gate_embeddings)
        copies = len(features.tasks) if isinstance(shared, SingleTask) else 1
        super().__init__(features, embedding, copies=copies, **columns)
        self.num_domains = features.num_domains
        dim, num_tasks = self.input_dim, len(features.tasks)
        self.shared = shared.build(dim, num_tasks, num_domains=features.num_domains)
        self.head = head.build(shared.out_dim(dim), num_tasks, features.positives, features.targets)
        self._make_gates(features, embedding, head, gate_embeddings, shared.out_dim(dim))

    def _make_gates(
        self, features: Features, embedding: EmbeddingConfig, head: HeadConfig, gate_embeddings: int, tower_dim: int
    ) -> None:
        """Make what scales columns and towers by domain and personal columns, and shifts the logits."""
        uses_domain = gate_embeddings or head.domain_dim or (head.personal and features.num_domains)
        self.domain = self.embedding_gate = self.tower_gates = self.domain_logits = None
        if uses_domain:
            self.domain = nn.Embedding(features.num_domains, embedding.dim)
            nn.init.normal_(self.domain.weight, 0.0, embedding.init_std)
        domain_dim, columns = embedding.dim if uses_domain else 0, self.dense.out_dim + sum(self.sparse_dims)
        if gate_embeddings:
            self.embedding_gate = EmbeddingGate(domain_dim, columns, gate_embeddings)
        if head.domain_dim:
            outputs = sum(kind.width for kind in self.head.outputs.kinds)
            self.domain_logits = TwoLayers(domain_dim + self.input_dim, head.domain_dim, outputs)
        places = self.sparse.places(head.personal, "head.personal")
        self.register_buffer("_personal_P", places, persistent=False)
        if head.personal:
            prior_dim, widths = len(places) + domain_dim + self.input_dim, self.head.widths(tower_dim)
            self.tower_gates = TowerGates(prior_dim, head.gate_dim, widths, len(features.tasks))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that do not decay: the domains' vectors, if the vectors of other columns do not."""
        return set() if self.domain is None or self.sparse.config.weight_decay else {"domain.weight"}

    def forward(self, batch: TableBatch, plain: bool = False) -> Tensor:
        """Return the outputs (B, Z), one logit per task if all are binary; ``plain`` as for ``read``.

        Raises:
            ValueError: the columns are not the model's, a row is beyond its table, or the batch names no domain where
                the model has some.
        """
        if self.num_domains and batch.domain_B is None:
            raise ValueError(f"the model knows {self.num_domains} domains, and the batch has no domain_B")
        return self.compute(*self.read(batch, plain), batch.domain_B)

    def compute(self, dense: Tensor | None, sparse: Tensor | None, domain_B: Tensor | None) -> Tensor:
        """Return the outputs (B, Z) of encoded columns.

        Args:
            dense, sparse: as ``read`` returns them.
            domain_B: int64 (B,); not read where the model knows no domains.
        """
        context = core.RoutingContext(domain_ids_B=domain_B) if self.num_domains else None
        domain_BQ = None if self.domain is None or domain_B is None else self.domain(domain_B)
        prior = [] if sparse is None or self.tower_gates is None else [sparse.index_select(1, self._personal_P)]
        if self.embedding_gate is not None and domain_BQ is not None:
            dense, sparse = self.embedding_gate(domain_BQ, (dense, sparse))
        x = self.cross(dense, sparse)
        given = [] if domain_BQ is None else [domain_BQ]
        gates = () if self.tower_gates is None else self.tower_gates(torch.cat((*prior, *given, x.detach()), dim=1))
        shift_BZ = None if self.domain_logits is None else self.domain_logits(torch.cat((*given, x), dim=1))
        return self.head(self.shared(self.dropped(x), context), gates, shift_BZ)


def _check_gates(features: Features, shared: core.MultiGateConfig, head: HeadConfig, gate_embeddings: int) -> None:
    """Reject gates without any input.

    Raises:
        ValueError: see ``MultiTaskModel``.
    """
    if gate_embeddings < 0:
        raise ValueError(f"gate_embeddings={gate_embeddings} is negative")
    asked = {
        "gate_embeddings": gate_embeddings,
        "head.domain_dim": head.domain_dim,
        "head.personal": list(head.personal),
    }
    for name, value in asked.items():
        if value and isinstance(shared, SingleTask):
            raise ValueError(f"{name}={value} joins tasks that SingleTask keeps apart: leave it out")
        if value and name != "head.personal" and not features.num_domains:
            raise ValueError(f"{name}={value} goes by the domain, and the table names none: table.domain")


class SharedMembers(MultiTaskModel):
    """M networks in one, which share columns and weights (TabM, arXiv 2410.24210): the bottom is a
    ``core.BatchEnsemble``, and each member has a logit layer of its own. All are computed at once.

    Args:
        features, shared, embedding, head, columns: as for ``MultiTaskModel``.
        num_members: M.

    Raises:
        ValueError: a shared layer other than a ``SharedBottom`` of an ``MLP`` without norms, or a head that is not
            plain.
    """

    def __init__(
        self,
        features: Features,
        shared: core.MultiGateConfig,
        embedding: EmbeddingConfig = _EMBEDDING,
        head: HeadConfig = _HEAD,
        num_members: int = 1,
        **columns: Any,
    ) -> None:
        expert = shared.expert
        if type(shared) is not SharedBottom or not isinstance(expert, core.MLP) or expert.norm is not None:
            kind = f"{type(shared).__name__} of {type(expert).__name__}"
            raise ValueError(f"share_members=True needs a SharedBottom of an MLP without norms, not {kind}")
        if head.kind != "plain" or head.personal or head.domain_dim:
            raise ValueError("share_members=True needs head.kind='plain', without personal columns and domain_dim")
        super().__init__(features, shared, embedding, head, **columns)
        bottom = core.BatchEnsemble(expert.hidden_dims, expert.activation, expert.dropout)
        self.shared = bottom.build(num_members, self.input_dim)  # type: ignore[assignment]
        # The head sees the members' tasks as tasks side by side.
        parts = (shared.out_dim(self.input_dim), num_members * len(features.tasks))
        self.head = head.build(*parts, features.positives * num_members, features.targets * num_members)
        self.num_members, self.num_tasks = num_members, len(features.tasks)

    def compute(self, dense: Tensor | None, sparse: Tensor | None, domain_B: Tensor | None) -> Tensor:
        """Return the members' outputs (M, B, Z) of encoded columns."""
        h_MBH = self.shared(self.join(dense, sparse), "each").transpose(0, 1)
        z_BZ = self.head(h_MBH.repeat_interleave(self.num_tasks, 0))
        return z_BZ.unflatten(1, (self.num_members, -1)).transpose(0, 1)


class Ensemble(nn.Module):
    """M networks of the same shape and different initial weights, trained side by side on the same batches.

    Nothing but the batches is shared: the loss is the mean of the members', and the prediction is the mean of their
    predictions. They run one after the other.

    Args:
        members: the networks.
    """

    def __init__(self, members: list[MultiTaskModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: TableBatch) -> Tensor:
        """Return the members' outputs (M, B, Z)."""
        return torch.stack([member(batch) for member in self.members])
