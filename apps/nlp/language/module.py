"""``LanguageModeler``: what ``moesaic fit`` trains on plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

import core
from apps.data.subwords import PAD_ID, Subwords
from apps.equal_cost.comparable import RoutedLayers
from apps.nets.blocks import one_ffn
from apps.nets.config import TransformerConfig
from apps.nets.loss import linear_cross_entropy, target_scores
from apps.nets.place import Place, check_fits, check_layers
from apps.nets.transformer import LanguageModel
from apps.nlp.checks import check_length, check_subwords
from apps.nlp.decode import DecodeConfig, Hypotheses, generate_ids, in_dtype
from apps.nlp.foreseen import gathered, of_mean_length, per_sentence, perplexity, read_ids, token_metrics
from apps.nlp.language.data import TextBatch, TextSize, prompt_batches
from apps.nlp.output import LinePredictor
from apps.nlp.predict import Candidate, Line, check_one, checked_texts, decoding, in_order
from apps.nlp.pretrained import PretrainedModule, check_dense_ffn, published_network
from apps.train.module import OptimizerConfig, Stage, TaskOutput

_LAYERS = "all"
_DECODE = DecodeConfig("sample", top_p=0.9, max_length_ratio=0.0, max_length_extra=64)


class Block(NamedTuple):
    """How well a block of text was foreseen.

    Attributes:
        index: its place in the split.
        nll: negative log likelihood of its tokens, in nats, summed.
        right: tokens that came first.
        tokens: of it.
    """

    index: int  # type: ignore[assignment]  # a block has no use for tuple.index
    nll: float
    right: int
    tokens: int


class Continuations(NamedTuple):
    """What a batch of prompts was continued with.

    Attributes:
        index: int64 (B,), the prompt's number, from 0.
        text: the prompt and what follows it.
        score: float64 (B,), of what follows, in the search.
        alternatives: the further hypotheses, best first, where ``decode.num_best`` asks for them.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    text: list[str]
    score: Tensor
    alternatives: list[list[str]]


class LanguageMetrics(Metric):
    """Perplexity and token accuracy of a text, the same on one process or many.

    ``compute`` returns ``perplexity``, ``exp`` of the mean negative log likelihood of a subword, and
    ``token_accuracy``; where ``size`` tells what the text has, ``word_perplexity``, of a word, and ``bits_per_byte``,
    which compare models of different subwords. These count the document ends with the text, and in a pass over a part
    of the text they take it for an average part.

    Attributes:
        size: of the text; None: it is not known.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.size: TextSize | None = None
        self._own: list[Block] = []

    def update(self, outputs: Iterable[Block], targets: Any = None) -> None:
        """Add the blocks of a batch."""
        self._own.extend(outputs)

    def reset(self) -> None:
        """Forget all blocks."""
        super().reset()
        self._own = []

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all blocks so far, float64 scalars; NaN without any."""
        blocks = gathered(self._own)
        found = token_metrics(blocks)
        if self.size is not None and blocks:
            nll = math.fsum(b.nll for b in blocks) / sum(b.tokens for b in blocks)
            found["word_perplexity"] = perplexity(nll * self.size.tokens / max(self.size.words, 1))
            found["bits_per_byte"] = nll / math.log(2) * self.size.tokens / max(self.size.bytes, 1)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


