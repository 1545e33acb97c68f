"""Image datasets for Lightning: digits, MNIST, Fashion-MNIST, CIFAR, ImageNet and any folder of images.

Small datasets are one uint8 tensor in memory and batches are cut out of it by index: a batch costs a few milliseconds
and no worker process is needed. Folders of larger images are decoded by worker processes, one image at a time. Either
way the random transforms then work on the whole batch (`augment`). The order of an epoch and all draws depend on (seed,
epoch, batch) alone: `apps.loader.ResumableLoader` restores them in mid-epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from apps import sources
from apps.loader import ResumableLoader, in_order, overfits
from apps.vision.augment import (
    RANDAUGMENT_BINS,
    BatchRandAugment,
    crop_and_flip,
    mix,
    random_erase,
    random_resized_crop,
)
from apps.vision.datasets import VISION_DATASETS
from apps.vision.readers import (
    FromFiles,
    ImageSet,
    Splits,
    read_image_folder,
    read_unlabelled,
    stratified_split,
)


class ImageBatch(NamedTuple):
    """What a vision model is given.

    Attributes:
        image: float32 (B, C, H, W), normalised to mean 0 and deviation 1 by the dataset's constants.
        label: int64 (B,), or float32 (B, num_classes) with rows that sum to 1 where images are mixed.
        index: int64 (B,), the position of each image in its file or folder listing.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collate:
    """Raw images to an `ImageBatch`: scale, transform at random, normalise, mix. The defaults do nothing at random.

    Attributes as the options of `VisionData` with the same names; it is its own class so that workers can be sent it.
    """

    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    horizontal_flip: bool = False
    random_resized_crop: float | None = None
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __call__(self, raw: tuple[Tensor, Tensor, Tensor]) -> ImageBatch:
        images, labels, index = raw
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = v2.functional.resize(images, [self.image_size, self.image_size], antialias=True)
        if self.random_resized_crop is not None:
            images = random_resized_crop(images, self.random_resized_crop)
        images = crop_and_flip(images, self.crop_padding, self.horizontal_flip)
        if self.randaugment_ops:
            images = BatchRandAugment(self.randaugment_ops, self.randaugment_magnitude, RANDAUGMENT_BINS)(images)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        images = images.float().mul_(1 / (255 * std)).sub_(mean / std)
        if self.random_erasing:
            images = random_erase(images, self.random_erasing)
        if self.mixup_alpha or self.cutmix_alpha:
            images, labels = mix(images, labels, self.num_classes, self.mixup_alpha, self.cutmix_alpha)
        return ImageBatch(images, labels, index)


def _middle_of_strip(image: Tensor) -> Tensor:
    """Cut (C, H, W) to a longer side of at most 8 shorter ones around the centre, which is more than a crop keeps.

    Scaled whole by its shorter side, an image of 12,000 x 2 pixels would take gigabytes.
    """
    height, width = image.shape[-2:]
    most = 8 * min(height, width)
    return (
        image if max(height, width) <= most else v2.functional.center_crop(image, [min(height, most), min(width, most)])
    )


def _grey(image: Tensor) -> Tensor:
    """Uint8 (3, H, W) to (1, H, W). torchvision cuts the fraction off, and grey would come out a level darker."""
    return v2.functional.rgb_to_grayscale(image.float()).round().to(torch.uint8)


