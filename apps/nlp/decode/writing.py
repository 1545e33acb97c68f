"""Bases of the modules whose decoder writes texts: the loss of given texts, the generated texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import core
from apps.base.checks import check_name
from apps.data.subwords import PAD_ID, Side, Subwords
from apps.data.text_files import clean
from apps.nets.config import TransformerConfig
from apps.nets.loss import LogProbs, OutputLogits, TargetScores
from apps.nets.place import Place, check_fits, check_layers
from apps.nlp.decode.candidate import Candidate
from apps.nlp.decode.config import DecodeConfig
from apps.nlp.decode.constraint import Constraint
from apps.nlp.decode.run import in_dtype
from apps.nlp.decode.search import Hypotheses
from apps.nlp.decode.stops import num_begun
from apps.nlp.text.teacher_forced import Judged, of_mean_length, per_sentence
from apps.train.step.module import SparseModule, Stage, TaskOutput

_DECODE = DecodeConfig()


class WritingModule(SparseModule):
    """Base of modules whose decoder writes texts, and can decode in another dtype.

    A subclass's constructor builds ``model`` and calls ``_put_in_place``; it brings ``hidden``.

    Args:
        label_smoothing: share of the target spread evenly over the vocabulary, in training.
        decode: how texts of a test and of a prediction are written.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.

    Attributes:
        side: of the subwords, the texts' side.

    Raises:
        ValueError: a value out of its range.
    """

    model: Any
    subwords: Subwords
    transformer: TransformerConfig
    moe: core.MoEConfig | list[core.MoEConfig] | None
    attention_moe: core.MoEConfig | None = None
    side: ClassVar[Side] = "target"
    readout: ClassVar[tuple[str, ...]] = ("model.output",)
    # A list, so that the copy is not a part of the module; None outside of a pass.
    _copies: list[Any] | None = None

    def __init__(self, *, label_smoothing: float = 0.1, decode: DecodeConfig = _DECODE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1)")
        self.label_smoothing, self.decode = label_smoothing, decode

    def _put_in_place(self, place: Place, decodes_stepwise: bool = False) -> None:
        """Say where the routers work, and reject one that cannot work there.

        Args:
            place: place of the experts that replace FFNs.
            decodes_stepwise: as in ``Place``, for the experts of the decoder's attention.

        Raises:
            ValueError: as ``check_fits`` and ``check_layers``.
        """
        self.place = place
        anywhere = dataclasses.replace(place, is_causal=False, decodes_stepwise=False)
        for moe in self.model.moes:
            check_fits(place if moe in self.model.decoder_moes else anywhere, moe.router, moe.balance)
        if self.attention_moe is not None:
            in_decoder = dataclasses.replace(place, is_causal=True, decodes_stepwise=decodes_stepwise)
            check_fits(in_decoder, self.attention_moe.router, self.attention_moe.balance)
        check_layers(place, self.model)

    def check_length(self, option: str, length: int | None) -> None:
        """Reject sequences that may be longer than a table of learned positions.

        Raises:
            ValueError: naming both lengths.
        """
        config = self.transformer
        if length is not None and config.positions == "learned" and length > config.max_length:
            raise ValueError(
                f"{option}={length} exceeds model.transformer.max_length={config.max_length}, the positions that "
                "positions='learned' knows"
            )

    # ---- the loss

    def hidden(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the decoder's output after each token but the last, (B, L - 1, D), and the targets, int64 (B, L)."""
        raise NotImplementedError

    def distribution(self, batch: Any) -> OutputLogits | LogProbs:
        """Return the logits of the tokens after the first, padding left out."""
        return self.predicted(batch)[0]

    def predicted(self, batch: Any, packed: bool = False) -> tuple[OutputLogits | LogProbs, Tensor]:
        """Return the logits of the tokens after the first, and the targets, int64 (B, L).

        Padding is left out; without ``packed`` it may stay as rows that do not count.
        """
        h_BLD, ids_BL = self.hidden(batch)
        h_BLD = h_BLD * self.transformer.logits_scale
        return OutputLogits.of_real(h_BLD, ids_BL[:, 1:] != PAD_ID, self.model.output_weight, packed), ids_BL

    def task_loss(self, batch: Any) -> TaskOutput:
        """Return the mean cross-entropy of the tokens after the first, padding left out.

        In evaluation it has no label smoothing, and ``outputs`` is the ``TeacherForced`` of each row.
        """
        predicted, ids_BL = self.predicted(batch, packed=not self.training)
        target_BL, real_BL = ids_BL[:, 1:], ids_BL[:, 1:] != PAD_ID
        target_T = target_BL[real_BL] if predicted.real_T is None else target_BL.flatten()
        if self.training:
            loss = predicted.cross_entropy(target_T, self.label_smoothing)
            return TaskOutput(loss, None, None, len(ids_BL), distribution=predicted)
        scores = predicted.scores(target_T)
        loss = scores.nll_T.sum() / max(len(target_T), 1)  # without a token 0, as in training
        return TaskOutput(loss, per_sentence(scores, real_BL), None, len(ids_BL), weight=len(target_T))

    @torch.no_grad()
    def token_scores(self, batch: Any) -> tuple[TargetScores, Tensor]:
        """Return the scores of the T tokens after the first, padding left out, and where they are, bool (B, L - 1)."""
        predicted, ids_BL = self.predicted(batch, packed=True)
        real_BL = ids_BL[:, 1:] != PAD_ID
        return predicted.scores(ids_BL[:, 1:][real_BL]), real_BL

    def cost_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return ``example_inputs`` with each (B, L) of ids cut or filled up with unknown tokens to its mean length:
        experts do not compute padding, dense layers do."""
        return tuple(of_mean_length(x) if x.ndim == 2 else x for x in self.example_inputs(batch))

    # ---- generated text

    def spelled(self, hypotheses: Hypotheses) -> list[list[Candidate]]:
        """Return the texts of hypotheses with their scores."""
        subwords, each = self.subwords, zip(hypotheses.ids, hypotheses.scores, strict=True)
        return [[*map(Candidate, subwords.decode(ids, self.side), scores)] for ids, scores in each]

    def how_to_write(
        self, config: DecodeConfig, num_rows: int, prompt: Sequence[int] = (), *, constraint: Constraint | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments of a search over the ids of texts.

        Args:
            config: how to search.
            num_rows: number of texts.
            prompt: ids that the first text starts with.
            constraint: what each text may be; None: anything.
            tell: called with the first text, from the prompt on, each time it grows, except in a beam search. What may
                become a stop string, or is a part of a character, is not told yet.
        """

        def told(ids: list[int]) -> None:
            text = self.subwords.processor(self.side).decode([*prompt, *ids]).rstrip("\ufffd")
            tell(clean(text[: len(text) - num_begun(text, config.stop_strings)]))  # type: ignore[misc]

        return {
            "constraints": None if constraint is None else [constraint] * num_rows,
            "surfaces": self.subwords.surfaces(self.side) if config.stop_strings else None,
            "tell": None if tell is None else told,
        }

    def model_in(self, dtype: str | None) -> Any:
        """Return the model in a dtype, one copy for a pass; outside of a pass, or for None, as it is."""
        if dtype is None or self._copies is None:
            return self.model
        if not self._copies:
            self._copies.append(in_dtype(self.model, dtype))
        return self._copies[0]

    def _start_pass(self, stage: Stage) -> None:
        super()._start_pass(stage)
        self._copies = []

    def on_validation_epoch_end(self) -> None:
        self._copies = None  # the weights move on
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        self._copies = None
        super().on_test_epoch_end()

    def on_predict_epoch_start(self) -> None:
        self._copies = []

    def on_predict_epoch_end(self) -> None:
        self._copies = None

    def nats_and_tokens(self, outs: Sequence[TaskOutput]) -> tuple[Tensor, Tensor]:
        """Return the nats and the tokens of each row, float64 (N,) both; ``outputs`` are ``TeacherForced``."""
        return (
            torch.cat([out.outputs.nll_B.double() for out in outs]).cpu(),
            torch.cat([out.outputs.tokens_B.double() for out in outs]).cpu(),
        )


