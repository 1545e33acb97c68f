"""The loop that all methods share: from next-token logits to finished hypotheses."""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.decode.choice import Choice, Report, ranked
from apps.nlp.decode.config import DecodeConfig
from apps.nlp.decode.constraint import Constraint
from apps.nlp.decode.sampling import drawn, draws
from core.parallel import InStep


@dataclass(frozen=True)
class Hypotheses:
    """The best hypotheses of B sentences.

    Attributes:
        ids: for each sentence its ``num_return_sequences`` best, best first; ids without the end.
            Fewer where there are fewer.
        scores: their scores.
    """

    ids: list[list[list[int]]]
    scores: list[list[float]]

    @property
    def best(self) -> list[list[int]]:
        """The ids of each sentence's best."""
        return [ids[0] for ids in self.ids]


@dataclass
class Sentence:
    """A sentence in a search, outside the device.

    Attributes:
        prompt: ids that its hypotheses start with.
        limit: ids it may have before its end.
        steps: of each step from the first choice on, the choices, and the sentence's place in it.
        finished: scores and ids of its best finished hypotheses, best first; of equal scores the one that ended first.
        done: nothing more is asked of it.
        constraint: what its text may be; None: anything.
        states: the constraint's state of each row; None of a row that is no hypothesis.
    """

    prompt: list[int]
    limit: int
    constraint: Constraint | None = None
    states: list[Hashable | None] = field(default_factory=list)
    steps: list[tuple[Report, int]] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    @property
    def start(self) -> int:
        """The step of its first choice; those before read its prompt."""
        return len(self.prompt) - 1

    def ids(self, row: int) -> list[int]:
        """Return the ids that lead to a row, without the prompt."""
        backwards = []
        for report, place in reversed(self.steps):
            backwards.append(int(report.token[place, row]))
            row = int(report.parent[place, row])
        return backwards[::-1]

    def advance(self, report: Report, place: int, config: DecodeConfig) -> None:
        """Take in a step's choices; ``place`` is the sentence's in it."""
        num_ids = len(self.steps)
        if report.ends[place]:
            closed = zip(report.closed_score[place].tolist(), report.closed_parent[place].tolist(), strict=True)
            for log_prob, parent in closed:
                score = config.score(log_prob, num_ids)
                is_kept = len(self.finished) < config.num_kept or score > self.finished[-1][0]
                if log_prob > -math.inf and is_kept:
                    insort(self.finished, (score, self.ids(int(parent))), key=lambda hypothesis: -hypothesis[0])
                    del self.finished[config.num_kept :]
        if self.constraint is not None:
            rows = zip(*(part[place].tolist() for part in (report.token, report.parent, report.score)), strict=True)
            self.states = [
                self.constraint.advance(self.states[int(parent)], int(token)) if log_prob > -math.inf else None
                for token, parent, log_prob in rows
            ]
        self.steps.append((report, place))
        best_open = report.best[place]
        self.done = num_ids >= self.limit or not best_open > -math.inf
        if not self.done and len(self.finished) == config.num_kept:
            self.done = config.attainable(best_open, num_ids + 1, self.limit) <= self.finished[-1][0]


