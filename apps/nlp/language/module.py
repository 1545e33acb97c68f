"""``LanguageModeler``: the module that ``moesaic fit`` trains on plain text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

import core
from apps.data.subwords import PAD_ID, Subwords
from apps.nets.blocks import one_ffn
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.place import Place, check_fits
from apps.nets.transformer import LanguageModel
from apps.nets.universal import Universal
from apps.nlp.decode import Candidate, DecodeConfig, Hypotheses, decoding, generate_ids, in_columns, one_each
from apps.nlp.decode.constraint import Constraint
from apps.nlp.language.data import TextBatch, TextSize, prompt_batches
from apps.nlp.language.report import LanguageReport, LanguageReportConfig
from apps.nlp.module import TextModule, published_network
from apps.nlp.predict import checked_texts
from apps.nlp.text.teacher_forced import per_sentence, read_ids
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import Stage, TaskOutput
from apps.train.step.pieces import Block, PieceMetrics, perplexity, token_metrics
from core.convert.read.calls import evaluating

_LAYERS = "all"
_REPORT = LanguageReportConfig()
_DECODE = DecodeConfig("sample", top_p=0.9, max_length_ratio=0.0, max_length_extra=64)


class Continuations(NamedTuple):
    """The continuations of a batch of prompts.

    Attributes:
        index: int64 (B,), the prompt's number, from 0.
        text: the prompt and what follows it.
        score: float64 (B,), of what follows, in the search.
        alternatives: the further hypotheses, best first, where ``decode.num_return_sequences`` asks for them.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    text: list[str]
    score: Tensor
    alternatives: list[list[str]]


