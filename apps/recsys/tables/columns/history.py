"""Histories of items: pooling a sequence by the example's own item, as in the Deep Interest Network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.recsys.encoding.features import SequenceFeature
from apps.recsys.tables.columns.embedding import SparseArch
from apps.recsys.tables.rows.batch import Ragged
from core.fields import Checked, Count
from core.kernels import cpu


@core.register_config
@dataclass(frozen=True)
class HistoryConfig(Checked):
    """How the embeddings of a sequence become one vector.

    - "mean": their mean, as of a multi-valued column. Every kind of embedding takes it.
    - "din": target attention, the activation unit of the Deep Interest Network (arXiv 1706.06978). An MLP gives each
      item a weight by its embedding k and the embedding q of the example's own item, the value of the column that the
      sequence names as ``items``: ``w = MLP(q, k, q - k, q * k)``, and the vector is ``sum w k``. Sequences without
      ``items`` are averaged.

    Attributes:
        pooling: "mean" or "din".
        hidden_dims: widths of the MLP's hidden layers.
        activation: their activation. "dice" (section 5.3) is ``s x + (1 - s) a x`` with s the sigmoid of x normalized
            over the batch, so that in training an example's output depends on its batch; "prelu" and "sigmoid" do not.
        normalize: whether the weights of a sequence are a softmax. The paper leaves them as they are, so that their sum
            says how much of the history has to do with the item.

    Raises:
        ValueError: a value that is not known, or a width below 1.
    """

    prefix = "history."

    pooling: Literal["mean", "din"] = "mean"
    hidden_dims: tuple[Count, ...] = (36,)
    activation: Literal["prelu", "dice", "sigmoid"] = "prelu"
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling == "mean" and self.normalize:
            raise ValueError("history.normalize=True has no meaning with history.pooling='mean'")


class Dice(nn.Module):
    """``s x + (1 - s) a x`` with a learned a for each number, and s the sigmoid of the number normalized over a batch.

    Evaluation takes running statistics, and so does a training batch of fewer than two rows, which updates none.

    Args:
        dim: numbers of a row.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.slope = nn.Parameter(torch.zeros(dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        if self.training and len(x_ND) < 2:
            normalized_ND = F.batch_norm(x_ND, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        else:
            normalized_ND = self.norm(x_ND)
        share_ND = normalized_ND.sigmoid()
        return share_ND * x_ND + (1 - share_ND) * self.slope * x_ND


class ActivationUnit(nn.Module):
    """The weight of each item of a history given the example's own item; see ``HistoryConfig``.

    Args:
        dim: width d of the embeddings.
        config: layers and activation.
    """

    def __init__(self, dim: int, config: HistoryConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 4 * dim
        for hidden in config.hidden_dims:
            layers += [cpu.Linear(width, hidden), _activation(config.activation, hidden)]
            width = hidden
        self.mlp = nn.Sequential(*layers, cpu.Linear(width, 1))

    def forward(self, query_Nd: Tensor, key_Nd: Tensor) -> Tensor:
        """Return the weight of each pair, (N,)."""
        return self.mlp(torch.cat((query_Nd, key_Nd, query_Nd - key_Nd, query_Nd * key_Nd), dim=1)).squeeze(1)


def _activation(name: str, dim: int) -> nn.Module:
    if name == "dice":
        return Dice(dim)
    return nn.PReLU() if name == "prelu" else nn.Sigmoid()


class HistoryArch(nn.Module):
    """Target attention over the sequences of a batch.

    Histories follow one another without padding, so that only non-padding items are computed.

    Args:
        sequences: columns of sequences, each with ``items``.
        sparse: the embeddings of all columns, of which this reads single rows.
        config: the attention.

    Attributes:
        dims: widths of the outputs, one a column.

    Raises:
        ValueError: the embeddings have the kind "fused".
    """

    def __init__(self, sequences: Sequence[SequenceFeature], sparse: SparseArch, config: HistoryConfig) -> None:
        super().__init__()
        if sparse.config.kind == "fused":
            raise ValueError(
                "history.pooling='din' reads single rows of the tables, which embedding.kind='fused' cannot: take kind "
                "'joined' or 'collection', or pooling 'mean'"
            )
        names = [f.name for f in sparse.features]
        self.copies, self.normalize = sparse.copies, config.normalize
        self.items = [str(s.items) for s in sequences]
        self.places = [names.index(items) for items in self.items]
        self.starts = [sum(sparse.dims[:place]) for place in self.places]
        self.dims = tuple(sparse.dims[place] for place in self.places)
        self.units = nn.ModuleList(
            nn.ModuleList(ActivationUnit(dim, config) for _ in range(self.copies)) for dim in self.dims
        )

    def forward(self, sequences: Sequence[Ragged], sparse: SparseArch, embedded: Tensor, plain: bool = False) -> Tensor:
        """Return the vectors of all sequences side by side; a history without items has zeros.

        Args:
            sequences: rows of the items.
            sparse: the embeddings.
            embedded: output of ``sparse``, which holds the embeddings of the examples' own items, (B, H) or
                (copies, B, H).
            plain: check no row.

        Returns:
            (B, sum of ``dims``), or (copies, B, sum of ``dims``).

        Raises:
            ValueError: a row that its table lacks.
        """
        embedded_KBH = embedded if self.copies > 1 else embedded[None]
        units: Any = self.units
        B, pooled = embedded_KBH.shape[1], []
        for i, (items, column) in enumerate(zip(self.items, sequences, strict=True)):
            dim, example_N = self.dims[i], column.row_N
            key_KNd = sparse.rows_of(items, column.values_N.long(), plain).view(-1, self.copies, dim).transpose(0, 1)
            query_KBd = embedded_KBH[:, :, self.starts[i] : self.starts[i] + dim]
            of_example_N = example_N.clamp_max(B - 1)  # padding is of none
            own = [
                self._pool(unit(query_Bd.index_select(0, of_example_N), key_Nd), key_Nd, example_N, B)
                for unit, query_Bd, key_Nd in zip(units[i], query_KBd, key_KNd, strict=True)
            ]
            pooled.append(torch.stack(own))
        y_KBH = torch.cat(pooled, dim=-1)
        return y_KBH if self.copies > 1 else y_KBH[0]

    def _pool(self, weight_N: Tensor, key_Nd: Tensor, example_N: Tensor, B: int) -> Tensor:
        """Return the weighted sum of the items of each example, (B, d); the items of the example B are left out."""
        if self.normalize:
            weight_N = segment_softmax(weight_N, example_N, B + 1)
        product_Nd = weight_N[:, None] * key_Nd
        return product_Nd.new_zeros(B + 1, key_Nd.shape[1]).index_add(0, example_N, product_Nd)[:B]


def segment_softmax(score_N: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """Return the softmax of the scores of each segment, (N,).

    Args:
        score_N: scores.
        segment_N: int64, the segment of each score, 0 to ``num_segments - 1``.
        num_segments: number of segments.
    """
    score_N = score_N.float()
    largest_S = score_N.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment_N, score_N.detach(), "amax")
    exp_N = (score_N - largest_S.index_select(0, segment_N)).exp()
    total_S = exp_N.new_zeros(num_segments).index_add(0, segment_N, exp_N)
    return exp_N / total_S.index_select(0, segment_N)
