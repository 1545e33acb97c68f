"""``ImageCaptioner``: the module that ``moesaic fit`` trains to caption images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least, check_name
from apps.data.subwords import Subwords
from apps.multimodal.captions.metrics import CaptionMetrics, by_image, num_references, signatures
from apps.multimodal.captions.model import CaptionModel
from apps.multimodal.captions.report import CaptionReport, CaptionReportConfig, image_name
from apps.multimodal.pairs.encoding import PairEncoding
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.search.image_index import tell
from apps.multimodal.search.vectors import FileBatch
from apps.nets.blocks import one_ffn
from apps.nets.config import TransformerConfig
from apps.nets.place import Place
from apps.nlp.decode import Candidate, DecodeConfig, Hypotheses, caption_ids, decoding, in_columns, one_each
from apps.nlp.decode.writing import JudgedModule
from apps.nlp.text.scores import scorer
from apps.nlp.text.teacher_forced import read_ids
from apps.train.publish.model_card import ModelKind
from apps.train.step.distilling import check_one_start
from apps.vision.image_files import scaled
from apps.vision.model import ViTConfig
from apps.vision.pretrained import load_pretrained_weights
from core.convert.read.calls import evaluating

_DECODE = DecodeConfig(max_length_ratio=1.0, max_length_extra=0)
_REPORT = CaptionReportConfig()
_AT_ONCE = 64
"""Images of a prediction that are captioned together."""
Trained = Literal["all", "decoder", "connector", "experts"]


class Captions(NamedTuple):
    """Captions of a batch.

    Attributes:
        index: int64 (B,), places of the images in their folder, or of the pairs in the data.
        image: names of the images, such as their paths.
        caption: the best hypothesis.
        score: float64 (B,), its score in the search.
        reference: the pairs' own texts; None for a folder of images.
        alternatives: the further hypotheses, best first; None where ``decode.num_return_sequences`` asks for none.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    image: list[str]
    caption: list[str]
    score: Tensor
    reference: list[str] | None = None
    alternatives: list[list[str]] | None = None


