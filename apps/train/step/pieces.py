"""Metrics of pieces of text, such as sentences and blocks, from the scores that a model gives each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


def ratio_values(nats_N: Tensor, tokens_N: Tensor) -> Tensor:
    """Return values (N,) whose mean is the nats per token of all rows, and whose spread equals the spread of this
    ratio.

    Example::

        ratio_values(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))     # 6 / 3 = 2: 2 + (-1, 1) / 1.5
    """
    ratio = nats_N.sum() / tokens_N.sum()
    return ratio + (nats_N - ratio * tokens_N) / tokens_N.mean()


class Block(NamedTuple):
    """The scores that a model gives a block of text, or a row of documents.

    Attributes:
        index: the block's place in the split.
        nll: negative log likelihood of its tokens, in nats, summed.
        right: number of tokens that the model put first.
        tokens: number of its tokens.
    """

    index: int  # type: ignore[assignment]  # a block has no use for tuple.index
    nll: float
    right: int
    tokens: int


class Scored(Protocol):
    """A piece of text and the scores that a decoder gives it: a translated sentence, or a block."""

    @property
    def index(self) -> Any: ...
    @property
    def nll(self) -> float: ...
    @property
    def right(self) -> int: ...
    @property
    def tokens(self) -> int: ...


Piece = TypeVar("Piece", bound=Scored)


def token_metrics(pieces: Sequence[Scored]) -> dict[str, float]:
    """Return token accuracy and perplexity; NaN without tokens."""
    tokens = sum(s.tokens for s in pieces)
    if not tokens:
        return {"token_accuracy": math.nan, "perplexity": math.nan}
    nll = math.fsum(s.nll for s in pieces)
    return {"token_accuracy": sum(s.right for s in pieces) / tokens, "perplexity": perplexity(nll / tokens)}


def perplexity(nll: float) -> float:
    """Return ``exp`` of a mean in nats; infinite where that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf


def gathered(own: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of all ranks by number, each once."""
    parts: list[Any] = [list(own)]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, list(own))
    by_index = {piece.index: piece for part in parts for piece in part}
    return [by_index[index] for index in sorted(by_index)]


class PieceMetrics(Metric, Generic[Piece]):
    """Metrics of pieces of text, which every rank keeps and gathers: the same on one process or many.

    A piece that came twice, as the sampler of a distributed run fills up its last round, counts once.

    Attributes:
        pieces: of all ranks, by ``index``; after ``compute``.
    """

    has_loss: ClassVar[bool] = False
    """Whether ``loss`` is one of the values, in place of the mean over batches."""
    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self._own: list[Piece] = []
        self.pieces: list[Piece] = []

    def update(self, outputs: Iterable[Piece], targets: Any = None) -> None:
        """Add the pieces of a batch; ``targets`` are in them already."""
        self._own.extend(outputs)

    def reset(self) -> None:
        """Forget all pieces."""
        super().reset()
        self._own, self.pieces = [], []

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all pieces so far, float64 scalars; NaN without any."""
        self.pieces = gathered(self._own)
        values = self.values_of(self.pieces)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def values_of(self, pieces: Sequence[Piece]) -> dict[str, float]:
        """Return the metrics by name."""
        raise NotImplementedError
