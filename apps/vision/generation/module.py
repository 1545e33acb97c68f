"""``ImageGenerator``, the module that ``moesaic fit`` trains to draw images of a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import core
from apps.base.checks import check_at_least
from apps.nets.blocks import moe_configs, one_ffn
from apps.nets.place import Place, check_fits
from apps.train.publish.model_card import ModelKind
from apps.train.step.module import SparseModule, TaskOutput
from apps.vision.encoding import ImageEncoding
from apps.vision.generation.autoencoder import Autoencoder
from apps.vision.generation.data import MOST_AT_ONCE, Wanted, labels_of
from apps.vision.generation.diffusion import (
    NUM_BANDS,
    Process,
    SamplingConfig,
    add_noise,
    check_guidance,
    fixed_noise,
    levels_of,
    sample,
    seeded_noise,
)
from apps.vision.generation.files import ImageFolder, to_image
from apps.vision.generation.metrics import GenerationMetrics
from apps.vision.generation.model import DiT, DiTConfig
from apps.vision.generation.report import GenerationReport, GenerationReportConfig
from core.convert.read.calls import evaluating
from core.fields import Share, check_values

_SAMPLING = SamplingConfig()
_METRICS = GenerationMetrics()
_REPORT = GenerationReportConfig()


class Drawn(NamedTuple):
    """Images of a batch of ``predict``.

    Attributes:
        label: int64 (B,), their class.
        index: int64 (B,), numbers of the images in it.
        pixels: uint8 (B, C, H, W).
    """

    label: Tensor
    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index
    pixels: Tensor


class ImageGenerator(SparseModule):
    """A diffusion transformer, sparse or dense, that draws images of a class.

    Its loss is the mean squared error of the predicted velocity or noise. Validation and test give each image a noise
    and a level that follow from its number, so that equal weights have equal losses.

    Args:
        dit: the transformer.
        moe: the MoE layer that replaces the FFN of some blocks, or a list with one for each of them; None: a dense
            model. Routers know the band of the noise level as a task (10 tasks) and the class as a domain (a domain
            more than classes, for images of no class).
        moe_blocks: which blocks: "everyN", "lastN", "all", or indices.
        dense_ffn: the FFN of those blocks in a dense model, as in the baselines; None: the same as in the others.
        image_size: height and width of the images in pixels; the command line takes it from the data.
        in_chans: channels of an image; the command line takes it from the data.
        num_classes: number of classes; the command line takes it from the data.
        process: "flow", rectified flow, or "ddpm".
        class_dropout: share of the training images whose class is hidden, which guidance needs; 0: none.
        sampling: how ``predict`` and ``test`` sample.
        autoencoder: folder of an autoencoder in diffusers' layout, whose latents are drawn; None: pixels are. The
            folder must stay where it is: checkpoints do not hold its weights.
        metrics: how a test judges drawn images.
        report: options of the report that a test adds to the loss; None: nothing.
        kwargs: ``optimizer``, ``ema_decay``, ``average_last`` and ``grow`` of ``SparseModule``.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    judged_in: str | None = None
    """The features that the last test measured distances in; None: it measured none."""

    reporter = GenerationReport
    model_kind = ModelKind(
        "a generator of images", "model.predict(classes=[0], seed=0)", "unconditional-image-generation"
    )
    data_arguments: ClassVar[tuple[str, ...]] = ("image_size", "in_chans", "num_classes")
    readout: ClassVar[tuple[str, ...]] = ("model.head",)

    @classmethod
    def defaults_of_none(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().defaults_of_none(arguments), "dit": DiTConfig()}

    def __init__(
        self,
        dit: DiTConfig | None = None,
        moe: core.MoEConfig | list[core.MoEConfig] | None = None,
        moe_blocks: str | list[int] = "every2",
        dense_ffn: core.DenseFFN | None = None,
        image_size: int = 28,
        in_chans: int = 1,
        num_classes: int = 10,
        process: Process = "flow",
        class_dropout: float = 0.1,
        sampling: SamplingConfig = _SAMPLING,
        autoencoder: str | None = None,
        metrics: GenerationMetrics = _METRICS,
        report: GenerationReportConfig | None = _REPORT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(1, image_size=image_size, in_chans=in_chans, num_classes=num_classes)
        check_values(Process, process=process)
        check_values(Share, class_dropout=class_dropout)
        self.dit, self.moe, self.process, self.class_dropout = dit or DiTConfig(), moe, process, class_dropout
        self.image_size, self.in_chans, self.num_classes = image_size, in_chans, num_classes
        self.sampling, self.autoencoder, self.metrics, self.report = sampling, autoencoder, metrics, report
        check_guidance(sampling.guidance, self.null_class)
        # In a tuple it is no submodule: a checkpoint would hold its weights, and an optimizer and an average too.
        self._coder: tuple[Autoencoder, ...] = () if autoencoder is None else (Autoencoder.read(autoencoder),)
        if autoencoder is not None:
            self.keep_arguments({"autoencoder": str(Path(autoencoder).expanduser().absolute())})
        for coder in self._coder:
            coder.check(image_size, in_chans)
        size, chans = self.drawn_shape[1], self.drawn_shape[0]
        self.model = DiT(
            self.dit,
            size=size,
            in_chans=chans,
            num_classes=num_classes,
            ffn=one_ffn(moe, dense_ffn),
            moe_blocks=moe_blocks,
        )
        for config in moe_configs(moe):
            check_fits(self.place, config.router, config.balance)

    @property
    def null_class(self) -> int | None:
        """The class number of images of no class; None if the training hides no class."""
        return self.num_classes if self.class_dropout else None

    @property
    def drawn_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network draws: images, or latents."""
        for coder in self._coder:
            size = self.image_size // coder.factor
            return coder.latent_chans, size, size
        return self.in_chans, self.image_size, self.image_size

    def forward(self, image: Tensor, level: Tensor, label: Tensor) -> Tensor:
        """Map noisy images (B, C, H, W), noise levels (B,) and classes (B,) to predictions (B, C, H, W)."""
        return self.model(image, level, label)  # type: ignore[no-any-return]

    # ---- the loss

    def clean(self, image: Tensor) -> Tensor:
        """Return normalized images (B, C, H, W) as the network draws them: themselves, or their latents."""
        for coder in self._coder:
            mean, std = self._channels(image)
            return coder.to(image.device).encode((2 * (image * std + mean) - 1).float()).to(image)
        return image

    def _channels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encoding
        mean, std = (torch.tensor(v, device=image.device).view(-1, 1, 1) for v in (encoding.mean, encoding.std))
        return mean, std

    def task_loss(self, batch: Any) -> TaskOutput:
        """Return the mean squared error of the prediction, over images at random levels, or at the image's own."""
        clean, label = self.clean(batch.image), batch.label
        if self.training:
            share_B = torch.rand(len(clean), device=clean.device).clamp(1e-6, 1 - 1e-6)
            noised = add_noise(self.process, clean, levels_of(self.process, share_B), torch.randn_like(clean))
            hidden_B = torch.rand(len(clean), device=clean.device) < self.class_dropout
            label = torch.where(hidden_B, self.num_classes, label)
        else:
            noised = fixed_noise(self.process, clean, batch.index)
        predicted = self(noised.image, noised.level_B, label)
        loss_B = (predicted.float() - noised.target.float()).square().mean((1, 2, 3))
        return TaskOutput(loss_B.mean(), loss_B, noised.level_B, len(loss_B))

    @property
    def metric_signatures(self) -> Mapping[str, str]:
        names = ("frechet", "precision", "recall")
        return {} if self.judged_in is None else dict.fromkeys(names, f"in {self.judged_in}")

    def example_inputs(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        noised = fixed_noise(self.process, self.clean(batch.image), batch.index)
        return noised.image, noised.level_B, batch.label

    def cost_unit(self, batch: Any) -> str:
        return "an image and step"

    # ---- sampling

    @torch.no_grad()
    def drawn(
        self, wanted: Wanted, config: SamplingConfig, watch: Callable[[float, Tensor], None] | None = None
    ) -> Tensor:
        """Return images, uint8 (B, C, H, W).

        Args:
            wanted: of which class and number, and the seed.
            config: how to sample.
            watch: called before each step with the noise level and the pixels that the network sees in the noise.
        """
        label_B = wanted.label.to(self.device)
        seeds = [(wanted.seed, *pair) for pair in zip(wanted.label.tolist(), wanted.index.tolist(), strict=True)]
        noise = seeded_noise(seeds, self.drawn_shape).to(self.device, self.dtype)
        bounds = None
        if not self._coder:
            mean, std = self._channels(noise)
            bounds = (-mean / std, (1 - mean) / std)
        shown = None if watch is None else lambda level, image: watch(level, self._pixels(image))
        with torch.autocast(self.device.type, enabled=False):  # the command draws what predict() does
            found = sample(self.model, self.process, noise, label_B, config, self.null_class, bounds, shown)
            return self._pixels(found)

    def _pixels(self, image: Tensor) -> Tensor:
        """Return what the network draws as pixels, uint8 (B, C, H, W)."""
        if self._coder:
            share = (self._coder[0].to(image.device).decode(image.float()) + 1) / 2
        else:
            mean, std = self._channels(image)
            share = image.float() * std + mean
        return (share.clamp(0, 1) * 255).round().byte()

    def predict_step(self, batch: Wanted, batch_idx: int) -> Drawn:
        return Drawn(batch.label, batch.index, self.drawn(batch, self.sampling))

    def folder_writer(self, folder: Path, overwrite: bool) -> ImageFolder:
        """Return the callback that writes what ``predict_step`` returns as files of a folder."""
        return ImageFolder(folder, overwrite)

    def predict(
        self, classes: Sequence[str | int] | str | int, number: int = 1, seed: int = 0, **sampling: Any
    ) -> list[Image.Image]:
        """Draw images of classes; equal arguments give equal images, bit for bit, on one machine.

        Args:
            classes: classes, by name or number.
            number: images of each, which come one after the other.
            seed: seed of the noise.
            sampling: fields of ``SamplingConfig`` that are to differ from the model's.

        Raises:
            ValueError: a class that is not known, a value out of its range, a guidance without a null class, or a model
                whose checkpoint keeps no classes.

        Example::

            model.predict(classes=["3", "7"], number=4, seed=0, guidance=2.0)[0].save("three.png")
        """
        check_at_least(1, number=number)
        check_at_least(0, seed=seed)
        config = self.sampling.changed(sampling)
        check_guidance(config.guidance, self.null_class)
        given = [classes] if isinstance(classes, (str, int)) else list(classes)
        images: list[Image.Image] = []
        with evaluating(self):
            for label in labels_of(given, self.encoding.class_names):
                for index in torch.arange(number).split(MOST_AT_ONCE):
                    wanted = Wanted(torch.full_like(index, label), index, seed)
                    images += [to_image(pixels) for pixels in self.drawn(wanted, config)]
        return images

    @property
    def encoding(self) -> ImageEncoding:
        """The classes' names and the scaling of pixels: the checkpoint's, else the training data's.

        Raises:
            ValueError: there is neither.
        """
        return self.known_encoding(ImageEncoding, "its classes and the scale of its pixels", "GenerationData")

    @property
    def place(self) -> Place:
        """The place of the routers, for a check and a comparison."""
        fields = ("token_ids_BS", "task_ids_B", "domain_ids_B")
        return Place(type(self).__name__, fields, num_tasks=NUM_BANDS, num_domains=self.num_classes + 1)