class LanguageMetrics(PieceMetrics[Block]):
    """Perplexity and token accuracy of a text, the same on one process or many.

    ``compute`` returns ``perplexity``, ``exp`` of the mean negative log likelihood of a subword, and
    ``token_accuracy``; where ``size`` is known, also ``word_perplexity``, the same per word, and ``bits_per_byte``,
    which compare models of different subwords. These count the document ends with the text, and in a pass over a part
    of the text they take it for an average part.

    Attributes:
        size: amount of text; None: unknown.
        blocks: places of each domain's blocks; where there are some, ``perplexity_<domain>`` is a value too.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.size: TextSize | None = None
        self.blocks: Mapping[str, range] = {}

    def values_of(self, pieces: Sequence[Block]) -> dict[str, float]:
        values = token_metrics(pieces)
        for name, places in self.blocks.items():
            if own := [block for block in pieces if block.index in places]:
                values[f"perplexity_{name}"] = token_metrics(own)["perplexity"]
        if self.size is not None and pieces:
            nll = math.fsum(b.nll for b in pieces) / sum(b.tokens for b in pieces)
            values["word_perplexity"] = perplexity(nll * self.size.tokens / max(self.size.words, 1))
            values["bits_per_byte"] = nll / math.log(2) * self.size.tokens / max(self.size.bytes, 1)
        return values


class LanguageModeler(TextModule):
    """A decoder-only model, sparse or dense, that predicts the next subword of a text.

    Args:
        subwords: of the text; the command line takes them from the data.
        transformer: the network around the MoE layers; of its layers the decoder's count.
        moe: the MoE layer that replaces the FFN of some layers, or a list with one for each of them; None: a dense
            model. Routers must be causal. They see the domain of text that has some (``TextData.domains``).
        moe_blocks: which layers: "everyN" (every N-th), "lastN", "all", "none" or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        depths: gates of the layers that few tokens enter (Mixture-of-Depths), which need ``predictor: true``; None:
            all tokens enter all layers.
        depth_blocks: which layers those are, named as in ``moe_blocks``.
        share_experts: all MoE layers have one set of experts, and each its own router (WideNet).
        universal: one layer for as many steps as ``transformer`` has layers, until a token halts (Sparse Universal
            Transformer); it is the only block that ``moe_blocks`` can name. None: a layer for each.
        label_smoothing: share of the target spread evenly over the vocabulary, in training.
        decode: how a prompt is continued in a prediction.
        pretrained: folder of a published checkpoint, as `apps.porting` reads it: its weights are loaded at the first
            training or test unless a checkpoint provides its own; ``data.tokenizer.path`` takes its subwords. Where
            ``transformer`` is None its network is taken; a given one must be the same, but for dropout.
        report: options of the report that a test writes besides the metrics; None: nothing.
        kwargs: ``attention_moe`` of ``TextModule``; ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and
            ``distil`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    model_kind = ModelKind("a language model", 'model.predict(["the beginning"])', "text-generation")
    data_arguments: ClassVar[tuple[str, ...]] = ("subwords",)
    compiled_networks = ("model.decoder",)
    monitor: str = "val/perplexity"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    reporter = LanguageReport
    shown_metrics = ("word_perplexity", "bits_per_byte", "token_accuracy")

    def __init__(
        self,
        subwords: Subwords | None = None,
        transformer: TransformerConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        moe_blocks: str | list[int] = _LAYERS,
        dense_ffn: core.DenseFFN | None = None,
        depths: MixtureOfDepths | None = None,
        depth_blocks: str | list[int] = "every2",
        share_experts: bool = False,
        label_smoothing: float = 0.0,
        decode: DecodeConfig = _DECODE,
        pretrained: str | None = None,
        universal: Universal | None = None,
        report: LanguageReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        published = published_network(pretrained, transformer, dense_ffn, is_language_model=True)
        if published is not None:  # kept for the checkpoint, which is read without the folder
            transformer, moe = published.transformer, moe or published.moe
            if moe_blocks == _LAYERS:
                moe_blocks = list(published.decoder_moe_blocks) or "none"
        super().__init__(
            subwords=subwords,
            transformer=transformer,
            moe=moe,
            label_smoothing=label_smoothing,
            decode=decode,
            pretrained=pretrained,
            **kwargs,
        )
        if subwords is None:
            return
        self.moe_blocks, self.report = moe_blocks, report
        self.model = LanguageModel(
            self.transformer,
            vocab=self.subwords.size("target"),
            ffn=one_ffn(moe, dense_ffn),
            moe_blocks=moe_blocks,
            depths=depths,
            depth_blocks=depth_blocks,
            attention_moe=self.attention_moe,
            share_experts=share_experts,
            universal=universal,
        )
        self._put_in_place(Place(type(self).__name__, ("token_ids_BS", "domain_ids_B"), is_causal=True))

    def forward(self, tokens_BL: Tensor, domain_ids_B: Tensor | None = None) -> Tensor:
        """Return the logits of the token after each of (B, L) ids, (B, L, V)."""
        return self.model(tokens_BL, None, domain_ids_B)

    # ---- the loss

    def task_loss(self, batch: TextBatch) -> TaskOutput:
        """Return the loss of each block's tokens after its first; in evaluation ``outputs`` are ``Block``s."""
        out = super().task_loss(batch)
        if out.outputs is None:
            return out
        columns = (batch.index_B, *out.outputs)
        blocks = [Block(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        return dataclasses.replace(out, outputs=blocks)

    def nats_and_tokens(self, outs: Sequence[TaskOutput]) -> tuple[Tensor, Tensor]:
        blocks = [block for out in outs for block in out.outputs]
        return (
            torch.tensor([block.nll for block in blocks], dtype=torch.float64),
            torch.tensor([block.tokens for block in blocks], dtype=torch.float64),
        )

    def hidden(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        return self.model.hidden(read_ids(batch.tokens_BL), None, batch.domain_B), batch.tokens_BL

    def example_inputs(self, batch: TextBatch) -> tuple[Tensor, ...]:
        return (read_ids(batch.tokens_BL), *(() if batch.domain_B is None else (batch.domain_B,)))

    def cost_unit(self, batch: TextBatch) -> str:
        read_BL, *_ = self.cost_inputs(batch)
        return f"a block of {read_BL.shape[1]} tokens"

    # ---- evaluation

    def build_metrics(self) -> LanguageMetrics:
        return LanguageMetrics()

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        size = getattr(self._data(), "size", None)
        self.stage_metrics(stage).size = None if size is None else size(stage)
        if getattr(self._data(), "domains", None):
            self.stage_metrics(stage).blocks = self._data().blocks(stage)

    @torch.no_grad()
    def domain_nll(self, batch: TextBatch) -> Tensor | None:
        """Return the nats of each row with only each domain's expert, float64 (B, E); None without ``core.Domain``."""
        configs = [getattr(layer.router, "config", None) for layer in core.moe_layers(self.model).values()]
        E = min((config.num_domains for config in configs if isinstance(config, core.Domain)), default=0)
        alone = (batch._replace(domain_B=torch.full_like(batch.index_B, e)) for e in range(E))
        scores = [per_sentence(*self.token_scores(one)).nll_B for one in alone]
        return torch.stack(scores, 1) if scores else None

    # ---- prediction

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Continuations:
        """Return each prompt with what follows it."""
        return Continuations(batch.index_B, *in_columns(self.candidates_of(batch, self.decode)))

    def candidates_of(
        self, batch: TextBatch, config: DecodeConfig, model: Any = None, **how: Any
    ) -> list[list[Candidate]]:
        """Return each prompt with its continuations, best first."""
        hypotheses = self.hypotheses_of(batch, config, model, **how)
        prompts = ([i for i in row if i != PAD_ID] for row in batch.tokens_BL.tolist())
        return [
            [*map(Candidate, self.subwords.decode([[*prompt, *ids] for ids in own], "target"), scores)]
            for prompt, own, scores in zip(prompts, hypotheses.ids, hypotheses.scores, strict=True)
        ]

    def hypotheses_of(self, batch: TextBatch, config: DecodeConfig, model: Any = None, **how: Any) -> Hypotheses:
        """Return what follows each prompt, in ids; ``model`` may be a copy in another dtype.

        ``how`` is as in ``how_to_write``.
        """
        prompt = [i for i in batch.tokens_BL[0].tolist() if i != PAD_ID]
        how = self.how_to_write(config, len(batch.tokens_BL), prompt, **how)
        with torch.autocast(self.device.type, enabled=False), evaluating(self):
            nll_BE = self.domain_nll(batch)
            weights_BE = None if nll_BE is None else core.domain_posterior(-nll_BE).float()
            return generate_ids(model or self.model, batch.tokens_BL, config, None, weights_BE, batch.index_B, **how)

    def predict(self, prompts: Sequence[str], **decode: Any) -> list[str]:
        """Return each prompt with what follows it, as ``moesaic predict --data.text`` prints it.

        Arguments and errors are those of ``candidates``; a ``num_return_sequences`` above 1 is an error too.

        Example::

            model.predict(["And the king said"], max_length_extra=20)
        """
        return [best.text for best, *_ in self.candidates(prompts, **one_each(decode))]

    def candidates(
        self, prompts: Sequence[str], *, constraint: Constraint | None = None, **decode: Any
    ) -> list[list[Candidate]]:
        """Return each prompt with several continuations and their scores, best first: ``num_return_sequences`` of them.

        A search may find fewer than it was asked for.

        Args:
            prompts: texts that are to be continued; an empty one starts a text.
            constraint: what each continuation may be by itself, such as a ``TrieConstraint``; None: anything.
            decode: fields of `DecodeConfig` that are to differ from the model's, such as ``method="greedy"``,
                ``temperature=0.7``, ``seed=1`` or ``max_length_extra=200``.

        Raises:
            ValueError: one text instead of a list, an item that is not text, an unknown option, or a value out of its
                range.
        """
        lines, config = checked_texts(prompts), decoding(self.decode, decode)
        batches = prompt_batches(lines, self.subwords)
        return [line.candidates for line in self.lines_of(batches, config, constraint=constraint)]

    # ---- set-up

    def _check_data(self) -> None:
        super()._check_data()
        self.check_length("data.block_size", getattr(self._data(), "block_size", None))
        names = getattr(self._data(), "domains", None) or ()
        fields = ("token_ids_BS", "domain_ids_B")[: 1 + bool(names)]
        place = Place(self.place.owner, fields, num_domains=len(names), data=f"the domains {', '.join(names)}")
        for moe in self.model.moes:
            check_fits(place, moe.router, moe.balance)
