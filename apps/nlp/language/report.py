"""The test report of a language model: the loss by place and by class of token, the experts, excerpts of the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.nlp.expert_use import write_use
from apps.nlp.specialization import CLASSES, TextUse, token_classes
from apps.nlp.text.teacher_forced import per_sentence
from apps.report.base import Report, ReportConfig, is_left_out, spread_places
from apps.report.page import BarChart, Line, LineChart, Section, Table, Words
from apps.report.page.parts import START
from apps.report.routed import choosing, experts_by_layer, largest_number
from apps.report.tables import write_csv
from apps.report.use import some_layers, tokens_of
from apps.train.step.pieces import perplexity
from core.fields import CountOrZero

_SHOWN = 48  # subwords of a piece of text
_SEEN = 0.01  # share of the tokens from which a class is called the hardest
_PLACES = 64  # parts of a block whose losses are told apart
_NAMES = tuple(name.replace("of sentence", "of document") for name in CLASSES)


@core.register_config
@dataclass(frozen=True)
class LanguageReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the scores of a language model.

    Attributes:
        routing_examples: blocks at equal steps through the test text that losses and routing are read from, to the end
            of a batch; 0 reads none.
        sentences: excerpts of the text that are shown with the experts and the loss of each subword.

    Raises:
        ValueError: a number out of its range.
    """

    routing_examples: CountOrZero = 1000
    sentences: CountOrZero = 2

    def brief(self) -> Self:
        return dataclasses.replace(self, routing_examples=min(self.routing_examples, 200))


