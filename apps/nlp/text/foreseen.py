"""Scores of a decoder that is given the right text, and the metrics that they add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from apps.data.subwords import PAD_ID, UNK_ID
from apps.nets.loss import TargetScores


class Foreseen(NamedTuple):
    """The scores that a decoder gives each sentence's reference, its end included.

    Attributes:
        nll_B: float64 (B,), negative log likelihood in nats, summed over its tokens.
        right_B: int64 (B,), tokens that came first.
        tokens_B: int64 (B,).
    """

    nll_B: Tensor
    right_B: Tensor
    tokens_B: Tensor


def per_sentence(scores: TargetScores, real_BL: Tensor) -> Foreseen:
    """Add up the scores of T targets, the real ones of (B, L), row by row."""
    tokens_B = real_BL.sum(1)
    row_T = torch.repeat_interleave(tokens_B)
    nll_B = torch.zeros(len(tokens_B), dtype=torch.float64, device=row_T.device)
    return Foreseen(
        nll_B=nll_B.index_add_(0, row_T, scores.nll_T.double()),
        right_B=torch.zeros_like(tokens_B).index_add_(0, row_T, scores.is_first_T.long()),
        tokens_B=tokens_B,
    )


def ratio_values(nats_N: Tensor, tokens_N: Tensor) -> Tensor:
    """Return values (N,) whose mean is the nats per token of all rows, and whose spread equals the spread of this
    ratio.

    Example::

        ratio_values(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))     # 6 / 3 = 2: 2 + (-1, 1) / 1.5
    """
    ratio = nats_N.sum() / tokens_N.sum()
    return ratio + (nats_N - ratio * tokens_N) / tokens_N.mean()


def read_ids(target_BL: Tensor) -> Tensor:
    """Return the decoder's input, (B, L - 1): all but the end, after which there is nothing to say."""
    return target_BL[:, :-1].masked_fill(target_BL[:, 1:] == PAD_ID, PAD_ID)


def of_mean_length(ids_BS: Tensor) -> Tensor:
    """Return the first M tokens, (B, M), with unknown tokens for padding; M is the mean length, rounded."""
    length = round(int((ids_BS != PAD_ID).sum()) / max(len(ids_BS), 1))
    return ids_BS[:, : max(length, 1)].masked_fill(ids_BS[:, : max(length, 1)] == PAD_ID, UNK_ID)


class Judged(NamedTuple):
    """A text that a model has written in a test, next to the right one.

    Attributes:
        index: its place in the split, from 0: not its line in a file, since pairs of several files follow one another
            and pairs with an empty side are left out.
        group: number of its group: of a language pair among the data's, or of an image.
        written: the text that the model wrote; None if another text of the group in its batch has it.
        reference: the right text.
        log_prob: the written text's score in the search.
        nll: negative log likelihood of the reference's tokens, in nats, summed.
        right: tokens of the reference that came first when all before them were the reference's.
        tokens: of the reference, its end included.
    """

    index: int  # type: ignore[assignment]  # a text has no use for tuple.index
    group: int
    written: str | None
    reference: str
    log_prob: float
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
