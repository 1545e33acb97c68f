"""``Translator``: the module that ``moesaic fit`` trains on parallel text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import core
from apps.base.checks import check_at_least, check_name
from apps.data.subwords import Subwords
from apps.equal_cost.comparable import ExampleDifference
from apps.nets.blocks import one_ffn
from apps.nets.config import TransformerConfig
from apps.nets.place import Place
from apps.nets.transformer import TranslationModel
from apps.nlp.decode import Candidate, DecodeConfig, Hypotheses, decoding, in_columns, one_each, translate_ids
from apps.nlp.decode.constraint import Constraint
from apps.nlp.decode.writing import JudgedModule
from apps.nlp.module import TextModule, published_network
from apps.nlp.predict import checked_texts, source_batches
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.foreseen import read_ids
from apps.nlp.translation.metrics import TranslationMetrics, bleu_tokenizers, signatures
from apps.nlp.translation.report import TranslationReport, TranslationReportConfig, examples, side_by_side
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import Stage
from apps.train.step.parts import DataPart

_DECODE = DecodeConfig()
_REPORT = TranslationReportConfig()
_LAYERS = "every2"
_AT_ONCE = 2048
"""Texts that are batched with their neighbors in length: as many as ``TranslationData.predict_lines`` by default."""
_LONGEST_SOURCE = 256
"""Tokens of a source that are read where nothing else is said."""
Tasks = Literal["pair", "source", "target"]


class Translations(NamedTuple):
    """Translations of a batch.

    Attributes:
        index: int64 (B,), as ``TranslationBatch.index_B``.
        pair: the language pair, such as "en-de".
        source: as the model read it.
        translation: the best hypothesis; empty for an empty line.
        score: float64 (B,), its score in the search; 0 for an empty line.
        alternatives: the further hypotheses, best first, where ``decode.num_return_sequences`` asks for them.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    pair: list[str]
    source: list[str]
    translation: list[str]
    score: Tensor
    alternatives: list[list[str]]


