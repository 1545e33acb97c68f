"""Greedy search, beam search and sampling, over any model that gives the next token's logits a position at a time.

A hypothesis is a list of ids that ends in ``EOS_ID``; ``PAD_ID`` and ``BOS_ID`` are never in it. Its score is

    sum over its ids of log p(id | ids before, source) / length ** length_penalty

where ``log p`` is the model's, over its whole vocabulary and at temperature 1; the sum and ``length`` count the EOS_ID.
A hypothesis of as many ids as its sentence may have is closed by the EOS_ID that would then follow, with its log p, and
is scored as any other.

Beam search keeps ``k = beam_size`` open hypotheses a sentence. Each step, every one of them proposes its best
successors, and all of a sentence are ranked by their sum of log p. What ends in EOS_ID among the first k is finished;
the first k of the others stay open. A sentence is done when k hypotheses are finished, whatever its batch mates do. It
is done earlier where no open one could still be among its best ``num_best``: a sum of log p never rises, so divided by
the largest length possible it bounds all that may come of it. That saves steps and changes no output.

Of equal sums the better hypothesis's goes first, then the lower id. ``apps.nlp.naive`` is the same in plain loops.

A finished sentence leaves the batch (batch pruning, arXiv 2211.10017), unless ``prune=False``. What a sentence becomes
does not depend on it, nor on its batch mates, as far as the model's logits do not.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apps.nlp.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.top import top_ids


@dataclass(frozen=True)
class DecodeConfig:
    """How a translation or a continuation is found.

    Attributes:
        method: "greedy": the best id each step; "beam"; "sample": each id is drawn.
        beam_size: open hypotheses a sentence of "beam".
        num_best: hypotheses a sentence that are returned, best first; of "sample", how many are drawn.
        length_penalty: the score of a hypothesis is its sum of log p / length ** length_penalty; 0: the sum.
        max_length_ratio, max_length_extra: a hypothesis has at most ``ratio * S + extra`` ids before its end, rounded
            down; S are the source's or the prompt's ids with what marks its begin, its end and its language.
        min_length: ids that it has at least; beats the maximum.
        temperature: of "sample": logits are divided by it.
        top_k: of "sample": draw from the k most probable ids; 0: from all.
        top_p: of "sample": draw from the fewest most probable ids whose probabilities sum to p at least, after
            temperature and ``top_k``; 1: from all.
        seed: of "sample": a sentence's draws depend on it and on the sentence's number alone.
        prune: finished sentences leave the batch.
        dtype: "bfloat16": compute with the weights in bfloat16; scores add up in float32. None: as the model is.

    Raises:
        ValueError: a value out of its range.
    """

    method: Literal["greedy", "beam", "sample"] = "beam"
    beam_size: int = 5
    num_best: int = 1
    length_penalty: float = 1.0
    max_length_ratio: float = 2.0
    max_length_extra: int = 10
    min_length: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    prune: bool = True
    dtype: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "beam", "sample"):
            raise ValueError(f"method={self.method!r} is not one of greedy, beam, sample")
        for name, least in (("beam_size", 1), ("num_best", 1), ("min_length", 0), ("top_k", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("length_penalty", "max_length_ratio", "max_length_extra"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")
        if self.method != "sample" and self.num_best > self.width:
            raise ValueError(f"num_best={self.num_best} exceeds the {self.width} hypotheses of method={self.method}")
        if self.dtype not in (None, "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not bfloat16, or None for the model's own")

    @property
    def width(self) -> int:
        """k, rows that a sentence has in the batch."""
        return {"greedy": 1, "beam": self.beam_size, "sample": self.num_best}[self.method]

    def max_length(self, source_length: int, most: int | None = None) -> int:
        """Ids before the end that a hypothesis may have; ``most``: what the model can hold."""
        length = max(int(self.max_length_ratio * source_length + self.max_length_extra), self.min_length)
        return length if most is None else min(length, most)

    def score(self, log_prob: float, num_ids: int) -> float:
        """The score of a hypothesis of ``num_ids`` ids before its end."""
        return log_prob / (num_ids + 1) ** self.length_penalty


@dataclass(frozen=True)
class Hypotheses:
    """The best hypotheses of B sentences.

    Attributes:
        ids: for each sentence its ``num_best`` best, best first; ids without the end. Fewer where there are fewer.
        scores: their scores.
    """

    ids: list[list[list[int]]]
    scores: list[list[float]]

    @property
    def best(self) -> list[list[int]]:
        """The ids of each sentence's best."""
        return [ids[0] for ids in self.ids]


