"""``TextModule``: the base of the modules that write text, and the published checkpoints that they may begin with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

import core
from apps.data.subwords import PAD_ID, Subwords
from apps.equal_cost.comparable import Baseline, Comparable, ExampleValues, RoutedLayers
from apps.equal_cost.twins import dense_twins
from apps.nets.config import TransformerConfig
from apps.nets.depths import TokenGate
from apps.nets.loss import OutputLogits, TargetScores, target_scores
from apps.nets.place import Place, check_fits, check_layers
from apps.nlp.decode import Candidate, DecodeConfig, in_dtype
from apps.nlp.predict import Line, as_text, identity_of, in_order, num_lines
from apps.nlp.text.foreseen import of_mean_length, ratio_values
from apps.nlp.text.token_loss import token_loss
from apps.porting import Architecture, config_of, load_pretrained_weights, subwords_of
from apps.train.module import SparseModule, TaskOutput, check_one_start
from apps.train.predicting import Prediction, PredictionStream
from core.config.plain import to_plain

log = logging.getLogger(__name__)


class TextModule(SparseModule, Comparable):
    """A transformer with its subwords, which may begin with published weights, and predicts line by line.

    A subclass's constructor builds ``model`` and calls ``_put_in_place``; it brings ``candidates_of``, and its
    docstring says what the arguments are.

    Attributes:
        predicts: the name of a line's best candidate in a file.

    Raises:
        ValueError: a value out of its range.
    """

    model: Any
    predicts: ClassVar[str] = "text"
    readout: ClassVar[tuple[str, ...]] = ("model.output",)

    def __init__(
        self,
        subwords: Subwords | None,
        transformer: TransformerConfig | None,
        moe: core.MoEConfig | list[core.MoEConfig] | None,
        *,
        label_smoothing: float,
        decode: DecodeConfig,
        pretrained: str | None,
        attention_moe: core.MoEConfig | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1)")
        if subwords is None:
            return self.wait_for_data("subwords")
        check_one_start(pretrained, self.grow, self.distil)
        if pretrained is not None and attention_moe is not None:
            raise ValueError(f"pretrained={pretrained!r} has no weights for the heads of attention_moe")
        self.subwords, self.transformer, self.moe = subwords, transformer or TransformerConfig(), moe
        self.attention_moe = attention_moe
        self.label_smoothing, self.decode, self.pretrained = label_smoothing, decode, pretrained

    def _put_in_place(self, place: Place, decodes_stepwise: bool = False) -> None:
        """Say where the routers work, and refuse one that cannot work there.

        Args:
            place: where those in place of FFNs work.
            decodes_stepwise: as in ``Place``, of those of the decoder's attention.

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

    # ---- the loss

    def hidden(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the decoder's output after each token but the last, (B, L - 1, D), and what it was to say, int64
        (B, L)."""
        raise NotImplementedError

    def distribution(self, batch: Any) -> OutputLogits:
        """Return the logits of the tokens after the first, padding left out."""
        return self._distribution(*self.hidden(batch))

    def _distribution(self, h_BLD: Tensor, ids_BL: Tensor, packed: bool = False) -> OutputLogits:
        h_BLD = h_BLD * self.transformer.logits_scale
        return OutputLogits.of_real(h_BLD, ids_BL[:, 1:] != PAD_ID, self.model.output_weight, packed)

    def token_loss(self, batch: Any) -> TaskOutput:
        """Return the mean cross-entropy of the tokens after the first, padding left out.

        In evaluation it has no label smoothing, and ``outputs`` is the ``Foreseen`` of each row.
        """
        h_BLD, ids_BL = self.hidden(batch)
        predicted = self._distribution(h_BLD, ids_BL, packed=not self.training)
        return token_loss(predicted, ids_BL, self.label_smoothing if self.training else None)

    @torch.no_grad()
    def token_scores(self, batch: Any) -> tuple[TargetScores, Tensor]:
        """Return the scores of the T tokens after the first, padding left out, and where they are, bool (B, L - 1)."""
        h_BLD, ids_BL = self.hidden(batch)
        predicted, real_BL = self._distribution(h_BLD, ids_BL, packed=True), ids_BL[:, 1:] != PAD_ID
        return target_scores(predicted.h_TD, predicted.weight_VD, ids_BL[:, 1:][real_BL]), real_BL

    def cost_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return ``example_inputs`` with each (B, L) of ids cut or filled up with unknown tokens to its mean length:
        experts do not compute padding, dense layers do."""
        return tuple(of_mean_length(x) if x.ndim == 2 else x for x in self.example_inputs(batch))

    # ---- predictions of lines

    def candidates_of(self, batch: Any, config: DecodeConfig, model: Any = None) -> list[list[Candidate]]:
        """Return the candidates of each line of a batch, best first.

        Args:
            batch: a batch of lines on the module's device.
            config: how to search.
            model: a copy of ``model`` in another dtype; None: ``model`` itself.
        """
        raise NotImplementedError

    def lines_of(
        self, batches: Iterable[tuple[Any, list[str]]], config: DecodeConfig, start: int = 0
    ) -> Iterator[Line]:
        """Yield the candidates of the lines of ``batches``, each given with its lines; the first line is ``start``."""
        model = in_dtype(self.model, config.dtype)

        def predicted() -> Iterator[tuple[list[int], list[Line]]]:
            for batch, sources in batches:
                batch = type(batch)(*(side.to(self.device) for side in batch))
                numbers = batch.index_B.tolist()
                rows = zip(numbers, sources, self.candidates_of(batch, config, model), strict=True)
                yield numbers, [Line(*row) for row in rows]

        return in_order(predicted(), start)

    def chunk_of(self, data: Any) -> int:
        """Return how many lines are computed together."""
        return 1

    def made_from(self, data: Any) -> dict[str, Any]:
        """Return plain values that a line's candidates depend on, beside the weights and ``decode``."""
        return {}

    def predict_stream(self, data: Any) -> PredictionStream | None:
        """Return the predictions of ``data.text`` or ``data.predict_file``; None where the data have neither.

        Nothing is computed before the first line is asked for, and no more than is needed for the next one.

        Raises:
            ValueError: when the first line is asked for, data that do not fit the model.
        """
        if data.text is None and data.predict_file is None:
            return None

        def predictions(start: int) -> Iterator[Prediction]:
            self._check_given(data)
            self._load_pretrained()
            return map(self._prediction, self.lines_of(data.given_batches(start=start), self.decode, start))

        made_of = {
            "input": identity_of(data),
            "decode": to_plain(self.decode, DecodeConfig),
            "bad_lines": data.bad_lines,
            **to_plain(self.made_from(data)),
        }
        # A run that takes bad lines for errors has met none so far.
        return PredictionStream(
            predictions, lambda: num_lines(data), made_of, self.chunk_of(data), harmless={"bad_lines": "error"}
        )

    def _prediction(self, line: Line) -> Prediction:
        texts, scores = [c.text for c in line.candidates], [c.score for c in line.candidates]
        row = {"index": line.index, "source": line.source, self.predicts: texts[0], "candidates": texts}
        return Prediction(line.index, {**row, "scores": scores}, as_text(line, self.decode.num_best))

    # ---- the data

    def _check_data(self) -> None:
        self._check_given(self._data())

    def _check_given(self, data: Any) -> None:
        """Refuse data whose lines the model cannot read.

        Raises:
            ValueError: naming the digests of both subwords.
        """
        subwords = getattr(data, "subwords", None)
        if subwords is not None and subwords.digest != self.subwords.digest:
            raise ValueError(
                f"the model's subwords have digest {self.subwords.digest}, the data's {subwords.digest}: it would "
                "read other words. Give the data the model's (data.subwords), or train anew"
            )

    def check_length(self, option: str, length: int | None) -> None:
        """Refuse sequences that may be longer than a table of learned positions.

        Raises:
            ValueError: naming both lengths.
        """
        config = self.transformer
        if length is not None and config.positions == "learned" and length > config.max_length:
            raise ValueError(
                f"{option}={length} exceeds model.transformer.max_length={config.max_length}, the positions that "
                "positions='learned' knows"
            )

    # ---- published weights

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        published = arguments.get("pretrained") is not None  # its folder says what the transformer is
        own = {} if published else {"transformer": TransformerConfig()}
        return {**super().defaults_of_none(arguments), **own}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._load_pretrained()

    def _load_pretrained(self) -> None:
        """Give the model the published weights, unless it has others already.

        Raises:
            ValueError: the network or the subwords are not those of the checkpoint, or as ``load_pretrained``.
        """
        # Not in the constructor: a trained model does not need the folder any more.
        if self.pretrained is not None and self.starts_afresh:
            folder, own = published_folder(self.pretrained), self.subwords
            if subwords_of(folder, own.languages).digest != own.digest:
                raise ValueError(
                    f"the data's subwords are not those of pretrained={self.pretrained}, whose words the model would "
                    f"not know: --data.tokenizer.path {self.pretrained} takes them"
                )
            load_pretrained_weights(self.model, folder)
            log.info("the weights are those of %s", self.pretrained)
        self.starts_afresh = False

    # ---- comparisons

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Return the names of the MoE layers in place of FFNs: a comparison leaves attention and gates of blocks."""
        layers = core.moe_layers(self)
        return tuple(n for n, layer in layers.items() if not isinstance(layer, core.AttentionMoE | TokenGate))

    def routed_layers(self) -> RoutedLayers | None:
        if self.moe is None:
            return None
        sharing = len(self.model.moe_blocks) if getattr(self.model, "shares_experts", False) else 1
        return RoutedLayers(self.moe, self.transformer.shape.dim, self.place, num_sharing=sharing)

    def with_moe(self, moe: core.MoEConfig) -> Self:
        if self.pretrained is not None:
            raise ValueError(
                f"pretrained={self.pretrained!r} has the weights of its own experts alone: no others are compared"
            )
        return self.twin(moe=moe, dense_ffn=None)

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the nats a token of the right text: a row's are weighted by its tokens, as a ratio's influence is."""
        return ExampleValues("nats_per_token", ratio_values(*self.nats_and_tokens(outs)), higher_is_better=False)

    def nats_and_tokens(self, outs: Sequence[TaskOutput]) -> tuple[Tensor, Tensor]:
        """Return the nats and the number of tokens of each row, float64 (N,) both; ``outputs`` are ``Foreseen``."""
        return (
            torch.cat([out.outputs.nll_B.double() for out in outs]).cpu(),
            torch.cat([out.outputs.tokens_B.double() for out in outs]).cpu(),
        )

    def baselines(self) -> Mapping[str, Baseline]:
        """Dense models of equal active FLOPs and of equal parameters; only the FFNs in place of experts are wider."""
        twins = dense_twins(self, self.transformer.dense_ffn)
        if self.pretrained is None:
            return twins
        note = f"the weights of pretrained={self.pretrained} are of the sparse model alone"
        return {name: Baseline(None, note) for name in twins}


def published_folder(pretrained: str) -> Path:
    """Return the folder itself.

    Raises:
        ValueError: there is none.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        raise ValueError(f"pretrained={pretrained!r} is no folder here, and nothing is fetched from elsewhere")
    return folder


def published_network(
    pretrained: str | None,
    transformer: TransformerConfig | None,
    dense_ffn: core.DenseFFN | None,
    *,
    is_language_model: bool,
) -> Architecture | None:
    """Return the network of a published checkpoint; None where there is none, or a transformer is given beside it.

    Raises:
        ValueError: it is of another kind, ``dense_ffn`` would give some of its blocks another FFN, or as ``config_of``.
    """
    if pretrained is None:
        return None
    if dense_ffn is not None:
        raise ValueError(f"dense_ffn={dense_ffn} is no FFN of pretrained={pretrained!r}")
    if transformer is not None:
        return None
    published = config_of(published_folder(pretrained))
    if published.is_language_model != is_language_model:
        kinds = ("Translator", "LanguageModeler")
        has, needs = kinds[published.is_language_model], kinds[is_language_model]
        raise ValueError(
            f"pretrained={pretrained!r} holds a {published.model_type}, which {has} trains, and not {needs}"
        )
    return published
