"""``PairModule``: the base of the modules that write a text of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import core
from apps.base.checks import check_at_least, check_name
from apps.data.subwords import PAD_ID
from apps.nets.blocks import one_ffn
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Memory
from apps.nets.loss import LogProbs, OutputLogits
from apps.nets.place import Place
from apps.nets.transformer import TranslationModel
from apps.nlp.decode import Candidate, DecodeConfig, Hypotheses, decoding, in_columns, one_each, translate_ids
from apps.nlp.decode.constraint import Constraint
from apps.nlp.decode.writing import JudgedModule
from apps.nlp.module import TextModule, published_network
from apps.nlp.pairs.report import PairReportConfig
from apps.nlp.predict import checked_texts, source_batches
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.teacher_forced import read_ids
from apps.train.step.module import Stage
from apps.train.step.parts import DataPart

_AT_ONCE = 2048
"""Texts that are batched with their neighbors in length: as many as ``predict_lines`` of the data by default."""


class WrittenTexts(NamedTuple):
    """Texts that are written of a batch.

    Attributes:
        index: int64 (B,), as ``TranslationBatch.index_B``.
        group: the task, or the language pair.
        source: as the model read it.
        text: the best hypothesis; empty for an empty line.
        score: float64 (B,), its score in the search; 0 for an empty line.
        alternatives: the further hypotheses, best first, where ``decode.num_return_sequences`` asks for them.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    group: list[str]
    source: list[str]
    text: list[str]
    score: Tensor
    alternatives: list[list[str]]