def translate_ids(
    model: Any,
    source_BS: Tensor,
    config: DecodeConfig,
    task_ids_B: Tensor | None = None,
    domain_ids_B: Tensor | None = None,
    index_B: Tensor | None = None,
) -> Hypotheses:
    """The translations of a batch.

    Args:
        model: a ``TranslationModel``, or what has its ``encode``, ``start`` and ``step``; evaluated without dropout,
            whichever mode it is in. With ``config.dtype`` a copy of it is made, if it has not that dtype already: see
            ``in_dtype``.
        source_BS: int64 (B, S), as in ``TranslationBatch``.
        config: how to search.
        task_ids_B, domain_ids_B: int64 (B,), for the routing context.
        index_B: int64 (B,), the sentences' numbers, which their random draws depend on; None: their places.

    Raises:
        ValueError: the model's log-probabilities are not finite.
    """
    if not len(source_BS):
        return Hypotheses([], [])
    with _evaluation(model, config.dtype) as model:
        memory = model.encode(source_BS, task_ids_B, domain_ids_B)
        cache = model.start(memory, copies=config.width)
        bos_B1 = torch.full_like(source_BS[:, :1], BOS_ID)
        return _search(model, cache, bos_B1, _lengths(source_BS), config, index_B)


def generate_ids(
    model: Any,
    prompt_BL: Tensor,
    config: DecodeConfig,
    task_ids_B: Tensor | None = None,
    domain_ids_B: Tensor | None = None,
    index_B: Tensor | None = None,
) -> Hypotheses:
    """What a language model writes after each prompt: the ids that follow it, without the prompt's own.

    Prompts are read a position at a time, in the steps of the search itself: shorter ones begin to write earlier.

    Args:
        model: a ``LanguageModel``, or what has its ``start`` and ``step``.
        prompt_BL: int64 (B, L), as training texts begin, with ``BOS_ID``; padded with ``PAD_ID`` after its end.
        config: how to search; S in its maximal length are the prompt's ids.
        task_ids_B, domain_ids_B: int64 (B,), for the routing context.
        index_B: int64 (B,), the prompts' numbers, which their random draws depend on; None: their places.

    Raises:
        ValueError: an empty prompt, or the model's log-probabilities are not finite.
    """
    if not len(prompt_BL):
        return Hypotheses([], [])
    lengths = _lengths(prompt_BL)
    if min(lengths) < 1:
        raise ValueError(f"prompt {lengths.index(min(lengths))} is empty: it needs one id at least, such as BOS_ID")
    with _evaluation(model, config.dtype) as model:
        cache = model.start(len(prompt_BL), task_ids_B, domain_ids_B, copies=config.width)
        return _search(model, cache, prompt_BL, lengths, config, index_B)


def score_ids(
    model: Any,
    source_BS: Tensor,
    target_BL: Tensor,
    task_ids_B: Tensor | None = None,
    domain_ids_B: Tensor | None = None,
) -> Tensor:
    """(B,), the sum of log p of each given translation, its end included: ``target_BL`` as in ``TranslationBatch``."""
    said_BL = target_BL[:, 1:]
    with _evaluation(model) as model:
        logits_BLV = model(source_BS, target_BL[:, :-1], task_ids_B, domain_ids_B)
        logits_BLV = logits_BLV if logits_BLV.dtype == torch.float64 else logits_BLV.float()
        log_prob_BL = logits_BLV.log_softmax(-1).gather(-1, said_BL[..., None]).squeeze(-1)
        return log_prob_BL.masked_fill(said_BL == PAD_ID, 0.0).sum(1)


def in_dtype(model: nn.Module, dtype: str | None) -> nn.Module:
    """A copy of the model with its weights in ``dtype``; the model itself where they are, or ``dtype`` is None.

    The functions here do it by themselves; with many batches, do it once before them.
    """
    weight = next(iter(model.parameters()), None)
    if dtype is None or weight is None or weight.dtype == getattr(torch, dtype):
        return model
    return copy.deepcopy(model).to(getattr(torch, dtype))