class ImageCaptioner(JudgedModule):
    """An image encoder and a decoder that writes a text about the image, sparse or dense.

    It is trained by the cross-entropy of each token given the tokens before it, with label smoothing, and evaluated by
    the text that it generates: BLEU and chrF++ of its captions, by sacrebleu, against all texts of the image.

    Args:
        vit: the image encoder.
        transformer: the decoder.
        moe: the MoE layer that replaces the FFN of some blocks, or a list with one for each of them, the encoder's
            first; None: a dense model. The decoder's router must be causal and decode step by step: MoE-LLaVA's hard
            one is ``TokenChoice``, which computes the ``top_k`` best experts; a soft one is ``Dense``, which computes
            all, weighted.
        encoder_moe_blocks, decoder_moe_blocks: which blocks: "everyN" (every N-th), "lastN", "all", "none" or indices.
            Experts in both stacks need stacks of one width.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        image_size: height and width of the images in pixels; the command line takes it from the data.
        in_chans: channels of an image; the command line takes it from the data.
        vocab_size: ids of the texts' subwords; the command line takes it from the data.
        max_tokens: ids of the longest text, start and end among them; the command line takes it from the data.
        encoder_from: weights of the image encoder's dense parts, loaded at the first training or test unless a
            checkpoint provides its own: a checkpoint of a model of the suite with such an encoder, a timm model name,
            or a safetensors or torch file.
        trained: which parameters a training changes: "all"; "decoder", all but the image encoder's; "connector", the
            map between both; "experts", those of the MoE layers, as the last stage of MoE-LLaVA.
        decode: how images of a test and of a prediction are captioned; an image counts as ``max_tokens`` ids in the
            maximal length.
        bleu_tokenize: sacrebleu's tokenizer for BLEU, such as "13a", "zh" or "char".
        report: options of the report that a test adds to the scores; None: nothing.
        kwargs: ``val_decode`` of ``JudgedModule``, ``label_smoothing`` of ``WritingModule``; ``optimizer``,
            ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    model_kind = ModelKind("a captioner of images", 'model.predict(["image.png"])', "image-to-text")
    data_arguments: ClassVar[tuple[str, ...]] = ("image_size", "in_chans", "vocab_size", "max_tokens")
    compiled_networks = ("model.encoder.blocks", "model.decoder")
    reporter = CaptionReport
    side, group = "source", "image_B"

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults_of_none(arguments), "vit": ViTConfig(), "transformer": TransformerConfig()}

    def __init__(
        self,
        vit: ViTConfig | None = None,
        transformer: TransformerConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        encoder_moe_blocks: str | list[int] = "none",
        decoder_moe_blocks: str | list[int] = "every2",
        dense_ffn: core.DenseFFN | None = None,
        image_size: int = 32,
        in_chans: int = 3,
        vocab_size: int = 1000,
        max_tokens: int = 32,
        encoder_from: str | None = None,
        trained: Trained = "all",
        decode: DecodeConfig = _DECODE,
        bleu_tokenize: str = "13a",
        report: CaptionReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        super().__init__(decode=decode, **kwargs)
        check_at_least(3, max_tokens=max_tokens)
        check_name("trained", trained, ["all", "decoder", "connector", "experts"])
        scorer("bleu", bleu_tokenize)
        if encoder_from is not None:
            check_one_start(encoder_from, self.grow, self.distil)
        self.vit, self.transformer, self.moe = vit or ViTConfig(), transformer or TransformerConfig(), moe
        self.image_size, self.in_chans, self.vocab_size, self.max_tokens = image_size, in_chans, vocab_size, max_tokens
        self.encoder_from, self.trained, self.bleu_tokenize, self.report = encoder_from, trained, bleu_tokenize, report
        self.check_length("max_tokens", max_tokens)
        self.model = CaptionModel(
            self.vit,
            self.transformer,
            image_size=image_size,
            in_chans=in_chans,
            vocab=vocab_size,
            ffn=one_ffn(moe, dense_ffn),
            encoder_moe_blocks=encoder_moe_blocks,
            decoder_moe_blocks=decoder_moe_blocks,
        )
        writes = bool(self.model.decoder_moe_blocks)
        self._put_in_place(Place(type(self).__name__, ("token_ids_BS",), is_causal=writes, decodes_stepwise=writes))
        self._hold_still()

    def _hold_still(self) -> None:
        """Freeze the parameters that a training does not change.

        Raises:
            ValueError: ``trained="experts"`` of a model that has none.
        """
        if self.trained == "all":
            return
        of_stage: dict[str, Sequence[nn.Module]] = {
            "decoder": [part for name, part in self.model.named_children() if name != "encoder"],
            "connector": [self.model.connector],
            "experts": list(core.moe_layers(self.model).values()),
        }
        parts = of_stage[self.trained]
        if not parts:
            raise ValueError("trained='experts' leaves nothing to train: the model has no MoE layers")
        self.model.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)

    def forward(self, image: Tensor, text_BL: Tensor) -> Tensor:
        """Map (B, C, H, W) normalized images and (B, L) ids to the (B, L, V) logits of the id after each."""
        return self.model(image, text_BL)

    # ---- the loss

    def hidden(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return self.model.decode(read_ids(batch.text_BL), self.model.encode(batch.image)), batch.text_BL

    def write(self, batch: PairBatch, config: DecodeConfig) -> tuple[Sequence[int], Hypotheses]:
        images = batch.image_B.tolist()
        places = [place for place, number in enumerate(images) if images.index(number) == place]
        return places, self.hypotheses_of(batch.image[places], config, batch.image_B[places])

    def hypotheses_of(
        self, image: Tensor, config: DecodeConfig, index_B: Tensor | None = None, model: CaptionModel | None = None
    ) -> Hypotheses:
        """Return captions of (B, C, H, W) normalized images in ids; ``model`` may be a copy in another dtype."""
        # Out of autocast: in bfloat16 an image's logits would depend on its batch mates.
        with torch.autocast(self.device.type, enabled=False):
            model, surfaces = model or self.model_in(config.dtype), self.how_to_write(config, len(image))["surfaces"]
            return caption_ids(model, image, config, self.max_tokens, index_B, surfaces)

    def references(self, batch: PairBatch) -> list[str]:
        """Return the pairs' texts as the data have them, in lower case if the model reads no other; if the data do not
        give them, decode their subwords."""
        known = getattr(self._data(), "texts", None)
        if known is None:
            return self.subwords.decode(batch.text_BL.tolist(), "source")
        texts = [known[number] for number in batch.caption_B.tolist()]
        return [text.lower() for text in texts] if self.encoding.text.lower_case else texts

    def example_inputs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return (batch.image, read_ids(batch.text_BL))

    def cost_unit(self, batch: PairBatch) -> str:
        _, read_BL = self.cost_inputs(batch)
        return f"an image and {read_BL.shape[1]} tokens"

    # ---- evaluation

    def build_metrics(self) -> CaptionMetrics:
        return CaptionMetrics(self.bleu_tokenize)

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        if self.encoding_state is None:  # before the data are there nothing says whether letter case counts
            return {}
        references = num_references(by_image(self._tested))
        return signatures(self.bleu_tokenize, references, self.encoding.text.lower_case)

    # ---- prediction

    def infer(self, batch: PairBatch) -> Hypotheses:
        return self.hypotheses_of(batch.image, self.decode, batch.index_B)

    def predict_step(self, batch: PairBatch | FileBatch, batch_idx: int) -> Captions:
        """Return the caption of each image of a folder that can be read, or of each pair's."""
        if isinstance(batch, FileBatch):
            tell(batch.complaints)
            image = self.encoding.normalized(batch.pixels, self.device)
            index_B, names, references = torch.tensor(batch.index, dtype=torch.int64), batch.path, None
        else:
            image, index_B, references = batch.image, batch.index_B, self.references(batch)
            names = [image_name(self._data(), number) for number in batch.image_B.tolist()]
        texts, scores_B, further = in_columns(self.spelled(self.hypotheses_of(image, self.decode, index_B)))
        return Captions(
            index_B, names, texts, scores_B, references, further if self.decode.num_return_sequences > 1 else None
        )

    def predict(self, images: Sequence[str | Path | Image.Image | np.ndarray], **options: Any) -> list[str]:
        """Return the caption of each image, by the encoding of the checkpoint.

        Arguments and errors are those of ``candidates``; a ``num_return_sequences`` above 1 is an error too.

        Example::

            model.predict(["shirt.jpg"])      # ['Turtle Check Men Navy Blue Shirt']
        """
        return [best.text for best, *_ in self.candidates(images, **one_each(options))]

    def candidates(
        self, images: Sequence[str | Path | Image.Image | np.ndarray], **decode: Any
    ) -> list[list[Candidate]]:
        """Return the best captions of each image with their scores, best first: ``num_return_sequences`` of them.

        A search may find fewer than it was asked for.

        Args:
            images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.
            decode: fields of `DecodeConfig` that are to differ from the model's, such as ``method="sample"``,
                ``num_beams=8`` or ``temperature=0.7``.

        Raises:
            ValueError: an image that cannot be read, by its name or place; a single image outside a list; an unknown
                option, or a value out of its range; a model whose checkpoint keeps no encoding.
        """
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise ValueError("images must be a list: write predict([image]) for one image")
        config, encoding = decoding(self.decode, decode), self.encoding
        candidates: list[list[Candidate]] = []
        for start in range(0, len(images), _AT_ONCE):
            batch = images[start : start + _AT_ONCE]
            candidates += self.captions_of(scaled(batch, encoding.transform, start), config, start)
        return candidates

    def captions_of(self, pixels: Tensor, config: DecodeConfig, start: int = 0) -> list[list[Candidate]]:
        """Return the best captions of each image with their scores, best first.

        Args:
            pixels: images that ``encoding.transform`` has scaled, uint8 (B, C, S, S).
            config: how to search.
            start: number of the first one, which its random draws depend on.
        """
        numbers = torch.arange(start, start + len(pixels))
        with evaluating(self):
            image = self.encoding.normalized(pixels, self.device)
            return self.spelled(self.hypotheses_of(image, config, numbers))

    @property
    def encoding(self) -> PairEncoding:
        """The texts' subwords and the scaling of pixels: the checkpoint's, else the training data's.

        Raises:
            ValueError: there is neither.
        """
        return self.known_encoding(PairEncoding, "its subwords and the scale of its pixels", "ImageTextData")

    @property
    def subwords(self) -> Subwords:  # type: ignore[override]
        """The subwords of the texts, with whose ids the captions are spelled."""
        subwords = self.encoding.text.subwords
        assert subwords is not None
        return subwords

    # ---- set-up

    def _check_data(self) -> None:
        super()._check_data()
        state = self.encoding_state
        if state is not None and PairEncoding.from_state(state).text.subwords is None:
            raise ValueError(
                "the data's texts are in the word pieces of a sentence encoder, which an ImageCaptioner does not "
                "write: let the data learn subwords from the training texts"
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict":
            self._check_given()
        # Not in the constructor: a trained model does not need the file any more.
        if self.encoder_from is not None and self.starts_afresh:
            load_pretrained_weights(self.model.encoder, self.encoder_from, "encoder_from")
        self.starts_afresh = False

    def _check_given(self) -> None:
        """Reject to predict of anything but images.

        Raises:
            ValueError: the data are given texts, or a search.
        """
        given = getattr(self._data(), "given", None)
        if given is not None and given.is_search:
            raise ValueError("data.query searches images, and an ImageCaptioner describes them: give data.images alone")
        if given is not None and given.predict_file is not None:
            raise ValueError("data.predict_file holds texts, and an ImageCaptioner reads images: give data.images")