class Translator(JudgedModule, TextModule):
    """A transformer from one language to another, or from many to many, sparse or dense.

    It is trained by the cross-entropy of each target token given the tokens before it, with label smoothing, and
    evaluated by the text that it generates: BLEU and chrF++ of its translations as text, by sacrebleu, against the
    references as they are. With several pairs ``bleu`` and ``chrf`` are the means over the pairs.

    Args:
        subwords: of both languages; the command line takes them from the data.
        pairs: language pairs, such as "en-de"; the command line takes them from the data.
        transformer: the network around the MoE layers.
        moe: the MoE layer that replaces the FFN of some layers, or a list with one for each of them, the encoder's
            first; None: a dense model.
        encoder_moe_blocks, decoder_moe_blocks: which layers: "everyN" (every N-th), "lastN", "all", "none" or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        tasks: the task id for routers that ask for one: the language "pair", or the "source" or the "target" language.
            The target language is the domain.
        decode: how sentences of tests and predictions are translated.
        bleu_tokenize: sacrebleu's tokenizer for BLEU, "13a", "zh", "char", ..., for all pairs, or by pair; None: by
            target language, as `bleu_tokenizers` says.
        pretrained: folder of a published checkpoint, as `apps.porting` reads it: its weights are loaded at the first
            training or test unless a checkpoint provides its own; ``data.tokenizer.path`` takes its subwords. Where
            ``transformer`` is None its network is taken; a given one must be the same, but for dropout.
        report: options of the report that a test adds to the scores; None: nothing.
        kwargs: ``val_decode`` of ``JudgedModule``, ``label_smoothing`` of ``WritingModule``, ``attention_moe`` of
            ``TextModule``; ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    model_kind = ModelKind("a translation model", 'model.predict(["a sentence"])', "translation")
    data_arguments: ClassVar[tuple[str, ...]] = ("subwords", "pairs")
    compiled_networks = ("model.encoder", "model.decoder")
    reporter = TranslationReport
    group: ClassVar[str] = "pair_B"
    predicts: ClassVar[str] = "translation"

    def __init__(
        self,
        subwords: Subwords | None = None,
        pairs: Sequence[str] = (),
        transformer: TransformerConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        encoder_moe_blocks: str | list[int] = _LAYERS,
        decoder_moe_blocks: str | list[int] = _LAYERS,
        dense_ffn: core.DenseFFN | None = None,
        tasks: Tasks = "pair",
        decode: DecodeConfig = _DECODE,
        bleu_tokenize: str | dict[str, str] | None = None,
        pretrained: str | None = None,
        report: TranslationReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        published = published_network(pretrained, transformer, dense_ffn, is_language_model=False)
        if published is not None:  # kept for the checkpoint, which is read without the folder
            transformer, moe = published.transformer, moe or published.moe
            if encoder_moe_blocks == _LAYERS:
                encoder_moe_blocks = list(published.encoder_moe_blocks) or "none"
            if decoder_moe_blocks == _LAYERS:
                decoder_moe_blocks = list(published.decoder_moe_blocks) or "none"
        super().__init__(
            subwords=subwords, transformer=transformer, moe=moe, decode=decode, pretrained=pretrained, **kwargs
        )
        if subwords is None:
            return
        self.bleu_tokenizers = bleu_tokenizers(pairs, bleu_tokenize)
        self.pairs, self.tasks = tuple(pairs), tasks
        self.encoder_moe_blocks, self.decoder_moe_blocks = encoder_moe_blocks, decoder_moe_blocks
        self.bleu_tokenize, self.report = bleu_tokenize, report
        task_P, domain_P = task_numbers(self.pairs, tasks)
        self.register_buffer("task_P", torch.tensor(task_P), persistent=False)
        self.register_buffer("domain_P", torch.tensor(domain_P), persistent=False)
        self.model = TranslationModel(
            self.transformer,
            source_vocab=self.subwords.size("source"),
            target_vocab=None if self.subwords.is_joint else self.subwords.size("target"),
            ffn=one_ffn(moe, dense_ffn),
            encoder_moe_blocks=encoder_moe_blocks,
            decoder_moe_blocks=decoder_moe_blocks,
            attention_moe=self.attention_moe,
        )
        self._put_in_place(
            Place(
                type(self).__name__,
                ("token_ids_BS", "task_ids_B", "domain_ids_B"),
                is_causal=bool(self.model.decoder_moe_blocks),
                decodes_stepwise=bool(self.model.decoder_moe_blocks),  # validation translates
                num_tasks=len(set(task_P)),
                num_domains=len(set(domain_P)),
                data=f"the pairs {', '.join(self.pairs)} by tasks={tasks!r}",
            ),
            decodes_stepwise=True,
        )
        self._references: list[str] | None = None

    def forward(
        self,
        source_BS: Tensor,
        target_BL: Tensor,
        task_ids_B: Tensor | None = None,
        domain_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the token after each, (B, L, V), for (B, S) source and (B, L) target ids."""
        return self.model(source_BS, target_BL, task_ids_B, domain_ids_B)

    # ---- the loss

    def hidden(self, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
        memory = self.model.encode(batch.source_BS, *self._ids(batch))
        return self.model.decode(read_ids(batch.target_BL), memory), batch.target_BL

    def write(self, batch: TranslationBatch, config: DecodeConfig) -> tuple[Sequence[int], Hypotheses]:
        return range(len(batch.index_B)), self.translate(batch, config)

    def translate(
        self, batch: TranslationBatch, config: DecodeConfig, model: TranslationModel | None = None, **how: Any
    ) -> Hypotheses:
        """Return translations of the batch's sources, in ids; ``model`` may be a copy in another dtype.

        ``how`` is as in ``how_to_write``.
        """
        # Out of autocast: in bfloat16 a sentence's logits would depend on its batch mates.
        with torch.autocast(self.device.type, enabled=False):
            ids, model = self._ids(batch), model or self.model_in(config.dtype)
            how = self.how_to_write(config, len(batch.source_BS), **how)
            return translate_ids(model, batch.source_BS, config, *ids, batch.index_B, **how)

    def _ids(self, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
        """Return the tasks and the domains, int64 (B,) each."""
        return self.task_P[batch.pair_B], self.domain_P[batch.pair_B]  # type: ignore[index]

    def references(self, batch: TranslationBatch) -> list[str]:
        if self._references is not None:
            return [self._references[i] for i in batch.index_B.tolist()]
        return self.subwords.decode(batch.target_BL.tolist(), "target")

    def example_inputs(self, batch: TranslationBatch) -> tuple[Tensor, ...]:
        return (batch.source_BS, read_ids(batch.target_BL), *self._ids(batch))

    def part(self, name: str) -> DataPart:
        """Return one pair of languages: its task, and a translator of only this pair."""
        check_name("pair", name, self.pairs)
        place = self.pairs.index(name)

        def select(batch: TranslationBatch) -> TranslationBatch | None:
            chosen_B = batch.pair_B == place
            return TranslationBatch(*(rows[chosen_B] for rows in batch)) if bool(chosen_B.any()) else None

        alone = {"pairs": (name,), "bleu_tokenize": self.bleu_tokenizers[name]}
        return DataPart(task_numbers(self.pairs, self.tasks)[0][place], alone, {"pairs": [name]}, select)

    def cost_unit(self, batch: TranslationBatch) -> str:
        source_BS, read_BL, *_ = self.cost_inputs(batch)
        return f"a pair of {source_BS.shape[1]} + {read_BL.shape[1]} tokens"

    # ---- evaluation

    def build_metrics(self) -> TranslationMetrics:
        return TranslationMetrics(self.pairs, self.bleu_tokenizers)

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        return signatures(self.bleu_tokenizers)

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        references = getattr(self._data(), "references", None)
        self._references = None if references is None else references(stage)

    # ---- prediction

    def infer(self, batch: TranslationBatch) -> Hypotheses:
        return self.translate(batch, self.decode)

    def predict_step(self, batch: TranslationBatch, batch_idx: int) -> Translations:
        """Return the translation of each source; an empty line stays one."""
        pairs, sources = [self.pairs[p] for p in batch.pair_B.tolist()], batch.source_BS.tolist()
        columns = in_columns(self.candidates_of(batch, self.decode))
        return Translations(batch.index_B, pairs, self.subwords.decode(sources, "source"), *columns)

    def candidates_of(
        self, batch: TranslationBatch, config: DecodeConfig, model: Any = None, **how: Any
    ) -> list[list[Candidate]]:
        """Return the translations of each source, best first; an empty line has only an empty text."""
        rows = zip(batch.empty_B.tolist(), self.spelled(self.translate(batch, config, model, **how)), strict=True)
        return [[Candidate("", 0.0)] if empty else candidates for empty, candidates in rows]

    def predict(self, texts: Sequence[str], pair: str | None = None, **options: Any) -> list[str]:
        """Return the translation of each text, as ``moesaic predict --data.text`` prints it.

        Arguments and errors are those of ``candidates``; a ``num_return_sequences`` above 1 is an error too.

        Example::

            model.predict(["Delete the selected person"], num_beams=8)      # ["Die gewählte Person löschen"]
        """
        return [best.text for best, *_ in self.candidates(texts, pair, **one_each(options))]

    def candidates(
        self,
        texts: Sequence[str],
        pair: str | None = None,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = 4096,
        constraint: Constraint | None = None,
        **decode: Any,
    ) -> list[list[Candidate]]:
        """Return the best translations of each text with their scores, best first: ``num_return_sequences`` of them.

        A search may find fewer than it was asked for.

        Args:
            texts: what to translate, a sentence each; an empty one stays empty.
            pair: such as "en-de"; None: the model's only one.
            max_length: tokens of a source, specials included; a longer one is cut, with a warning. None: 256, or the
                model's limit.
            tokens_per_batch: maximum of sentences per batch times the longest sentence.
            constraint: what each translation may be, such as a ``TrieConstraint``; None: anything.
            decode: fields of `DecodeConfig` that are to differ from the model's, such as ``method="sample"``,
                ``num_beams=8`` or ``temperature=0.7``.

        Raises:
            ValueError: one text instead of a list, an item that is not text, an unknown pair or option, or a value out
                of its range.

        Example::

            model.candidates(["Delete the selected person"], num_return_sequences=3)[0][0].score    # -0.21
        """
        lines, config = checked_texts(texts), decoding(self.decode, decode)
        if pair is None and len(self.pairs) > 1:
            raise ValueError(f"pair must name one of {', '.join(self.pairs)}")
        if pair is not None:
            check_name("pair", pair, self.pairs)
        number = 0 if pair is None else self.pairs.index(pair)
        most = self.longest_source if max_length is None else max_length
        self.check_length("max_length", most)
        check_at_least(4, max_length=most)
        check_at_least(1, tokens_per_batch=tokens_per_batch)
        batches = source_batches(lines, self.subwords, self.pairs, number, most, tokens_per_batch, _AT_ONCE)
        return [line.candidates for line in self.lines_of(batches, config, constraint=constraint)]

    @property
    def longest_source(self) -> int:
        """Return the tokens of a source, specials included, after which it is cut by default."""
        learned = self.transformer.max_length if self.transformer.positions == "learned" else _LONGEST_SOURCE
        return min(_LONGEST_SOURCE, learned)

    def chunk_of(self, data: Any) -> int:
        return data.predict_lines

    def made_from(self, data: Any) -> dict[str, Any]:
        names = ("predict_pair", "predict_lines", "max_length", "eval_tokens_per_batch")
        return {name: getattr(data, name) for name in names}

    # ---- set-up

    def _check_given(self, data: Any) -> None:
        super()._check_given(data)
        self.check_length("data.max_length", getattr(data, "max_length", None))
        pairs = getattr(data, "pairs", None)
        if pairs is not None and tuple(pairs) != self.pairs:
            raise ValueError(
                f"the model translates {', '.join(self.pairs)}, which does not fit the data, whose pairs are "
                f"{', '.join(pairs)}"
            )

    # ---- comparisons

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return each sentence of the last test."""
        data = self._data()
        return examples(self._tested, self.pairs, data.sources("test") if hasattr(data, "sources") else None)

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return BLEU and chrF++ differences by paired bootstrap resampling."""
        from apps.nlp.text.significance import compare_sentences

        return compare_sentences(first, second, self.bleu_tokenizers)

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return sentences at equal steps through the test set, with each system's translation."""
        return side_by_side(systems, 0 if self.report is None else self.report.samples)


def task_numbers(pairs: Sequence[str], tasks: Tasks) -> tuple[list[int], list[int]]:
    """Return the task and the domain of each pair, numbered in the order of their first mention.

    Raises:
        ValueError: no pair, or ``tasks`` is none of its words.
    """
    if not pairs:
        raise ValueError("pairs=[] names no language pair")
    sources, targets = zip(*(pair.split("-") for pair in pairs), strict=True)
    of = {"pair": tuple(pairs), "source": sources, "target": targets}
    check_name("tasks", tasks, [*of])

    def numbers(names: Sequence[str]) -> list[int]:
        known = list(dict.fromkeys(names))
        return [known.index(name) for name in names]

    return numbers(of[tasks]), numbers(targets)