@dataclass
class TokenLosses:
    """Sums of the losses of a text's tokens, by their place in the block and by their subword.

    Args:
        vocabulary: V.

    Attributes:
        by_place: float64 (2, L): sum of the losses in nats, number of tokens; L is the longest block so far.
        by_piece: float64 (3, V): sum of the losses, tokens, tokens that the model put first.
    """

    vocabulary: int
    by_place: np.ndarray = field(default_factory=lambda: np.zeros((2, 0)))
    by_piece: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.by_piece = np.zeros((3, self.vocabulary))

    def add(self, nll_T: Tensor, is_first_T: Tensor, target_T: Tensor, real_BL: Tensor) -> None:
        """Add the T real targets of a batch, where ``real_BL`` is True, row by row."""
        place_T, target_N = real_BL.nonzero()[:, 1].cpu().numpy(), target_T.cpu().numpy()
        nll_N, first_N = nll_T.double().cpu().numpy(), is_first_T.double().cpu().numpy()
        if real_BL.shape[1] > self.by_place.shape[1]:
            self.by_place = np.pad(self.by_place, ((0, 0), (0, real_BL.shape[1] - self.by_place.shape[1])))
        for sums, at_N, values in (
            (self.by_place, place_T, (nll_N, np.ones_like(nll_N))),
            (self.by_piece, target_N, (nll_N, np.ones_like(nll_N), first_N)),
        ):
            for row, value_N in enumerate(values):
                np.add.at(sums[row], at_N, value_N)

    def classes(self, pieces: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row for each class of ``token_classes`` that has a token, and one for all: number of tokens, their
        share, mean loss in nats, perplexity, and share that the model put first."""
        class_V = token_classes(pieces, self.by_piece[1])
        sums_C3 = np.stack([np.bincount(class_V, row, len(CLASSES)) for row in self.by_piece], 1)
        rows = [_row(name, sums, self.by_piece) for name, sums in zip(_NAMES, sums_C3, strict=True) if sums[1]]
        return [*rows, _row("all", self.by_piece.sum(1), self.by_piece)]

    def places(self) -> list[dict[str, Any]]:
        """Return a row for each place of a block, from 1, or for each of at most ``_PLACES`` equal parts of a long one:
        its first and last place, the number of tokens and their mean loss in nats."""
        length = self.by_place.shape[1]
        width = max(-(-length // _PLACES), 1)
        parts = [np.arange(start, min(start + width, length)) for start in range(0, length, width)]
        rows = []
        for part in parts:
            nll, tokens = self.by_place[:, part].sum(1)
            if tokens:
                rows.append({"first": int(part[0]) + 1, "last": int(part[-1]) + 1, "tokens": int(tokens),
                             "loss": nll / tokens})  # fmt: skip
        return rows


def _row(name: str, sums: np.ndarray, all_sums: np.ndarray) -> dict[str, Any]:
    nll, tokens, right = map(float, sums)
    return {
        "class": name,
        "tokens": int(tokens),
        "share": tokens / max(float(all_sums[1].sum()), 1.0),
        "loss": nll / max(tokens, 1.0),
        "perplexity": perplexity(nll / max(tokens, 1.0)),
        "token_accuracy": right / max(tokens, 1.0),
    }


@dataclass(frozen=True)
class _Collected:
    losses: TokenLosses
    use: TextUse
    excerpts: list[Words]
    pieces: Sequence[str]
    domains: dict[str, np.ndarray]


class LanguageReport(Report):
    """After a test in one process: the loss by class of token and by place in the block, the use of the experts, and
    excerpts of the text with the experts and the loss of each subword.

    It writes ``token_classes.csv``, ``places.csv``; of several domains ``domains.csv``; and of a sparse model
    ``specialization.csv``, ``expert_subwords.csv`` and ``expert_class.png``.

    Args:
        config: what to do.
    """

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> _Collected | None:
        if is_left_out(trainer):
            return None
        module: Any = pl_module
        pieces = module.subwords.pieces(range(module.subwords.size("target")), "target")
        losses, excerpts = TokenLosses(len(pieces)), list[Words]()
        count = int(trainer.num_test_batches[0])
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = tuple(getattr(data, "domains", None) or ("text",))
        use = TextUse(tokens_of(module), module.subwords, names, "pair" if names == ("text",) else "domain")
        domains = {name: np.zeros(3) for name in names}
        wanted = -(-self.config.routing_examples // max(int(getattr(data, "eval_batch_size", 1)), 1))
        places = spread_places(count, wanted)
        shown = {places[i] for i in spread_places(len(places), self.config.sentences)} if places else set()
        for place, batch in enumerate(batches_of_test(trainer)):
            if place not in places:
                continue
            batch = trainer.strategy.batch_to_device(batch, module.device)
            with trainer.precision_plugin.forward_context(), core.record(module.model) as tape:
                scores, real_BL = module.token_scores(batch)
            losses.add(scores.nll_T, scores.is_first_T, batch.tokens_BL[:, 1:][real_BL], real_BL)
            domain_B = torch.zeros_like(batch.index_B) if batch.domain_B is None else batch.domain_B
            for number, sums in zip(domain_B.tolist(), _domain_sums(module, batch, scores, real_BL), strict=True):
                domains[names[number]] += sums
            known = core.Tape(tuple(e for e in choosing(tape.entries) if _is_of_all_tokens(e, real_BL.numel())))
            use.add(known, domain_B)
            if place in shown:
                nll_BL = torch.full(real_BL.shape, torch.nan, dtype=torch.float64, device=real_BL.device)
                nll_BL[real_BL] = scores.nll_T.double()
                number = len(excerpts) + 1
                excerpts.append(excerpt(number, batch.tokens_BL[0].tolist(), nll_BL[0].tolist(), known, pieces))
        return _Collected(losses, use, excerpts, pieces, domains)

    def write(self, collected: _Collected, folder: Path) -> list[Section]:
        losses = collected.losses
        if not losses.by_piece[1].any():
            return []
        sections = [write_losses(losses, collected.pieces, folder)]
        if collected.use.noun == "domain" or any(mixed for _, _, mixed in collected.domains.values()):
            sections.append(write_domains(collected.domains, folder))
        if collected.use.layers:
            sections.append(write_use(collected.use, folder, draw=self.config.pictures))
        return [*sections, Section("Words in sentences", tuple(own for own in collected.excerpts if own.words))]


def _domain_sums(module: Any, batch: Any, scores: Any, real_BL: Tensor) -> np.ndarray:
    """Return each block's tokens and nats, (B, 3), and with ``core.Domain`` its nats if its domain is guessed: experts
    are mixed by their posterior given the block before; all alike for a batch's first."""
    own, mixed_B = per_sentence(scores, real_BL), None
    if (nll_BE := module.domain_nll(batch)) is not None:
        before_BE = torch.cat([torch.zeros_like(nll_BE[:1]), nll_BE[:-1]])
        guessed = batch._replace(domain_B=core.domain_posterior(-before_BE).float())
        mixed_B = per_sentence(*module.token_scores(guessed)).nll_B
    return torch.stack([own.tokens_B, own.nll_B, own.nll_B * 0 if mixed_B is None else mixed_B], 1).cpu().numpy()


def write_domains(domains: Mapping[str, np.ndarray], folder: Path) -> Section:
    """Write ``domains.csv``, and return its page section.

    Args:
        domains: tokens, nats, and nats with guessed domains (0: there are none), by domain.
    """
    rows: list[dict[str, Any]] = []
    for name, (tokens, *nats) in domains.items():
        known, guessed = (perplexity(nll / tokens) if nll else None for nll in nats)
        rows.append({"domain": name, "tokens": int(tokens), "perplexity": known, "perplexity_guessed": guessed})
    write_csv(folder / "domains.csv", rows)
    cells = tuple(tuple(f"{v:,.2f}" if isinstance(v, float) else str(v or "") for v in row.values()) for row in rows)
    note = "Guessed: experts mixed by the posterior of the block before."
    table = Table("Perplexity by domain", ("domain", "tokens", "perplexity", "guessed"), cells, note=note)
    return Section("Domains", (table,))


def _is_of_all_tokens(entry: Any, tokens: int) -> bool:
    """Return whether a layer saw every token of the batch with its id; with Mixture-of-Depths some see few."""
    context = entry.context
    return entry.routing.num_tokens == tokens and context is not None and context.token_ids_BS is not None


def excerpt(number: int, ids: Sequence[int], nll: Sequence[float], tape: core.Tape, pieces: Sequence[str]) -> Words:
    """Return a piece of the first block of a batch, from a word's start after a third of the block on.

    Args:
        number: number of the piece.
        ids: L ids of the block.
        nll: L - 1 losses, of all ids but the first; NaN for padding.
        tape: the passes of the layers, which read all ids but the last.
        pieces: the vocabulary.
    """
    real = [i for i in range(1, len(ids) - 1) if not np.isnan(nll[i - 1])]
    after = [i for i in real if i >= len(ids) // 3 and pieces[ids[i]].startswith(START)]
    first = (after or real or [1])[0]
    kept = [i for i in real if first <= i < first + _SHOWN]
    experts = experts_by_layer(tape.entries)  # the block's tokens are the batch's first
    shown = {layer: [experts[layer][i] for i in kept] for layer in some_layers(list(experts))}
    what = ", with the experts of each subword and its loss" if shown else ", with the loss of each subword"
    note = "The loss is that of the subword itself; its experts computed it when it was read."
    words, losses = [pieces[ids[i]] for i in kept], {"loss in nats": [nll[i - 1] for i in kept]}
    return Words.of_pieces(f"Text {number}{what}", words, shown, largest_number(tape.entries), losses, note)


def write_losses(losses: TokenLosses, pieces: Sequence[str], folder: Path) -> Section:
    """Write ``token_classes.csv`` and ``places.csv``, and return its page section."""
    classes, places = losses.classes(pieces), losses.places()
    write_csv(folder / "token_classes.csv", classes)
    write_csv(folder / "places.csv", places)
    *own, whole = classes
    table = Table(
        "By class of the subword that is foreseen",
        ("class", "tokens", "share, %", "loss, nats", "perplexity", "first, %"),
        tuple(
            (
                row["class"],
                f"{row['tokens']:,}",
                f"{100 * row['share']:.1f}",
                f"{row['loss']:.3f}",
                f"{row['perplexity']:.2f}",
                f"{100 * row['token_accuracy']:.1f}",
            )
            for row in classes
        ),
        note="Frequent subwords are the first quarter of the tokens with letters, rare ones the last.",
    )
    hardest = max(own, key=lambda row: (row["share"] >= _SEEN, row["loss"]))
    bars = BarChart(
        "Loss by class",
        f"{hardest['class'].capitalize()} is hardest, {hardest['loss']:.2f} nats; {whole['loss']:.2f} over all tokens.",
        "class",
        "loss, nats",
        tuple(row["class"] for row in own),
        {"test": tuple(row["loss"] for row in own)},
        line=whole["loss"],
    )
    first, last = places[0], places[-1]
    x = tuple((row["first"] + row["last"]) / 2 for row in places)
    curve = LineChart(
        "Loss by place in the block",
        f"{first['loss']:.2f} nats at the start of a block, and {last['loss']:.2f} at its end.",
        "place in the block",
        "loss, nats",
        (Line("test", x, tuple(row["loss"] for row in places)),),
    )
    return Section("What the model foresees", (table, bars, curve))