class LanguageModeler(LinePredictor, PretrainedModule):
    """A decoder alone, sparse or dense, that foresees the next subword of a text.

    Args:
        subwords: of the text; the command line takes them from the data.
        transformer: the network around the MoE layers; of its layers the decoder's count.
        moe: the MoE layer that replaces the FFN of some layers; None: a dense model. Its router must be causal.
        moe_blocks: which layers: "everyN" (every N-th), "lastN", "all", "none" or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: that of the others.
        label_smoothing: share of the target spread evenly over the vocabulary, in training.
        decode: how a prompt is continued in a prediction.
        optimizer: learning rate, weight decay and schedule.
        ema_decay: of the moving average of the weights; None: none.
        average_last: epochs whose weights at their end are averaged at last; None: none.
        pretrained: folder of a published checkpoint, as `apps.porting` reads it: its weights are those with which
            the first training or test begins that no checkpoint gives its own; ``data.tokenizer.path`` takes its
            subwords. Where ``transformer`` is None its network is taken; a given one must be the same, but for dropout.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    data_arguments: ClassVar[tuple[str, ...]] = ("subwords",)
    readout: ClassVar[tuple[str, ...]] = ("model.output",)
    monitor: ClassVar[str] = "val/perplexity"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    shown_metrics = ("word_perplexity", "bits_per_byte", "token_accuracy")

    def __init__(
        self,
        subwords: Subwords | None = None,
        transformer: TransformerConfig | None = None,
        moe: core.MoEConfig | None = None,
        moe_blocks: str | list[int] = _LAYERS,
        dense_ffn: core.DenseFFN | None = None,
        label_smoothing: float = 0.0,
        decode: DecodeConfig = _DECODE,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float | None = None,
        average_last: int | None = None,
        pretrained: str | None = None,
    ) -> None:
        check_dense_ffn(pretrained, dense_ffn)
        if pretrained is not None and transformer is None:
            # Before these are kept for the checkpoint, which is read without the folder.
            published = published_network(pretrained, is_language_model=True)
            transformer, moe = published.transformer, moe or published.moe
            if moe_blocks == _LAYERS:
                moe_blocks = list(published.decoder_moe_blocks) or "none"
        super().__init__(optimizer=optimizer, ema_decay=ema_decay, average_last=average_last)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1)")
        if subwords is None:
            raise ValueError("subwords=None: they come from the data, such as TextData(...).subwords")
        self.subwords, self.transformer = subwords, transformer or TransformerConfig()
        self.pretrained = pretrained
        self.moe, self.moe_blocks = moe, moe_blocks
        self.label_smoothing, self.decode = label_smoothing, decode
        self.model = LanguageModel(
            self.transformer,
            vocab=subwords.size("target"),
            ffn=one_ffn(moe, dense_ffn),
            moe_blocks=moe_blocks,
        )
        self.place = Place(type(self).__name__, ("token_ids_BS",), is_causal=True)
        if moe is not None:
            check_fits(self.place, moe.router, moe.balance)
            check_layers(self.place, self.model)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) ids to (B, L, V) logits of the token after each."""
        return self.model(tokens_BL)

    # ---- the loss

    def task_loss(self, batch: TextBatch) -> TaskOutput:
        """Mean cross-entropy of each block's tokens after its first, padding left out.

        In evaluation without label smoothing; ``outputs`` are ``Block``s.
        """
        said_BL = batch.tokens_BL[:, 1:]
        real_BL = said_BL != PAD_ID
        h_TD = self.model.hidden(read_ids(batch.tokens_BL))[real_BL] * self.transformer.logits_scale
        target_T, weight_VD, B = said_BL[real_BL], self.model.output_weight, len(said_BL)
        if self.training:
            return TaskOutput(linear_cross_entropy(h_TD, weight_VD, target_T, self.label_smoothing), None, None, B)
        scores = target_scores(h_TD, weight_VD, target_T)
        columns = per_sentence(scores, real_BL)
        blocks = [Block(*row) for row in zip(batch.index_B.tolist(), *(c.tolist() for c in columns), strict=True)]
        loss = scores.nll_T.sum() / max(len(target_T), 1)
        return TaskOutput(loss, blocks, None, B, weight=len(target_T))

    def example_inputs(self, batch: TextBatch) -> tuple[Tensor]:
        return (read_ids(batch.tokens_BL),)

    def cost_inputs(self, batch: TextBatch) -> tuple[Tensor]:
        """Return ``example_inputs`` with each block cut or filled up with unknown tokens to the batch's mean length:
        experts do not compute padding, dense layers do."""
        (read_BL,) = self.example_inputs(batch)
        return (of_mean_length(read_BL),)

    def cost_unit(self, batch: TextBatch) -> str:
        (read_BL,) = self.cost_inputs(batch)
        return f"a block of {read_BL.shape[1]} tokens"

    # ---- evaluation

    def build_metrics(self) -> LanguageMetrics:
        """Perplexity by subword and, where the data tells its size, by word, bits per byte, and token accuracy."""
        return LanguageMetrics()

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        size = getattr(self._data(), "size", None)
        self.stage_metrics(stage).size = None if size is None else size(stage)

    # ---- prediction

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Continuations:
        """Each prompt and what follows it."""
        found = self.generate(batch)
        texts = self._texts_of(batch, found)
        return Continuations(
            batch.index_B,
            [best for best, *_ in texts],
            torch.tensor([s[0] for s in found.scores], dtype=torch.float64),
            [further for _, *further in texts],
        )

    def generate(
        self, batch: TextBatch, model: LanguageModel | None = None, config: DecodeConfig | None = None
    ) -> Hypotheses:
        """What follows each prompt, in ids; by ``model``, a copy in another dtype, where it is given."""
        with torch.autocast(self.device.type, enabled=False):
            return generate_ids(model or self.model, batch.tokens_BL, config or self.decode, index_B=batch.index_B)

    def _texts_of(self, batch: TextBatch, found: Hypotheses) -> list[list[str]]:
        """Each prompt with each of its hypotheses, best first."""
        prompts = ([i for i in row if i != PAD_ID] for row in batch.tokens_BL.tolist())
        return [
            self.subwords.decode([[*prompt, *ids] for ids in own], "target")
            for prompt, own in zip(prompts, found.ids, strict=True)
        ]

    def predict(self, prompts: Sequence[str], **decode: Any) -> list[str]:
        """Return each prompt with what follows it, as ``moesaic predict --data.text`` prints it.

        Args:
            prompts: texts that are to be continued; an empty one begins a text.
            decode: fields of `DecodeConfig` that are to differ from the model's, such as ``method="greedy"``,
                ``temperature=0.7``, ``seed=1`` or ``max_length_extra=200``.

        Raises:
            ValueError: one text in place of a list, an item that is no text, an unknown option, a value out of its
                range, or ``num_best`` above 1, which ``candidates`` takes.

        Example::

            model.predict(["And the king said"], max_length_extra=20)
        """
        check_one(decode)
        return [best.text for best, *_ in self.candidates(prompts, **{**decode, "num_best": 1})]

    def candidates(self, prompts: Sequence[str], **decode: Any) -> list[list[Candidate]]:
        """Return each prompt with several continuations and their scores, best first: ``num_best`` of them.

        Arguments and errors are those of ``predict``. A search may find fewer than it was asked for.
        """
        lines, config = checked_texts(prompts), decoding(self.decode, decode)
        return [line.candidates for line in self._lines(prompt_batches(lines, self.subwords), config)]

    def predict_lines(self, data: Any, start: int = 0) -> Iterator[Line] | None:
        """Yield each prompt of ``data.text`` or ``data.predict_file`` with what follows it; see ``LinePredictor``.

        Raises:
            ValueError: data of other subwords.
        """
        if data.text is None and data.predict_file is None:
            return None
        check_subwords(self.subwords, data.subwords)
        self._load_pretrained()
        return self._lines(data.given_batches(start), self.decode, start)

    def _lines(
        self, batches: Iterable[tuple[TextBatch, list[str]]], config: DecodeConfig, start: int = 0
    ) -> Iterator[Line]:
        model: Any = in_dtype(self.model, config.dtype)

        def continued() -> Iterator[tuple[list[int], list[Line]]]:
            for batch, prompts in batches:
                batch = TextBatch(*(side.to(self.device) for side in batch))
                found, index = self.generate(batch, model, config), batch.index_B.tolist()
                rows = zip(index, prompts, self._texts_of(batch, found), found.scores, strict=True)
                yield index, [Line(i, prompt, [*map(Candidate, own, scores)]) for i, prompt, own, scores in rows]

        return in_order(continued(), start)

    # ---- set-up and comparisons

    def _check_data(self) -> None:
        data = self._data()
        check_subwords(self.subwords, getattr(data, "subwords", None))
        check_length(self.transformer, "data.block_size", getattr(data, "block_size", None))

    def routed_layers(self) -> RoutedLayers | None:
        return None if self.moe is None else RoutedLayers(self.moe, self.transformer.shape.dim, self.place)
