"""``VisionClassifier``, the module that ``moesaic fit`` trains on images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import core
from apps.nets.blocks import one_ffn
from apps.nets.depths import MixtureOfDepths
from apps.task.outputs import likeliest
from apps.train.publish.model_card import ModelKind
from apps.train.step.distilling import ClassLogits, check_one_start
from apps.train.step.module import SparseModule, TaskOutput
from apps.vision.backbone import TimmConfig, build_backbone
from apps.vision.conv import ConvConfig, ConvNet
from apps.vision.encoding import ImageEncoding
from apps.vision.few_shot import hard_labels
from apps.vision.image_files import scaled
from apps.vision.model import ViTConfig, VMoE
from apps.vision.pretrained import load_pretrained_weights
from apps.vision.report import VisionReport, VisionReportConfig

_REPORT = VisionReportConfig()

_PREDICTED_AT_ONCE = 64


class ImagePrediction(NamedTuple):
    """Predictions of a batch.

    Attributes:
        index: int64 (B,), place of each image in its dataset.
        label: int64 (B, k), the k likeliest classes, best first.
        probability: float32 (B, k), the probabilities of these classes.
        class_name: B lists of k names of these classes; None if the data has none.
        path: B files; None if the images are not files of their own.
        true_label: int64 (B,), the images' own classes; None if they have none.
        true_class_name: B names of these; None if they have none.
    """

    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    label: Tensor
    probability: Tensor
    class_name: list[list[str]] | None = None
    path: list[str] | None = None
    true_label: Tensor | None = None
    true_class_name: list[str] | None = None


@dataclass(frozen=True)
class ClassifiedImage:
    """The classes of one image; ``pandas.DataFrame`` makes a table of a list of them.

    Attributes:
        path: file of the image; None if the image was given itself.
        class_name: name of the likeliest class.
        probability: probability of that class, to 6 places.
        top: probabilities of the likeliest classes by name, best first.
    """

    path: str | None
    class_name: str
    probability: float
    top: dict[str, float]


class VisionClassifier(SparseModule):
    """A vision transformer or a convolutional network, sparse or dense, as an image classifier.

    Args:
        vit: the transformer; None: the one of ``ViTConfig()``, if there is no ``conv``.
        moe: the MoE layer that replaces the FFN of some blocks, or a list with one for each of them; None: a dense
            model.
        moe_blocks: which blocks: "lastN" (V-MoE's Last-N: the last N of every second block), "everyN", "all", or
            indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        depths: gates of the blocks that few tokens enter (Mixture-of-Depths); None: all tokens enter all blocks.
        depth_blocks: which blocks those are, named as in ``moe_blocks``.
        share_experts: all MoE layers have one set of experts, and each its own router (WideNet).
        image_size: height and width of the images in pixels; the command line takes it from the data.
        in_chans: channels of an image; the command line takes it from the data.
        num_classes: number of classes; the command line takes it from the data.
        label_smoothing: share of the target spread evenly over the classes, in training.
        pretrained: weights for the dense parts, loaded at the first training or test unless a checkpoint provides its
            own: a timm model name, or a safetensors or torch file.
        grad_checkpointing: recompute the blocks in the backward, to save memory.
        report: the report that a test adds to the accuracy; None: nothing.
        conv: a convolutional network in place of ``vit``, which learns small images several times as fast. Its blocks
            are its groups of convolutions, of which ``moe_blocks`` end in an FFN a position; without ``moe`` and
            ``dense_ffn`` none does.
        backbone: any classifier of timm in place of ``vit``. Its blocks are its MLPs, in its order.
        flip_at_test: outside training, give the mean of the logits of an image and of its mirror image, which takes
            twice the time: for what ``horizontal_flip`` of the data is for.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last``, ``grow`` and ``distil`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, a combination that cannot be built, or weights that do not load.
    """

    reporter = VisionReport
    model_kind = ModelKind("an image classifier", 'model.predict(["image.png"])', "image-classification")
    data_arguments: ClassVar[tuple[str, ...]] = ("image_size", "in_chans", "num_classes")
    readout: ClassVar[tuple[str, ...]] = ("model.head",)

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        other = arguments.get("conv") is not None or arguments.get("backbone") is not None
        of_vit = {} if other else {"vit": ViTConfig()}
        return {**super().defaults_of_none(arguments), **of_vit}

    monitor: str = "val/top1"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(
        self,
        vit: ViTConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        moe_blocks: str | list[int] = "last2",
        dense_ffn: core.DenseFFN | None = None,
        depths: MixtureOfDepths | None = None,
        depth_blocks: str | list[int] = "every2",
        share_experts: bool = False,
        image_size: int = 28,
        in_chans: int = 1,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        pretrained: str | None = None,
        grad_checkpointing: bool = False,
        report: VisionReportConfig | None = _REPORT,
        conv: ConvConfig | None = None,
        backbone: TimmConfig | None = None,
        flip_at_test: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_one_start(pretrained, self.grow, self.distil)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1)")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2 for a classifier")
        self.vit, self.conv, self.backbone, self.moe, self.moe_blocks = vit, conv, backbone, moe, moe_blocks
        self.image_size, self.in_chans, self.num_classes = image_size, in_chans, num_classes
        self.label_smoothing, self.pretrained, self.report = label_smoothing, pretrained, report
        self.grad_checkpointing, self.flip_at_test = grad_checkpointing, flip_at_test
        shared: dict[str, Any] = {
            **{"image_size": image_size, "in_chans": in_chans, "num_classes": num_classes},
            **{"ffn": one_ffn(moe, dense_ffn), "moe_blocks": moe_blocks, "share_experts": share_experts},
        }
        self.model: Any
        if conv is not None:
            _check_others("conv", vit=vit, backbone=backbone, depths=depths, pretrained=pretrained)
            self.model = ConvNet(conv, **shared)
        elif backbone is not None:
            shares = share_experts or None
            _check_others(
                "backbone", vit=vit, depths=depths, pretrained=pretrained, dense_ffn=dense_ffn, share_experts=shares
            )
            self.model = self._of_timm()
            head = f"model.{self.model.pretrained_cfg['classifier']}"
            self.readout = (head,)  # type: ignore[misc]  # its name depends on the network
        else:
            self.vit = vit or ViTConfig()
            self.model = VMoE(self.vit, **shared, depths=depths, depth_blocks=depth_blocks)
        if grad_checkpointing:
            self.model.set_grad_checkpointing()

    def _of_timm(self, pretrained: bool = False) -> nn.Module:
        assert self.backbone is not None
        shapes = {"image_size": self.image_size, "in_chans": self.in_chans, "num_classes": self.num_classes}
        return build_backbone(self.backbone, self.moe, self.moe_blocks, **shapes, pretrained=pretrained)

    def forward(self, image: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, C, H, W) normalized images to (B, num_classes) logits; routers read ``context``, but not those of a
        backbone, whose layers are called with images alone."""
        options = {} if self.backbone is not None else {"context": context}
        mirrored = self.model(image.flip(-1), **options) if self.flip_at_test and not self.training else None
        logits: Tensor = self.model(image, **options)  # last: a report reads the routing of the image as it is
        return logits if mirrored is None else (logits + mirrored) / 2

    @contextlib.contextmanager
    def as_trained(self) -> Iterator[None]:
        """Inside, no mirror image is classified: to count the FLOPs of training."""
        flips, self.flip_at_test = self.flip_at_test, False
        try:
            yield
        finally:
            self.flip_at_test = flips

    def task_loss(self, batch: Any) -> TaskOutput:
        """Return the cross-entropy against class numbers or, under mixup and cutmix, shares of classes."""
        predicted = self.distribution(batch)
        logits = predicted.logits_NC
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, batch.label, label_smoothing=smoothing)
        return TaskOutput(loss, logits, hard_labels(batch.label), len(logits), distribution=predicted)

    def distribution(self, batch: Any) -> ClassLogits:
        """Return the logits of the images' classes."""
        return ClassLogits(self(batch.image).float())

    def example_inputs(self, batch: Any) -> tuple[Tensor]:
        return (batch.image,)

    def cost_unit(self, batch: Any) -> str:
        return "an image"

    def build_metrics(self) -> MetricCollection:
        """Return top-1 accuracy, and top-5 where there are more than 5 classes."""
        metrics = {"top1": MulticlassAccuracy(self.num_classes, top_k=1, average="micro")}
        if self.num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(self.num_classes, top_k=5, average="micro")
        return MetricCollection(metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> ImagePrediction:
        """Return the 5 likeliest classes of each image, with its file, its own class and the classes' names."""
        best = likeliest(self(batch.image), 5)
        data = self._data()
        known = getattr(data, "class_names", None)
        names = [[str(known[c]) for c in row] for row in best.indices.tolist()] if known else None
        path = data.predicted_paths(batch.index) if hasattr(data, "predicted_paths") else None
        label: Tensor | None = hard_labels(batch.label)
        if label is not None and bool((label < 0).any()):  # images to predict have none
            label = None
        true_names = None if label is None or not known else [str(known[c]) for c in label.tolist()]
        return ImagePrediction(batch.index, best.indices, best.values, names, path, label, true_names)

    @torch.no_grad()
    def predict(self, images: Sequence[str | Path | Image.Image | np.ndarray], top: int = 5) -> list[ClassifiedImage]:
        """Classify images by the encoding of the checkpoint: no data module and no training folder is needed.

        Images are decoded, scaled and cut as in the model's evaluation, and classified 64 at a time.

        Args:
            images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.
            top: number of classes to name for each.

        Raises:
            ValueError: an image that cannot be read, by its name or place; a single image outside a list; ``top`` below
                1; a model whose checkpoint keeps no classes.

        Example::

            model.predict(["a.png"])[0].class_name      # 'cat'
        """
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise ValueError("images must be a list: write predict([image]) for one image")
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        task, encoding = self.task, self.encoding
        classified: list[ClassifiedImage] = []
        for start in range(0, len(images), _PREDICTED_AT_ONCE):
            batch = images[start : start + _PREDICTED_AT_ONCE]
            pixels = scaled(batch, encoding.transform, start)
            for image, shares in zip(batch, task.classify(pixels, top), strict=True):
                name, share = next(iter(shares.items()))
                path = str(image) if isinstance(image, (str, Path)) else None
                classified.append(ClassifiedImage(path, name, share, shares))
        return classified

    @property
    def encoding(self) -> ImageEncoding:
        """The classes' names and the scaling of pixels: the checkpoint's, else the training data's.

        Raises:
            ValueError: there is neither.
        """
        return self.known_encoding(ImageEncoding, "its classes and the scale of its pixels", "VisionData")

    # ---- set-up

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Not in the constructor: a trained model does not need the file any more.
        if self.pretrained is not None and self.starts_afresh:
            load_pretrained_weights(self.model, self.pretrained)
        if self.backbone is not None and self.backbone.pretrained and self.starts_afresh:
            self.model.load_state_dict(self._of_timm(pretrained=True).state_dict())
        self.starts_afresh = False


def _check_others(network: str, **options: Any) -> None:
    """Reject options that are not of this network."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} does not go with {network}: leave one of them out")