def search(
    model: Any,
    cache: Any,
    prompt_BL: Tensor,
    lengths: Sequence[int],
    config: DecodeConfig,
    index_B: Tensor | None,
    constraints: Sequence[Constraint] | None = None,
) -> Hypotheses:
    """Search by the loop that all methods share; a sentence's limit depends on its entry in ``lengths``.

    With ``constraints``, one a sentence, an id is only taken if the text can still end in time.

    A sentence has one row in the batch until its first choice is made, and then k rows side by side. Ranks that share
    experts take as many steps as the one with the most: the others' rows are padding in the end.

    Raises:
        ValueError: a sentence has no text of finite log p, or its constraint allows none of at most its limit.
    """
    k, device, ranks = config.width, prompt_BL.device, InStep(model)
    prompts = [[i for i in row if i != PAD_ID] for row in prompt_BL.tolist()]
    most = max_positions(model)
    sentences = [
        Sentence(prompt, config.max_length(length, None if most is None else most - len(prompt)))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    if constraints is not None:
        _constrain(sentences, constraints, k)
    needs_of: dict[tuple[int, Hashable], Tensor] = {}
    first = min(s.start for s in sentences)
    for t in range(first):
        ranks.go_on(True)
        model.step(_column(prompts, t, device), cache)
    draw_BkT = None
    if config.method == "sample":
        numbers = range(len(sentences)) if index_B is None else index_B.tolist()
        draw_BkT = draws(config, [(s.start, s.limit + 1) for s in sentences], numbers).to(device)
    token_R, in_batch = _column(prompts, first, device), list(range(len(sentences)))
    score_bk = torch.zeros(len(sentences), 1, device=device)
    for step in itertools.count(first):
        ranks.go_on(True)
        logits_RV = model.step(token_R, cache)
        # In place: to fresh memory it took 1.8 ms of 160 x 8,000 logits on one core, and so 0.8 ms.
        log_prob_bkV = torch.log_softmax(logits_RV, -1, out=logits_RV).unflatten(0, (len(in_batch), -1))
        score_bk = score_bk.to(log_prob_bkV.dtype)
        waiting = [sentences[i] for i in in_batch]
        _restrict(log_prob_bkV, waiting, step, config)
        if constraints is not None:
            _mask(log_prob_bkV, waiting, step, needs_of)
        for exact in (False, True):
            if draw_BkT is not None:
                choice = drawn(log_prob_bkV, score_bk, draw_BkT[:, :, step], config)
            else:
                choice = ranked(log_prob_bkV, score_bk, k, exact)
            _read_prompts(choice, waiting, step, config.method)
            report = choice.report()
            if not report.tied:
                break
        del logits_RV, log_prob_bkV  # or the next step's would need memory in addition: pages that the system zeroes
        for place, sentence in enumerate(waiting):
            if step >= sentence.start and not sentence.done:
                sentence.advance(report, place, config)
        if all(s.done for s in waiting):
            break

        token_bk, score_bk = choice.token_bk, choice.score_bk
        row_bk = torch.arange(len(token_bk) * k, device=device).view(-1, k)
        if step == first:
            cache = cache.expand(k)
        else:
            row_bk = row_bk - row_bk % k + choice.parent_bk
        leaves = config.prune and any(s.done for s in waiting)
        if leaves:
            kept = _closed_up([not s.done for s in waiting])
            kept_b = torch.tensor(kept, device=device)
            token_bk, score_bk, row_bk = token_bk[kept_b], score_bk[kept_b], row_bk[kept_b]
            draw_BkT = None if draw_BkT is None else draw_BkT[kept_b]
            in_batch = [in_batch[place] for place in kept]
        # A row that is not a hypothesis is padding: it is not routed.
        token_R = token_bk.masked_fill(score_bk == -math.inf, PAD_ID).flatten()
        if leaves or (config.method == "beam" and k > 1 and step > first):  # else each row continues from itself
            cache = cache.select(row_bk.flatten())
    while ranks.go_on(False):
        model.step(torch.full_like(token_R, PAD_ID), cache)
    best = [s.finished[: config.num_return_sequences] for s in sentences]
    for i, own in enumerate(best):
        if not own:
            raise ValueError(f"sentence {i} of the batch has no end with a finite log-probability")
    return Hypotheses([[ids for _, ids in own] for own in best], [[score for score, _ in own] for own in best])


def _closed_up(stays: Sequence[bool]) -> list[int]:
    """Return the places of those that stay, in their new order: the last ones fill the gaps, so that few move."""
    count = sum(stays)
    last = (place for place in reversed(range(count, len(stays))) if stays[place])
    return [place if stays[place] else next(last) for place in range(count)]


def _column(prompts: Sequence[Sequence[int]], t: int, device: torch.device) -> Tensor:
    """Return the prompts' ids at position t, int64 (B,)."""
    return torch.tensor([prompt[t] for prompt in prompts], device=device)


def _restrict(log_prob_bkV: Tensor, sentences: Sequence[Sentence], step: int, config: DecodeConfig) -> None:
    """Set to -inf what may not come next, in place."""
    log_prob_bkV[..., PAD_ID] = log_prob_bkV[..., BOS_ID] = -math.inf
    too_short, too_long = [], []
    for place, sentence in enumerate(sentences):
        if step - sentence.start >= sentence.limit:
            too_long.append(place)
        elif step - sentence.start < config.min_length:
            too_short.append(place)
    if too_short:
        at = slice(None) if len(too_short) == len(sentences) else too_short
        log_prob_bkV[at, :, EOS_ID] = -math.inf
    for place in too_long:
        log_prob_kV = log_prob_bkV[place]
        end_k = log_prob_kV[:, EOS_ID].clone()
        log_prob_kV.fill_(-math.inf)[:, EOS_ID] = end_k


def _constrain(sentences: Sequence[Sentence], constraints: Sequence[Constraint], k: int) -> None:
    """Give each sentence its constraint, and the states of its k rows before the first choice."""
    for i, (sentence, own) in enumerate(zip(sentences, constraints, strict=True)):
        sentence.constraint, sentence.states = own, [own.start()] * k
        if (least := own.least(sentence.states[0])) > sentence.limit:
            raise ValueError(
                f"sentence {i} of the batch may have {sentence.limit} tokens, and the shortest text of its constraint "
                f"has {least:,}"
            )


def _mask(
    log_prob_bkV: Tensor, sentences: Sequence[Sentence], step: int, needs_of: dict[tuple[int, Hashable], Tensor]
) -> None:
    """Set to -inf what a constraint does not allow, and after what no end is near enough, in place."""
    k, rows, left, needed = log_prob_bkV.shape[1], list[int](), list[int](), list[Tensor]()
    for place, sentence in enumerate(sentences):
        if sentence.constraint is None or sentence.done or step < sentence.start:
            continue
        for row, state in enumerate(sentence.states[:k]):
            if state is not None:
                key = id(sentence.constraint), state
                if key not in needs_of:
                    needs_of[key] = sentence.constraint.needs(state).to(log_prob_bkV.device)
                rows.append(place * k + row)
                left.append(sentence.limit - step + sentence.start - 1)
                needed.append(needs_of[key])
    if rows:
        log_prob_RV, left_r = log_prob_bkV.flatten(0, 1), torch.tensor(left, device=log_prob_bkV.device)
        log_prob_RV[rows] = log_prob_RV[rows].masked_fill(torch.stack(needed) > left_r[:, None], -math.inf)


def _read_prompts(choice: Choice, sentences: Sequence[Sentence], step: int, method: str) -> None:
    """While a prompt is still being read, replace the chosen id with the prompt's next one."""
    reading = [place for place, sentence in enumerate(sentences) if step < sentence.start]
    if not reading:
        return
    device, k = choice.token_bk.device, choice.token_bk.shape[1]
    token_b = torch.tensor([sentences[place].prompt[step + 1] for place in reading], device=device)
    choice.token_bk[reading] = token_b[:, None]
    choice.parent_bk[reading] = torch.arange(k, device=device)
    choice.closed_score_bk[reading] = choice.score_bk[reading] = -math.inf
    choice.score_bk[reading, : k if method == "sample" else 1] = 0.0


def max_positions(model: Any) -> int | None:
    """Return how many ids the model's decoder can read; None: any number."""
    config = getattr(model, "config", None)
    return config.max_length if config is not None and config.positions == "learned" else None