class JudgedModule(WritingModule):
    """Base of modules that are evaluated by the text they generate: BLEU and chrF++, by sacrebleu.

    Args:
        val_decode: how texts of a validation are written: "greedy", or "as_test".
        kwargs: of ``WritingModule``.

    Attributes:
        group: field of a batch that numbers what its rows belong to, see ``Judged``.
    """

    group: ClassVar[str]
    monitor: str = "val/bleu"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    shown_metrics: tuple[str, ...] = ("chrf", "token_accuracy", "perplexity")

    def __init__(self, *, val_decode: Literal["greedy", "as_test"] = "greedy", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_name("val_decode", val_decode, ["greedy", "as_test"])
        self.val_decode = val_decode
        self._tested: list[Judged] = []

    def write(self, batch: Any, config: DecodeConfig) -> tuple[Sequence[int], Hypotheses]:
        """Return rows of a batch, and the generated text for each of them; the others have the text of one of them."""
        raise NotImplementedError

    def references(self, batch: Any) -> list[str]:
        """Return the right texts of a batch as the data have them; if they do not, their decoded subwords."""
        raise NotImplementedError

    def judged(self, batch: Any, out: TaskOutput, stage: Stage) -> TaskOutput:
        """Return ``out`` with the batch's ``Judged`` texts as its outputs."""
        greedy = stage == "val" and self.val_decode == "greedy"
        config = dataclasses.replace(self.decode, method="greedy", num_return_sequences=1) if greedy else self.decode
        places, hypotheses = self.write(batch, config)
        written = dict(zip(places, self.subwords.decode(hypotheses.best, self.side), strict=True))
        scores = {place: own[0] for place, own in zip(places, hypotheses.scores, strict=True)}
        index, groups = batch.index_B.tolist(), getattr(batch, self.group).tolist()
        texts = (written.get(place) for place in range(len(index)))
        log_probs = (scores.get(place, 0.0) for place in range(len(index)))
        teacher_forced = (part.tolist() for part in out.outputs)
        rows = zip(index, groups, texts, self.references(batch), log_probs, *teacher_forced, strict=True)
        return dataclasses.replace(out, outputs=[Judged(*row) for row in rows])

    def on_test_epoch_end(self) -> None:
        metrics = self.stage_metrics("test")
        metrics.compute()  # on every rank: it gathers
        self._tested = metrics.pieces
        super().on_test_epoch_end()
