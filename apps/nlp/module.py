"""``TextModule``: the base of the modules that write text, and the published checkpoints that they may start with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import core
from apps.data.subwords import Subwords
from apps.nets.config import TransformerConfig
from apps.nlp.decode import Candidate, DecodeConfig, in_dtype
from apps.nlp.decode.writing import WritingModule
from apps.nlp.predict import Line, as_text, identity_of, in_order, num_lines
from apps.porting import Architecture, config_of, load_pretrained_weights, subwords_of
from apps.train.publish.predicting import Prediction, PredictionStream
from apps.train.step.distilling import check_one_start
from core.config.plain import to_plain

log = logging.getLogger(__name__)


class TextModule(WritingModule):
    """A transformer with its subwords, which may start with published weights, and predicts line by line.

    A subclass brings ``candidates_of``, and its docstring describes the arguments.

    Args:
        attention_moe: experts instead of the self-attention of all layers, whose expert is ``core.AttentionExperts``;
            None: there are none.

    Attributes:
        predicts: the name of a line's best candidate in a file.

    Raises:
        ValueError: a value out of its range.
    """

    predicts: ClassVar[str] = "text"

    def __init__(
        self,
        *,
        subwords: Subwords | None,
        transformer: TransformerConfig | None,
        moe: core.MoEConfig | list[core.MoEConfig] | None,
        pretrained: str | None,
        attention_moe: core.MoEConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if subwords is None:
            return self.wait_for_data("subwords")
        check_one_start(pretrained, self.grow, self.distil)
        if pretrained is not None and attention_moe is not None:
            raise ValueError(f"pretrained={pretrained!r} has no weights for the heads of attention_moe")
        self.subwords, self.transformer, self.moe = subwords, transformer or TransformerConfig(), moe
        self.attention_moe, self.pretrained = attention_moe, pretrained

    # ---- predictions of lines

    def candidates_of(self, batch: Any, config: DecodeConfig, model: Any = None, **how: Any) -> list[list[Candidate]]:
        """Return the candidates of each line of a batch, best first.

        Args:
            batch: a batch of lines on the module's device.
            config: how to search.
            model: a copy of ``model`` in another dtype; None: ``model`` itself.
            how: as in ``how_to_write``.
        """
        raise NotImplementedError

    def lines_of(
        self, batches: Iterable[tuple[Any, list[str]]], config: DecodeConfig, start: int = 0, **how: Any
    ) -> Iterator[Line]:
        """Yield the candidates of the lines of ``batches``, each given with its lines; the first line is ``start``."""
        model = in_dtype(self.model, config.dtype)

        def predicted() -> Iterator[tuple[list[int], list[Line]]]:
            for batch, sources in batches:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                numbers = batch.index_B.tolist()
                rows = zip(numbers, sources, self.candidates_of(batch, config, model, **how), strict=True)
                yield numbers, [Line(*row) for row in rows]

        return in_order(predicted(), start)

    def chunk_of(self, data: Any) -> int:
        """Return how many lines are computed together."""
        return 1

    def made_from(self, data: Any) -> dict[str, Any]:
        """Return plain values that a line's candidates depend on, in addition to the weights and ``decode``."""
        return {}

    def predict_stream(self, data: Any) -> PredictionStream | None:
        """Return the predictions of ``data.text`` or ``data.predict_file``; None if the data have neither.

        Nothing is computed before the first line is asked for, and no more than is needed for the next one.

        Raises:
            ValueError: when the first line is asked for, data that do not fit the model.
        """
        if data.text is None and data.predict_file is None:
            return None

        def predictions(start: int, tell: Callable[[str], None] | None = None) -> Iterator[Prediction]:
            self._check_given(data)
            self._load_pretrained()
            batches, how = data.given_batches(start=start), {} if tell is None else {"tell": tell}
            return map(self._prediction, self.lines_of(batches, self.decode, start, **how))

        made_of = {
            "input": identity_of(data),
            "decode": to_plain(self.decode, DecodeConfig),
            "bad_lines": data.bad_lines,
            **to_plain(self.made_from(data)),
        }
        chunk = self.chunk_of(data)
        is_alone = chunk == 1 or (data.text is not None and num_lines(data) == 1)
        return PredictionStream(
            predictions,
            lambda: num_lines(data),
            made_of,
            chunk,
            compatible_values={"bad_lines": "error"},  # a run that takes bad lines for errors has met none so far
            tells=is_alone and self.decode.num_return_sequences == 1,
        )

    def _prediction(self, line: Line) -> Prediction:
        texts, scores = [c.text for c in line.candidates], [c.score for c in line.candidates]
        row = {"index": line.index, "source": line.source, self.predicts: texts[0], "candidates": texts}
        return Prediction(line.index, {**row, "scores": scores}, as_text(line, self.decode.num_return_sequences))

    # ---- the data

    def _check_data(self) -> None:
        self._check_given(self._data())

    def _check_given(self, data: Any) -> None:
        """Reject data whose lines the model cannot read.

        Raises:
            ValueError: naming the digests of both subwords.
        """
        subwords = getattr(data, "subwords", None)
        if subwords is not None and subwords.digest != self.subwords.digest:
            raise ValueError(
                f"the model's subwords have digest {self.subwords.digest}, the data's {subwords.digest}: it would "
                "read other words. Give the data the model's (data.subwords), or train from scratch"
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
            ValueError: the network or the subwords differ from the checkpoint's, or as ``load_pretrained``.
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
    """Return the network of a published checkpoint; None if there is none, or a transformer is given in addition.

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