@contextlib.contextmanager
def _evaluation(model: nn.Module, dtype: str | None = None) -> Iterator[Any]:
    """The model without dropout and without gradients; afterwards each part is in its mode again."""
    model = in_dtype(model, dtype)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        for module in training:
            module.training = True


def max_positions(model: Any) -> int | None:
    """Ids that the model's decoder can read; None: any number."""
    config = getattr(model, "config", None)
    return config.max_length if config is not None and config.positions == "learned" else None


def _lengths(ids_BL: Tensor) -> list[int]:
    return (ids_BL != PAD_ID).sum(1).tolist()


@dataclass
class _Sentence:
    """What is known of a sentence outside the device.

    Attributes:
        prompt: ids that its hypotheses begin with.
        limit: ids it may have before its end.
        steps: of each step, the chosen ids and the rows they continue.
        finished: scores and ids of its finished hypotheses, in the order they were.
        done: nothing more is asked of it.
    """

    prompt: list[int]
    limit: int
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    @property
    def start(self) -> int:
        """The step of its first choice; those before read its prompt."""
        return len(self.prompt) - 1

    def ids(self, row: int) -> list[int]:
        """The ids that lead to a row, without the prompt."""
        found = []
        for ids, parents in reversed(self.steps[self.start :]):
            found.append(ids[row])
            row = parents[row]
        return found[::-1]

    def advance(self, report: _Report, config: DecodeConfig) -> None:
        """Take in what a step chose."""
        if self.done:
            return
        num_ids = len(self.steps) - self.start
        for log_prob, parent in zip(report.closed_score, report.closed_parent, strict=True):
            if log_prob > -math.inf:
                self.finished.append((config.score(log_prob, num_ids), self.ids(int(parent))))
        self.steps.append(([int(i) for i in report.token], [int(i) for i in report.parent]))
        best_open = max(report.score)
        self.done = len(self.finished) >= config.width or num_ids == self.limit or not best_open > -math.inf
        if not self.done and len(self.finished) >= config.num_best:
            worst = sorted((score for score, _ in self.finished), reverse=True)[config.num_best - 1]
            self.done = config.score(best_open, self.limit) <= worst

    def best(self, num_best: int) -> list[tuple[float, list[int]]]:
        """The best finished hypotheses; of equal scores the one that was finished first."""
        return sorted(self.finished, key=lambda hypothesis: -hypothesis[0])[:num_best]


@dataclass
class _Report:
    """A sentence's part of a ``_Choice``, k values each."""

    token: list[float]
    parent: list[float]
    score: list[float]
    closed_score: list[float]
    closed_parent: list[float]


@dataclass
class _Choice:
    """What becomes of b sentences' k rows after a step.

    Attributes:
        token_bk: int64, the id that each new row ends in.
        parent_bk: int64, the row of the sentence that it continues.
        score_bk: its sum of log p; -inf where there is no such row.
        closed_score_bk: the sums of hypotheses that end with this step; -inf where there are fewer.
        closed_parent_bk: int64, the rows that they end.
        tied_b: bool, ids of equal log p were chosen from, not necessarily the lowest; None: none were.
    """

    token_bk: Tensor
    parent_bk: Tensor
    score_bk: Tensor
    closed_score_bk: Tensor
    closed_parent_bk: Tensor
    tied_b: Tensor | None = None

    def reports(self) -> tuple[list[_Report], bool]:
        """The same as plain values, by sentence, and whether any is tied: one wait for the device."""
        parts = [self.token_bk, self.parent_bk, self.score_bk, self.closed_score_bk, self.closed_parent_bk]
        if self.tied_b is not None:
            parts.append(self.tied_b[:, None])
        k = self.token_bk.shape[1]
        rows = torch.cat([part.double() for part in parts], 1).tolist()
        reports = [_Report(*(row[i * k : (i + 1) * k] for i in range(5))) for row in rows]
        return reports, self.tied_b is not None and any(row[-1] for row in rows)