class VisionData(LightningDataModule):
    """Images with labels, in train, validation and test batches of `ImageBatch`.

    Args:
        dataset: digits, mnist5k, mnist, fashion_mnist, cifar10, cifar100, imagenet or image_folder (your own).
        root: folder with your own copy, in the dataset's own layout; nothing is downloaded then.
        cache_dir: folder for downloads; default ~/.cache/moesaic.
        batch_size: training images a step and process.
        eval_batch_size: images a step and process in validation and test.
        val_size: training images held out for validation, as a count (5000) or a share (0.1), stratified by class. By
            default the data's own validation split if it has one beside a test split, else a tenth. 0: no validation.
        image_size: scale images to this height and width; default the dataset's own, 224 for folders.
        crop_padding: pad training images by so many black pixels, at image_size, and cut at random. 0: off.
        horizontal_flip: mirror training images left to right with probability 1/2.
        random_resized_crop: cut a box of at least this share of the area at random and scale it up, in (0, 1]; 0.08 is
            usual on ImageNet. Default: off.
        randaugment_ops: operations of RandAugment an image; 2 is usual. 0: off.
        randaugment_magnitude: their strength, 0 to 30.
        random_erasing: probability of blanking a random box.
        mixup_alpha: of mixup's Beta distribution; labels become soft. 0: off.
        cutmix_alpha: of CutMix's Beta distribution; with mixup as well, each batch takes one of the two. 0: off.
        eval_crop: for folders of images: scale to image_size / eval_crop, keep the centre; ImageNet: 0.875.
        mean: of each channel, pixels in [0, 1], for normalising; default the dataset's, ImageNet's for folders.
        std: standard deviation of each channel, likewise.
        drop_last: leave out the last training batch of an epoch if it is not full.
        num_workers: processes that read images. 0 is best for the small datasets, which are in memory.
        subset: use only so many training images, chosen after validation is held out, stratified by class.
        seed: of the order and the random transforms; default the seed of the whole run (seed_everything).
        split_seed: of what is held out and of the subset; its own, so that runs of other seeds have the same images.
        predict_folder: what ``predict`` is of: all images in this folder and those below it, which need no labels.
            Default: the test images.

    Raises:
        ValueError: an unknown dataset (with the nearest name), an option out of its range, a corrupt or missing file.

    Example::

        data = VisionData("fashion_mnist", val_size=5000, crop_padding=2, horizontal_flip=True)
        data.prepare_data()
        data.setup()
        image, label, index = next(iter(data.train_dataloader()))   # (128, 1, 28, 28), (128,), (128,)
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        cache_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        val_size: int | float | None = None,
        image_size: int | None = None,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        random_resized_crop: float | None = None,
        randaugment_ops: int = 0,
        randaugment_magnitude: int = 9,
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        eval_crop: float = 1.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        subset: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        predict_folder: str | None = None,
    ) -> None:
        super().__init__()
        if dataset not in VISION_DATASETS:
            raise ValueError(sources.unknown_name("dataset", dataset, sorted(VISION_DATASETS)))
        spec = VISION_DATASETS[dataset]
        self.dataset, self.root, self.cache_dir = dataset, root, cache_dir
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.subset, self.drop_last = val_size, subset, drop_last
        self.num_workers, self.seed, self.split_seed = num_workers, seed, split_seed
        self.predict_folder = predict_folder
        self.image_size = spec.image_size if image_size is None else image_size
        self.in_chans = spec.in_chans
        self.mean = spec.mean if mean is None else tuple(mean)
        self.std = spec.std if std is None else tuple(std)
        self.eval_crop = eval_crop
        self.random_resized_crop = random_resized_crop
        self._random = {
            "crop_padding": crop_padding,
            "horizontal_flip": horizontal_flip,
            "randaugment_ops": randaugment_ops,
            "randaugment_magnitude": randaugment_magnitude,
            "random_erasing": random_erasing,
            "mixup_alpha": mixup_alpha,
            "cutmix_alpha": cutmix_alpha,
        }
        self._spec = spec
        self._sets: tuple[ImageSet, ImageSet | None, ImageSet] | None = None
        self._predicted: ImageSet | None = None
        self._class_names = spec.class_names
        self._check_options()

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label. Of an image folder: the names of its folders, sorted."""
        if self._class_names is None:
            root = sources.prepare(self.dataset, self.root, self.cache_dir)
            self._class_names = tuple(sorted(p.name for p in (root / "train").iterdir() if p.is_dir()))
        return self._class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare_data(self) -> None:
        sources.prepare(self.dataset, self.root, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        if self._sets is not None or (stage == "predict" and self.predict_folder is not None):
            return
        folder = sources.prepare(self.dataset, self.root, self.cache_dir)
        try:
            splits = self._read(folder)
        except ValueError as error:
            if folder != sources.cache_root(self.cache_dir) / self.dataset:  # the user's own, or a package's
                raise
            raise ValueError(f"{error}; delete it to have it fetched again") from error
        train, val = splits.train, splits.val
        if self.val_size is not None or val is None:
            num_val = self._count_val(len(train))
            held_out, rest = stratified_split(train.labels[train.index], num_val, self.split_seed)
            # of a folder, validation images come without the random crop
            val = ImageSet(self._eval_reader(train.read), train.labels, train.index[held_out]) if num_val else None
            train = train.subset(rest)
        if self.subset is not None:
            if self.subset > len(train):
                raise ValueError(f"subset={self.subset} exceeds the {len(train)} training images")
            train = train.subset(stratified_split(train.labels[train.index], self.subset, self.split_seed)[0])
        self._sets = train, val, splits.test

    def train_dataloader(self) -> ResumableLoader:
        self.setup()
        assert self._sets is not None
        return ResumableLoader(
            self._sets[0],
            self.batch_size,
            seed=self.seed,
            shuffle=not overfits(self.trainer),
            drop_last=self.drop_last,
            collate_fn=self._collate(train=True),  # type: ignore[arg-type]  # __getitems__ stacks
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        self.setup()
        assert self._sets is not None
        return [] if self._sets[1] is None else self._eval_loader(self._sets[1])

    def test_dataloader(self) -> DataLoader[Any]:
        self.setup()
        assert self._sets is not None
        return self._eval_loader(self._sets[2])

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._predict_set())

    def predicted_paths(self, index: Tensor) -> list[str] | None:
        """The files of the images to predict, by their ``index`` (B,); None where they are not files of their own."""
        read = self._predict_set().read
        return [read.paths[i] for i in index.tolist()] if isinstance(read, FromFiles) else None

    def _predict_set(self) -> ImageSet:
        if self.predict_folder is None:
            self.setup()
            assert self._sets is not None
            return self._sets[2]
        if self._predicted is None:
            self._predicted = read_unlabelled(Path(self.predict_folder), self._file_transform(train=False))
        return self._predicted

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """The training images without random transforms, for few-shot evaluation and embeddings."""
        self.setup()
        assert self._sets is not None
        train = self._sets[0]
        return self._eval_loader(ImageSet(self._eval_reader(train.read), train.labels, train.index))

    def _eval_loader(self, images: ImageSet) -> DataLoader[Any]:
        # Files are often sorted by class. Where images compete for experts, each batch must look like the whole.
        return in_order(images.mixed(), self.eval_batch_size, self.num_workers, self._collate(train=False))

    def _collate(self, train: bool) -> Collate:
        random: dict[str, Any] = dict(self._random) if train else {}
        if train and self._spec.read is not None:  # a folder's images are cut as they are decoded
            random["random_resized_crop"] = self.random_resized_crop
        return Collate(self.image_size, self.num_classes, self.mean, self.std, **random)

    def _read(self, root: Path) -> Splits:
        if self._spec.read is not None:
            return self._spec.read(root)
        return read_image_folder(root, self._file_transform(train=True), self._file_transform(train=False))

    def _eval_reader(self, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return FromFiles(read.paths, self._file_transform(train=False)) if isinstance(read, FromFiles) else read

    def _file_transform(self, train: bool) -> v2.Compose:
        size = self.image_size
        if train and self.random_resized_crop is not None:
            cut: list[Any] = [v2.RandomResizedCrop(size, scale=(self.random_resized_crop, 1.0))]
        else:
            scaled = size if train else round(size / self.eval_crop)
            cut = [v2.Lambda(_middle_of_strip), v2.Resize(scaled), v2.CenterCrop(size)]
        if self.in_chans == 1:  # images to predict alone: no dataset of files is grey
            cut.append(v2.Lambda(_grey))
        return v2.Compose(cut)

    def _count_val(self, num_train: int) -> int:
        size = 0.1 if self.val_size is None else self.val_size
        count = round(size * num_train) if isinstance(size, float) else size
        if count >= num_train:
            raise ValueError(f"val_size={size} leaves none of the {num_train} training images to train on")
        return count

    def _check_options(self) -> None:
        positive = ("batch_size", "eval_batch_size", "image_size")
        values = {**vars(self), **self._random}
        for name in (*positive, "subset"):
            if values[name] is not None and values[name] < 1:
                raise ValueError(f"{name}={values[name]} must be at least 1")
        for name in ("crop_padding", "randaugment_ops", "mixup_alpha", "cutmix_alpha", "num_workers"):
            if values[name] < 0:
                raise ValueError(f"{name}={values[name]} must not be negative")
        if isinstance(self.val_size, float) and not 0 <= self.val_size < 1:
            raise ValueError(
                f"val_size={self.val_size} as a share must be at least 0 and below 1; a count is an integer"
            )
        if isinstance(self.val_size, int) and self.val_size < 0:
            raise ValueError(f"val_size={self.val_size} must not be negative")
        if not 0 <= values["randaugment_magnitude"] < RANDAUGMENT_BINS:
            magnitude = values["randaugment_magnitude"]
            raise ValueError(f"randaugment_magnitude={magnitude} must be 0 to {RANDAUGMENT_BINS - 1}")
        if not 0 <= values["random_erasing"] <= 1:
            raise ValueError(f"random_erasing={values['random_erasing']} must be a probability, 0 to 1")
        if self.random_resized_crop is not None and not 0 < self.random_resized_crop <= 1:
            raise ValueError(f"random_resized_crop={self.random_resized_crop} must be above 0 and at most 1")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"eval_crop={self.eval_crop} must be above 0 and at most 1")
        if self.eval_crop != 1 and self._spec.read is not None:
            raise ValueError(f"eval_crop={self.eval_crop} is for folders of images; {self.dataset} is never cropped")
        for name in ("mean", "std"):
            if len(values[name]) != self.in_chans:
                raise ValueError(f"{name}={values[name]} has {len(values[name])} values for {self.in_chans} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be positive")