class PairModule(JudgedModule, TextModule):
    """An encoder-decoder of sources and targets, each of one of several groups: pairs of languages, or tasks.

    A subclass calls ``_build`` at the end of its constructor.

    Args:
        transformer: the network around the MoE layers.
        moe: the MoE layer that replaces the FFN of some layers, or a list with one for each of them, the encoder's
            first; None: a dense model.
        encoder_moe_blocks, decoder_moe_blocks: which layers: "everyN" (every N-th), "lastN", "all", "none" or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        pretrained: folder of a published checkpoint, as `apps.porting` reads it: its weights are loaded at the first
            training or test unless a checkpoint provides its own; ``data.tokenizer.path`` takes its subwords. Where
            ``transformer`` is None its network is taken; a given one must be the same, but for dropout.
        kwargs: ``val_decode`` of ``JudgedModule``; ``decode`` and ``label_smoothing`` of ``WritingModule``;
            ``subwords`` and ``attention_moe`` of ``TextModule``; ``optimizer``, ``ema_decay``, ``average_last``,
            ``grow`` and ``distil`` of ``SparseModule``.

    Attributes:
        noun: a group in messages and reports; ``<noun>s`` are the data's names of all.
        longest_usual: tokens of a source that are read where nothing else is said.
        groups: their names, by number.
    """

    compiled_networks = ("model.encoder", "model.decoder")
    group: ClassVar[str] = "pair_B"
    report: PairReportConfig | None
    noun: ClassVar[str]
    longest_usual: ClassVar[int] = 256
    groups: tuple[str, ...]

    def __init__(
        self,
        *,
        transformer: TransformerConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        encoder_moe_blocks: str | list[int] = "every2",
        decoder_moe_blocks: str | list[int] = "every2",
        dense_ffn: core.DenseFFN | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        published = published_network(pretrained, transformer, dense_ffn, is_language_model=False)
        if published is not None:
            transformer, moe = published.transformer, moe or published.moe
            if encoder_moe_blocks == "every2":
                encoder_moe_blocks = list(published.encoder_moe_blocks) or "none"
            if decoder_moe_blocks == "every2":
                decoder_moe_blocks = list(published.decoder_moe_blocks) or "none"
        super().__init__(transformer=transformer, moe=moe, pretrained=pretrained, **kwargs)
        if published is not None:  # the checkpoint is read without the folder
            blocks = {"encoder_moe_blocks": encoder_moe_blocks, "decoder_moe_blocks": decoder_moe_blocks}
            self.keep_arguments({"transformer": transformer, "moe": moe, **blocks})
        self.encoder_moe_blocks, self.decoder_moe_blocks = encoder_moe_blocks, decoder_moe_blocks
        self.dense_ffn = dense_ffn

    def numbers(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the task and the domain of each group, as routers are told."""
        raise NotImplementedError

    def _build(self, groups: Sequence[str], said: str, copies: bool = False) -> None:
        """Build the network, and reject routers that cannot work in it.

        Args:
            groups: their names.
            said: the groups in a message.
            copies: as in ``TranslationModel``.
        """
        self.groups = tuple(groups)
        task_P, domain_P = self.numbers()
        self.register_buffer("task_P", torch.tensor(task_P), persistent=False)
        self.register_buffer("domain_P", torch.tensor(domain_P), persistent=False)
        self.model = TranslationModel(
            self.transformer,
            source_vocab=self.subwords.size("source"),
            target_vocab=None if self.subwords.is_joint else self.subwords.size("target"),
            ffn=one_ffn(self.moe, self.dense_ffn),
            encoder_moe_blocks=self.encoder_moe_blocks,
            decoder_moe_blocks=self.decoder_moe_blocks,
            attention_moe=self.attention_moe,
            copies=copies,
        )
        self._put_in_place(
            Place(
                type(self).__name__,
                ("token_ids_BS", "task_ids_B", "domain_ids_B"),
                is_causal=bool(self.model.decoder_moe_blocks),
                decodes_stepwise=bool(self.model.decoder_moe_blocks),  # validation writes
                num_tasks=len(set(task_P)),
                num_domains=len(set(domain_P)),
                data=said,
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
        return self._hidden(batch)[0], batch.target_BL

    def _hidden(self, batch: TranslationBatch) -> tuple[Tensor, Memory]:
        memory = self.model.encode(batch.source_BS, *self._ids(batch))
        return self.model.decode(read_ids(batch.target_BL), memory), memory

    def predicted(self, batch: TranslationBatch, packed: bool = False) -> tuple[OutputLogits | LogProbs, Tensor]:
        if self.model.copy_gate is None:
            return super().predicted(batch, packed)
        h_BLD, memory = self._hidden(batch)
        kind, real_BL = self.device.type, batch.target_BL[:, 1:] != PAD_ID
        # An evaluation is in float32 also under autocast, as ``target_scores``.
        with torch.autocast(kind, enabled=self.training and torch.is_autocast_enabled(kind)):
            return LogProbs(self.model.next_logits(h_BLD, memory, real_BL)), batch.target_BL

    def write(self, batch: TranslationBatch, config: DecodeConfig) -> tuple[Sequence[int], Hypotheses]:
        return range(len(batch.index_B)), self.translate(batch, config)

    def translate(
        self, batch: TranslationBatch, config: DecodeConfig, model: TranslationModel | None = None, **how: Any
    ) -> Hypotheses:
        """Return what is written of the batch's sources, in ids; ``model`` may be a copy in another dtype.

        ``how`` is as in ``how_to_write``.
        """
        # Out of autocast: in bfloat16 a sentence's logits would depend on its batch mates.
        with torch.autocast(self.device.type, enabled=False):
            ids, model = self._ids(batch), model or self.model_in(config.dtype)
            if batch.empty_B[:1].any():  # its text is empty, whatever the search finds
                how["tell"] = None
            how = self.how_to_write(config, len(batch.source_BS), **how)
            if how["constraints"] is None:
                how["constraints"] = self.constraints(batch)
            return translate_ids(model, batch.source_BS, config, *ids, batch.index_B, **how)

    def constraints(self, batch: TranslationBatch) -> Sequence[Constraint] | None:
        """Return what the text of each row may be, if the caller does not say; None: anything."""
        return None

    def _ids(self, batch: TranslationBatch) -> tuple[Tensor, Tensor]:
        """Return the tasks and the domains, int64 (B,) each."""
        return self.task_P[batch.pair_B], self.domain_P[batch.pair_B]  # type: ignore[index]

    def references(self, batch: TranslationBatch) -> list[str]:
        if self._references is not None:
            return [self._references[i] for i in batch.index_B.tolist()]
        return self.subwords.decode(batch.target_BL.tolist(), "target")

    def example_inputs(self, batch: TranslationBatch) -> tuple[Tensor, ...]:
        return (batch.source_BS, read_ids(batch.target_BL), *self._ids(batch))

    def tag_of(self, group: int) -> str | None:
        """Return the tag that a group's sources begin with; None: there are no tags."""
        raise NotImplementedError

    def _part(self, name: str, **arguments: Any) -> DataPart:
        """Return one group: its task, and a model of only it, whose constructor has these arguments."""
        check_name(self.noun, name, self.groups)
        place = self.groups.index(name)

        def select(batch: TranslationBatch) -> TranslationBatch | None:
            chosen_B = batch.pair_B == place
            return TranslationBatch(*(rows[chosen_B] for rows in batch)) if bool(chosen_B.any()) else None

        alone = {f"{self.noun}s": (name,), **arguments}
        return DataPart(self.numbers()[0][place], alone, {f"{self.noun}s": [name]}, select)

    def cost_unit(self, batch: TranslationBatch) -> str:
        source_BS, read_BL, *_ = self.cost_inputs(batch)
        return f"a pair of {source_BS.shape[1]} + {read_BL.shape[1]} tokens"

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        references = getattr(self._data(), "references", None)
        self._references = None if references is None else references(stage)

    # ---- prediction

    def infer(self, batch: TranslationBatch) -> Hypotheses:
        return self.translate(batch, self.decode)

    def predict_step(self, batch: TranslationBatch, batch_idx: int) -> WrittenTexts:
        """Return what is written of each source; an empty line stays one."""
        groups, sources = [self.groups[p] for p in batch.pair_B.tolist()], batch.source_BS.tolist()
        columns = in_columns(self.candidates_of(batch, self.decode))
        return WrittenTexts(batch.index_B, groups, self.subwords.decode(sources, "source"), *columns)

    def candidates_of(
        self, batch: TranslationBatch, config: DecodeConfig, model: Any = None, **how: Any
    ) -> list[list[Candidate]]:
        """Return the texts written of each source, best first; an empty line has only an empty text."""
        rows = zip(batch.empty_B.tolist(), self.spelled(self.translate(batch, config, model, **how)), strict=True)
        return [[Candidate("", 0.0)] if empty else candidates for empty, candidates in rows]

    def predict(self, texts: Sequence[str], group: str | None = None, **options: Any) -> list[str]:
        """Return the best text written of each text, as ``moesaic predict --data.text`` prints it.

        Arguments and errors are those of ``candidates``; a ``num_return_sequences`` above 1 is an error too.

        Example::

            model.predict(["Delete the selected person"], num_beams=8)      # ["Die gewählte Person löschen"]
        """
        return [best.text for best, *_ in self.candidates(texts, group, **one_each(options))]

    def candidates(
        self,
        texts: Sequence[str],
        group: str | None = None,
        *,
        max_length: int | None = None,
        tokens_per_batch: int = 4096,
        constraint: Constraint | None = None,
        **decode: Any,
    ) -> list[list[Candidate]]:
        """Return the best texts written of each text with their scores, best first: ``num_return_sequences`` of them.

        A search may find fewer than it was asked for.

        Args:
            texts: the sources; an empty one stays empty.
            group: the language pair, such as "en-de", or the task, also by these names; None: the model's only one.
            max_length: tokens of a source, specials included; a longer one is cut, with a warning. None: 256 of a
                translator, else 512, or the model's limit.
            tokens_per_batch: maximum of texts per batch times the longest one.
            constraint: what each text may be, such as a ``TrieConstraint``; None: anything.
            decode: fields of `DecodeConfig` that are to differ from the model's, such as ``method="sample"``,
                ``num_beams=8`` or ``temperature=0.7``.

        Raises:
            ValueError: one text instead of a list, an item that is not text, an unknown pair, task or option, or a
                value out of its range.

        Example::

            model.candidates(["Delete the selected person"], num_return_sequences=3)[0][0].score    # -0.21
        """
        group = decode.pop(self.noun, group)
        lines, config = checked_texts(texts), decoding(self.decode, decode)
        if group is None and len(self.groups) > 1:
            raise ValueError(f"{self.noun} must name one of {', '.join(self.groups)}")
        if group is not None:
            check_name(self.noun, group, self.groups)
        number = 0 if group is None else self.groups.index(group)
        most = self.longest_source if max_length is None else max_length
        self.check_length("max_length", most)
        check_at_least(4, max_length=most)
        check_at_least(1, tokens_per_batch=tokens_per_batch)
        tag = self.tag_of(number)
        batches = source_batches(lines, self.subwords, number, tag, most, tokens_per_batch, _AT_ONCE)
        return [line.candidates for line in self.lines_of(batches, config, constraint=constraint)]

    @property
    def longest_source(self) -> int:
        """Return the tokens of a source, specials included, after which it is cut by default."""
        learned = self.transformer.max_length if self.transformer.positions == "learned" else self.longest_usual
        return min(self.longest_usual, learned)

    def chunk_of(self, data: Any) -> int:
        return data.predict_lines

    def made_from(self, data: Any) -> dict[str, Any]:
        names = (f"predict_{self.noun}", "predict_lines", "max_length", "eval_tokens_per_batch")
        return {name: getattr(data, name) for name in names}

    # ---- set-up

    def _check_given(self, data: Any) -> None:
        super()._check_given(data)
        self.check_length("data.max_length", getattr(data, "max_length", None))
        groups = getattr(data, f"{self.noun}s", None)
        if groups is not None and tuple(groups) != self.groups:
            raise ValueError(
                f"the model knows the {self.noun}s {', '.join(self.groups)}, which does not fit the data, whose "
                f"{self.noun}s are {', '.join(groups)}"
            )