def _search(
    model: Any, cache: Any, prompt_BL: Tensor, lengths: Sequence[int], config: DecodeConfig, index_B: Tensor | None
) -> Hypotheses:
    """The loop that all methods share. A sentence has k rows, side by side; ``lengths`` are what its limit is of."""
    k, device = config.width, prompt_BL.device
    prompts = [[i for i in row if i != PAD_ID] for row in prompt_BL.tolist()]
    most = max_positions(model)
    sentences = [
        _Sentence(prompt, config.max_length(length, None if most is None else most - len(prompt)))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    draw_BkT = _draws(config, sentences, index_B).to(device) if config.method == "sample" else None
    in_batch = list(range(len(sentences)))
    score_bk = torch.zeros(len(sentences), k, device=device)
    if config.method != "sample":
        score_bk[:, 1:] = -math.inf  # rows would be alike at first
    token_R = prompt_BL[:, :1].expand(-1, k).masked_fill(score_bk == -math.inf, PAD_ID).flatten()
    step = 0
    while not all(s.done for s in sentences):
        logits_RV = model.step(token_R, cache)
        log_prob_bkV = logits_RV.log_softmax(-1).unflatten(0, (len(in_batch), k))
        _restrict(log_prob_bkV, [sentences[i] for i in in_batch], step, config)
        score_bk = score_bk.to(log_prob_bkV.dtype)
        for exact in (False, True):
            if draw_BkT is not None:
                choice = _drawn(log_prob_bkV, score_bk, draw_BkT[:, :, step], config)
            else:
                choice = _ranked(log_prob_bkV, score_bk, exact)
            _read_prompts(choice, score_bk, [sentences[i] for i in in_batch], step)
            reports, tied = choice.reports()
            if not tied:
                break
        for i, report in zip(in_batch, reports, strict=True):
            sentences[i].advance(report, config)
        step += 1

        kept = [place for place, i in enumerate(in_batch) if not (config.prune and sentences[i].done)]
        pruned = len(kept) < len(in_batch)
        token_bk, score_bk = choice.token_bk, choice.score_bk
        row_bk = choice.parent_bk + k * torch.arange(len(in_batch), device=device)[:, None]
        if pruned:
            kept_b = torch.tensor(kept, dtype=torch.int64, device=device)
            token_bk, score_bk, row_bk = token_bk[kept_b], score_bk[kept_b], row_bk[kept_b]
            draw_BkT = None if draw_BkT is None else draw_BkT[kept_b]
            in_batch = [in_batch[place] for place in kept]
        # Rows that are no hypothesis are padding: they are not routed.
        token_R = token_bk.masked_fill(score_bk == -math.inf, PAD_ID).flatten()
        if in_batch and (pruned or (k > 1 and draw_BkT is None)):  # else each row continues itself
            selected = cache.select(row_bk.flatten())
            cache = cache if selected is None else selected
    best = [s.best(config.num_best) for s in sentences]
    for i, found in enumerate(best):
        if not found:
            raise ValueError(f"sentence {i} of the batch has no end with a finite log-probability")
    return Hypotheses([[ids for _, ids in found] for found in best], [[score for score, _ in found] for found in best])


def _restrict(log_prob_bkV: Tensor, sentences: Sequence[_Sentence], step: int, config: DecodeConfig) -> None:
    """Set to -inf what may not come next, in place."""
    log_prob_bkV[..., PAD_ID] = log_prob_bkV[..., BOS_ID] = -math.inf
    too_short, too_long = [], []
    for place, sentence in enumerate(sentences):
        if step - sentence.start >= sentence.limit:
            too_long.append(place)
        elif step - sentence.start < config.min_length:
            too_short.append(place)
    if too_short:
        log_prob_bkV[too_short, :, EOS_ID] = -math.inf
    if too_long:
        end_bk = log_prob_bkV[too_long, :, EOS_ID]
        log_prob_bkV[too_long] = -math.inf
        log_prob_bkV[too_long, :, EOS_ID] = end_bk


def _read_prompts(choice: _Choice, score_bk: Tensor, sentences: Sequence[_Sentence], step: int) -> None:
    """In place of what was chosen, the next id of the prompts that are not read yet."""
    for place, sentence in enumerate(sentences):
        if step < sentence.start:
            choice.token_bk[place] = sentence.prompt[step + 1]
            choice.parent_bk[place] = torch.arange(len(choice.parent_bk[place]), device=score_bk.device)
            choice.score_bk[place] = score_bk[place]
            choice.closed_score_bk[place] = -math.inf


def _ranked(log_prob_bkV: Tensor, score_bk: Tensor, exact: bool) -> _Choice:
    """A step of beam search; of greedy search with k = 1."""
    b, k, V = log_prob_bkV.shape
    # Of a row, k ids that go on are enough, and EOS_ID beside them.
    m = min(k + 1, V)
    value_Rm, id_Rm, tied_R = top_ids(log_prob_bkV.flatten(0, 1), m, exact)
    total_bN = (score_bk[..., None] + value_Rm.reshape(b, k, m)).flatten(1)
    total_bN, order_bN = total_bN.sort(stable=True, dim=1, descending=True)
    total_bC, order_bC = total_bN[:, : 2 * k], order_bN[:, : 2 * k]
    token_bC, parent_bC = id_Rm.reshape(b, k * m).gather(1, order_bC), order_bC // m
    ends_bC = (token_bC == EOS_ID) & (total_bC > -math.inf)
    place_bk = ends_bC.byte().argsort(dim=1, stable=True)[:, :k]
    return _Choice(
        token_bk=token_bC.gather(1, place_bk),
        parent_bk=parent_bC.gather(1, place_bk),
        score_bk=total_bC.gather(1, place_bk),
        closed_score_bk=total_bC[:, :k].masked_fill(~ends_bC[:, :k], -math.inf),
        closed_parent_bk=parent_bC[:, :k],
        tied_b=None if exact else tied_R.view(b, k).any(1),
    )


def _drawn(log_prob_bkV: Tensor, score_bk: Tensor, draw_bk: Tensor, config: DecodeConfig) -> _Choice:
    """A step of sampling: each row by itself."""
    cumulative_bkV = sampling_probs(log_prob_bkV.double(), config).cumsum(-1)
    # The first id whose cumulative probability exceeds the draw: never one of probability 0.
    target_bk1 = draw_bk[..., None] * cumulative_bkV[..., -1:]
    token_bk = torch.searchsorted(cumulative_bkV, target_bk1, right=True).squeeze(-1)
    token_bk = torch.minimum(token_bk, cumulative_bkV.argmax(-1))
    total_bk = score_bk + log_prob_bkV.gather(-1, token_bk[..., None]).squeeze(-1)
    ends_bk = token_bk == EOS_ID
    row_bk = torch.arange(score_bk.shape[1], device=score_bk.device).expand_as(token_bk)
    closed_bk, open_bk = total_bk.masked_fill(~ends_bk, -math.inf), total_bk.masked_fill(ends_bk, -math.inf)
    return _Choice(token_bk, row_bk, open_bk, closed_bk, row_bk)


def sampling_probs(logits: Tensor, config: DecodeConfig) -> Tensor:
    """(..., V), what an id is drawn with: 0 outside ``top_k`` and ``top_p``, where equals go to the lower ids.

    Args:
        logits: (..., V), logits or log-probabilities; -inf for what is not allowed.
        config: its temperature, ``top_k`` and ``top_p``.
    """
    logits = logits / config.temperature
    if config.top_k == 0 and config.top_p == 1:
        return logits.softmax(-1)
    sorted_logits, order = logits.sort(stable=True, dim=-1, descending=True)
    if config.top_k:
        sorted_logits[..., config.top_k :] = -math.inf
    probs = sorted_logits.softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= config.top_p, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def _draws(config: DecodeConfig, sentences: Sequence[_Sentence], index_B: Tensor | None) -> Tensor:
    """float64 (B, k, steps), uniform in [0, 1): of each sentence by a generator of its own, so that neither batch mates
    nor pruning change what it draws."""
    numbers = range(len(sentences)) if index_B is None else index_B.tolist()
    steps = max(s.start + s.limit + 1 for s in sentences)
    draw_BkT = torch.zeros(len(sentences), config.width, steps, dtype=torch.float64)
    for draw_kT, sentence, number in zip(draw_BkT, sentences, numbers, strict=True):
        own = torch.rand(
            sentence.limit + 1, config.width, generator=generator(config.seed, number), dtype=torch.float64
        )
        draw_kT[:, sentence.start : sentence.start + sentence.limit + 1] = own.T
    return draw_BkT


def generator(seed: int, number: int) -> torch.Generator:
    """What the draws of a sentence come from; the sentence's number is its line's, or its place in the batch."""
    # A generator on the CPU heeds 32 bits of its seed: both numbers must be mixed into them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {number}".encode()))
