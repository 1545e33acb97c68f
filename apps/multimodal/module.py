"""``ImageTextRetriever``, the module that ``moesaic fit`` trains on pairs of an image and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

import core
from apps.base.checks import check_at_least
from apps.multimodal.model import AttributeHead, PairModel
from apps.multimodal.pairs.encoding import PairEncoding
from apps.multimodal.pairs.given import GivenInputs, TextBatch, columns_of
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.report.metrics import KS, PairMetrics, PairOutputs, PairTargets
from apps.multimodal.report.report import PairReport, PairReportConfig
from apps.multimodal.search.search import ImageSearch, MatchedImage, match
from apps.multimodal.search.vectors import FileBatch, encode_images, encode_texts
from apps.multimodal.towers import random_init, two_towers  # noqa: F401  # a configuration names their classes
from apps.multimodal.towers.loss import ContrastiveLoss, SoftmaxLoss, attribute_loss
from apps.multimodal.towers.stack import MODALITIES
from apps.multimodal.towers.towers import SingleTower, Sizes, TowerConfig
from apps.nets.blocks import one_ffn
from apps.nets.place import Place, check_fits, check_layers
from apps.train.publish.model_card import ModelKind
from apps.train.publish.predicting import PredictionStream
from apps.train.step.module import SparseModule, TaskOutput
from core.config.plain import from_plain

_REPORT = PairReportConfig()


class ImageTextRetriever(SparseModule):
    """A sparse or dense model of images and texts, trained to give the image and the text of a pair similar vectors,
    for search in both directions.

    Configs may also be given as mappings, as they are in a run's ``config.yaml``.

    Args:
        image_size, in_chans: of the images; the command line takes them from the data.
        vocab_size, max_tokens: token ids, and tokens of the longest text; from the data too.
        attributes: number of classes of each attribute of the data, by name; the command line takes it from the data.
        tower: ``SingleTower``, one transformer for both modalities (LIMoE), or ``TwoTowers``; None: ``SingleTower()``.
        dim: width of the vectors that are compared.
        moe: the MoE layer that replaces the FFN of some blocks, or a list with one for each of them; None: a dense
            model.
        moe_blocks: which blocks: "lastN" (the last N of every second block), "everyN", "all", or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        loss: ``SoftmaxLoss`` (CLIP) or ``SigmoidLoss`` (SigLIP); None: ``SoftmaxLoss()``.
        attribute_head: predicts the attributes of images too, through a layer of experts with a gate for each of them;
            None: they are not predicted.
        recall_at: cut-off of the recall by which the best checkpoint is chosen and models are compared: 1, 5 or 10.
        grad_checkpointing: recompute the blocks in the backward, to save memory.
        report: options of the report that a test writes besides the metrics; None: nothing.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last`` and ``grow`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, or parts that do not fit together.
    """

    reporter = PairReport
    model_kind = ModelKind(
        "a model of images with texts",
        'model.predict(["image.png"], ["a text", "another text"])',
        "zero-shot-image-classification",
    )
    data_arguments: ClassVar[tuple[str, ...]] = ("image_size", "in_chans", "vocab_size", "max_tokens", "attributes")
    compiled_networks = ("model.towers",)
    readout: ClassVar[tuple[str, ...]] = ("model.image_proj", "model.text_proj", "model.head.outputs")
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    modality_names: ClassVar[tuple[str, ...]] = MODALITIES
    """Names of the modalities in ``context.modality_BS``, for the doctor's findings."""

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults_of_none(arguments), "tower": SingleTower(), "loss": SoftmaxLoss()}

    def __init__(
        self,
        image_size: int = 64,
        in_chans: int = 3,
        vocab_size: int = 4096,
        max_tokens: int = 32,
        attributes: dict[str, int] | None = None,
        tower: TowerConfig | None = None,
        dim: int = 128,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        moe_blocks: str | list[int] = "every2",
        dense_ffn: core.DenseFFN | None = None,
        loss: ContrastiveLoss | None = None,
        attribute_head: AttributeHead | None = None,
        recall_at: int = 10,
        grad_checkpointing: bool = False,
        report: PairReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        tower = from_plain(tower, TowerConfig, "tower")
        loss = from_plain(loss, ContrastiveLoss, "loss")
        attribute_head = from_plain(attribute_head, AttributeHead, "attribute_head")
        super().__init__(**kwargs)
        self.report = from_plain(report, PairReportConfig, "report")
        check_at_least(1, image_size=image_size, in_chans=in_chans, dim=dim)
        check_at_least(2, vocab_size=vocab_size)
        check_at_least(1, max_tokens=max_tokens)
        if recall_at not in KS:
            raise ValueError(f"recall_at={recall_at} is none of {', '.join(map(str, KS))}")
        self.recall_at, self.monitor = recall_at, f"val/recall_{recall_at}"
        self.attributes = dict(attributes or {})
        if attribute_head is not None and not self.attributes:
            raise ValueError("attribute_head predicts the attributes of the data, and the data have none")
        self.image_size, self.in_chans, self.vocab_size, self.max_tokens = image_size, in_chans, vocab_size, max_tokens
        self.tower, self.dim, self.attribute_head = tower or SingleTower(), dim, attribute_head
        self.moe, self.moe_blocks, self.dense_ffn = moe, moe_blocks, dense_ffn
        self.place = Place(type(self).__name__, ("token_ids_BS", "modality_BS"))
        self.model = PairModel(
            self.tower,
            Sizes(image_size, in_chans, vocab_size, max_tokens),
            dim,
            one_ffn(moe, dense_ffn),
            moe_blocks,
            self.attributes,
            attribute_head,
        )
        for config in self.model.towers.moes:
            check_fits(self.place, config.router, config.balance)
        check_layers(self.place, self.model.towers)
        self.model.towers.set_grad_checkpointing(grad_checkpointing)
        self.loss = (loss or SoftmaxLoss()).build()

    def forward(self, image: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the vectors of images and texts, float32 (B, dim) of length 1, and the attributes' logits (B, C).

        Args:
            image: (B, C, H, W), normalized.
            text_BL: int64 (B, L), token ids, 0 for padding, which comes after them.
        """
        return self.model(image, text_BL)

    def image_vectors(self, image: Tensor) -> Tensor:
        """Return the vectors of normalized images (B, C, H, W), float32 (B, dim), of length 1."""
        return self.model.image_vectors(image)

    def text_vectors(self, text_BL: Tensor) -> Tensor:
        """Return the vectors of texts, int64 (B, L) ids, float32 (B, dim), of length 1."""
        return self.model.text_vectors(text_BL)

    # ---- training

    def task_loss(self, batch: PairBatch) -> TaskOutput:
        """Return the contrastive loss of the pairs (in training, of all ranks' pairs) plus the attributes' loss."""
        image_BD, text_BD, logits = self(batch.image, batch.text_BL)
        loss = self.loss(image_BD, text_BD, batch.image_B, batch.caption_B, gather=self.training)
        terms = {"temperature": self.loss.temperature.detach()}
        if self.attribute_head is not None:
            of_attributes = attribute_loss(logits, batch.label_BA)
            terms |= {"contrastive_loss": loss, "attribute_loss": of_attributes}
            loss = loss + self.attribute_head.weight * of_attributes
        label_BA = None if self.attribute_head is None else batch.label_BA
        targets = PairTargets(batch.image_B, batch.caption_B, label_BA)
        return TaskOutput(loss, PairOutputs(image_BD, text_BD, logits), targets, len(image_BD), terms)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.loss.clamp_()

    def example_inputs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return batch.image, batch.text_BL

    def cost_unit(self, batch: PairBatch) -> str:
        return "a pair"

    def build_metrics(self) -> PairMetrics:
        return PairMetrics(attributes=self.attributes if self.attribute_head is not None else None)

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        others = [f"recall_{k}" for k in KS if k != self.recall_at]
        return (*others, *(("macro_f1",) if self.attribute_head is not None else ()))

    # ---- predictions

    def predict_step(self, batch: PairBatch | FileBatch | TextBatch, batch_idx: int) -> dict[str, Any]:
        """Return the vectors of the pairs, images or texts of a batch, next to their names; see ``columns_of``."""
        return columns_of(self, batch, self._data())

    def predict_stream(self, data: Any) -> PredictionStream | None:
        """Return the search of ``data.query`` or ``data.query_image``; None if the data have neither."""
        given: GivenInputs | None = getattr(data, "given", None)
        if given is None or not given.is_search:
            return None
        self._encoding = data.encoding_state  # no trainer gives it to a model that predicts by itself
        return ImageSearch(self, given, data.cache, data.num_workers).stream()

    def encode_image(self, images: Sequence[Any]) -> Tensor:
        """Return a vector of each image, float32 (N, dim) of length 1, on the CPU.

        Images are decoded, scaled and cut as in the model's evaluation.

        Args:
            images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.

        Raises:
            ValueError: an image that cannot be read, by its name or place; one image outside a list, or none; a model
                whose checkpoint keeps no encoding.
        """
        return encode_images(self, images)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return a vector of each text, float32 (N, dim) of length 1, on the CPU.

        Args:
            texts: texts; of a long one the first ``max_tokens`` tokens are read.

        Raises:
            ValueError: an empty text; one text outside a list, or none; a model whose checkpoint keeps no encoding.

        Example::

            model = apps.load("runs/fashion_products")
            model.encode_image(["a.jpg"]) @ model.encode_text(["red summer dress", "blue jeans"]).T     # (1, 2)
        """
        return encode_texts(self, texts)

    def predict(self, images: Sequence[Any], texts: Sequence[str], top: int = 5) -> list[MatchedImage]:
        """Return the texts that fit each image best: classes in words, which no training need have seen.

        With ``SoftmaxLoss`` the probabilities of an image's texts have the sum 1. With ``SigmoidLoss`` each text is
        scored by itself.

        Args:
            images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.
            texts: the classes, such as "a photo of a red dress".
            top: number of texts to name for each image.

        Raises:
            ValueError: as ``encode_image`` and ``encode_text``, a text twice, or ``top`` below 1.

        Example::

            model.predict(["a.jpg"], ["a red dress", "a blue dress"])[0].text     # 'a red dress'
        """
        return match(self, images, texts, top)

    @property
    def encoding(self) -> PairEncoding:
        """How images and texts become the model's input: the checkpoint's, else the training data's.

        Raises:
            ValueError: there is neither.
        """
        return self.known_encoding(PairEncoding, "its subwords and the scale of its pixels", "ImageTextData")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Not in the constructor: a trained model does not need the files any more.
        if self.starts_afresh:
            published = self.model.load_start()
            if published is not None:
                self.loss.begin(published.log_scale, published.bias)
        self.starts_afresh = False
