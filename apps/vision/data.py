"""Image datasets for Lightning: digits, MNIST, Fashion-MNIST, CIFAR, ImageNet and any folder of images.

Small datasets are one uint8 tensor in memory and batches are cut out of it by index: a batch costs a few milliseconds
and no worker process is needed. Folders of larger images are decoded by worker processes, one image at a time. Either
way the random transforms then work on the whole batch (`augment`). The order of an epoch and all draws depend on (seed,
epoch, batch) alone: `apps.data.loader.ResumableLoader` restores them in mid-epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from apps.base.messages import unknown_name
from apps.data.cache import cache_root
from apps.data.datasets import prepare
from apps.data.loader import ResumableLoader, in_order, overfits
from apps.vision.augment import (
    RANDAUGMENT_BINS,
    BatchRandAugment,
    crop_and_flip,
    mix,
    random_erase,
    random_resized_crop,
)
from apps.vision.datasets import VISION_DATASETS
from apps.vision.encoding import ImageEncoding, evaluation_transform, file_transform, middle_of_strip, normalize
from apps.vision.readers import (
    FromFiles,
    ImageSet,
    Splits,
    check_classes,
    class_folders,
    read_image_folder,
    read_unlabelled,
    some,
    stratified_split,
    without_bad_images,
)

log = logging.getLogger(__name__)

_MOST_VAL_IMAGES = 10_000


class ImageBatch(NamedTuple):
    """What a vision model is given.

    Attributes:
        image: float32 (B, C, H, W), normalised to mean 0 and deviation 1 by the dataset's constants.
        label: int64 (B,), -1 where there is none; or float32 (B, num_classes) with rows that sum to 1 where images are
            mixed.
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
        images = normalize(images, self.mean, self.std)
        if self.random_erasing:
            images = random_erase(images, self.random_erasing)
        if self.mixup_alpha or self.cutmix_alpha:
            images, labels = mix(images, labels, self.num_classes, self.mixup_alpha, self.cutmix_alpha)
        return ImageBatch(images, labels, index)


class _Sets(NamedTuple):
    """The images of each split; None: there are none."""

    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet


def _note(text: str) -> None:
    if rank_zero_only.rank == 0:
        log.warning("%s", text)


class VisionData(LightningDataModule):
    """Images with labels, in train, validation and test batches of `ImageBatch`.

    Args:
        dataset: digits, mnist5k, mnist, fashion_mnist, cifar10, cifar100, imagenet or image_folder (your own).
        root: folder with your own copy, in the dataset's own layout; nothing is downloaded then.
        cache_dir: folder for downloads; default ~/.cache/moesaic.
        batch_size: training images a step and process.
        eval_batch_size: images a step and process in validation and test.
        val_size: training images held out for validation, as a count (5000) or a share (0.1), stratified by class. By
            default the data's own validation split if it has one beside a test split, else a tenth, and at most 10,000.
            0: no validation.
        image_size: scale images to this height and width; default the checkpoint's, else the dataset's own, 224 for
            folders.
        crop_padding: pad training images by so many black pixels, at image_size, and cut at random. 0: off.
        horizontal_flip: mirror training images left to right with probability 1/2.
        random_resized_crop: cut a box of at least this share of the area at random and scale it up, in (0, 1]; 0.08 is
            usual on ImageNet. Default: off.
        randaugment_ops: operations of RandAugment an image; 2 is usual. 0: off.
        randaugment_magnitude: their strength, 0 to 30.
        random_erasing: probability of blanking a random box.
        mixup_alpha: of mixup's Beta distribution; labels become soft. 0: off.
        cutmix_alpha: of CutMix's Beta distribution; with mixup as well, each batch takes one of the two. 0: off.
        eval_crop: for folders of images: scale to image_size / eval_crop, keep the centre; ImageNet: 0.875. Default:
            the checkpoint's, else 1.
        mean: of each channel, pixels in [0, 1], for normalising; default the checkpoint's, else the dataset's,
            ImageNet's for folders.
        std: standard deviation of each channel, likewise.
        drop_last: leave out the last training batch of an epoch if it is not full.
        num_workers: processes that read images. 0 is best for the small datasets, which are in memory.
        subset: use only so many training images, chosen after validation is held out, stratified by class.
        seed: of the order and the random transforms; default the seed of the whole run (seed_everything).
        split_seed: of what is held out and of the subset; its own, so that runs of other seeds have the same images.
        predict_folder: what ``predict`` is of: all images in this folder and those below it, which need no labels.
            Default: the test images.
        on_bad_image: what becomes of a file in a folder that cannot be read: "error" ends the run with its name; "skip"
            leaves it out, in training and in all figures, and says how many there were. For this every image is
            decoded once before the first pass over it, by ``num_workers`` threads.

    A checkpoint keeps the names of the classes and what becomes of pixels in evaluation. Data that ``adopt`` it number
    the classes of a folder by these names.

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
        eval_crop: float | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        subset: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        predict_folder: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if dataset not in VISION_DATASETS:
            raise ValueError(unknown_name("dataset", dataset, sorted(VISION_DATASETS)))
        spec = VISION_DATASETS[dataset]
        self.dataset, self.root, self.cache_dir = dataset, root, cache_dir
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_size, self.subset, self.drop_last = val_size, subset, drop_last
        self.num_workers, self.seed, self.split_seed = num_workers, seed, split_seed
        self.predict_folder, self.on_bad_image = predict_folder, on_bad_image
        self._written = {
            "image_size": image_size,
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
            "eval_crop": eval_crop,
        }
        self.image_size = spec.image_size if image_size is None else image_size
        self.in_chans = spec.in_chans
        self.mean = spec.mean if mean is None else tuple(mean)
        self.std = spec.std if std is None else tuple(std)
        self.eval_crop = 1.0 if eval_crop is None else eval_crop
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
        self._sets: _Sets | None = None
        self._lacking: list[str] = []
        self._told: set[str] = set()
        self._predicted: ImageSet | None = None
        self._class_names = spec.class_names
        self._adopted: ImageEncoding | None = None
        self._check_options()

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label: those of the checkpoint, else of the dataset; for a folder of images its folders' names, sorted."""
        if self._class_names is None:
            self._class_names = class_folders(prepare(self.dataset, self.root, self.cache_dir) / "train")
        return self._class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def encoding(self) -> ImageEncoding:
        """The classes, and what becomes of pixels in evaluation."""
        return ImageEncoding(
            self.class_names, self.image_size, self.in_chans, tuple(self.mean), tuple(self.std), self.eval_crop
        )

    @property
    def encoding_state(self) -> dict[str, Any]:
        """The ``encoding`` as plain values, for a checkpoint."""
        return self.encoding.state()

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        """Number classes and scale images as a checkpoint says that keeps this ``encoding_state``.

        Raises:
            ValueError: an option that was given says otherwise.
        """
        given = ImageEncoding.from_state(encoding_state)
        for name, value in self._written.items():
            if value is not None and value != getattr(given, name):
                raise ValueError(
                    f"data.{name}={value} is not the checkpoint's, whose images have {name}={getattr(given, name)}: "
                    "leave it out"
                )
        if given == self._adopted:
            return
        if self._sets is not None and given != self.encoding:
            self._sets = None  # they were read by other classes or sizes
            self._told.clear()
        self._predicted = None
        self._adopted, self._class_names = given, given.class_names
        self.image_size, self.in_chans, self.eval_crop = given.image_size, given.in_chans, given.eval_crop
        self.mean, self.std = given.mean, given.std

    def prepare_data(self) -> None:
        if self._adopted is not None and (self.predict_folder is not None or self._spec.read is None):
            return  # images to predict need no dataset, and a folder of files is not fetched: setup asks for the rest
        prepare(self.dataset, self.root, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and self.predict_folder is not None:
            return
        if self._sets is None:
            self._sets = self._read_sets(training=stage == "fit")
        if stage == "fit":
            self._check_training()

    def _read_sets(self, training: bool) -> _Sets:
        folder = self._folder(training)
        try:
            splits = self._read(folder)
        except ValueError as error:
            if folder != cache_root(self.cache_dir) / self.dataset:  # the user's own, or a package's
                raise
            raise ValueError(f"{error}; delete it to have it fetched again") from error
        splits = self._numbered(splits)
        train, val = splits.train, splits.val
        # Of all training images: a small subset may well lack a class.
        self._lacking = [] if train is None else self._without_images(train)
        if train is not None and (self.val_size is not None or val is None):
            num_val = self._count_val(len(train))
            held_out, rest = stratified_split(train.labels[train.index], num_val, self.split_seed)
            # of a folder, validation images come without the random crop
            val = ImageSet(self._eval_reader(train.read), train.labels, train.index[held_out]) if num_val else None
            train = train.subset(rest)
        if train is not None and self.subset is not None:
            if self.subset > len(train):
                raise ValueError(f"subset={self.subset} exceeds the {len(train)} training images")
            train = train.subset(stratified_split(train.labels[train.index], self.subset, self.split_seed)[0])
        return _Sets(train, val, splits.test)

    def _folder(self, training: bool) -> Path:
        """Where the dataset lies. To evaluate a checkpoint, a folder of images needs no training images."""
        if self._adopted is not None and not training and self._spec.read is None and self.root is not None:
            folder = Path(self.root).expanduser()
            if not (folder / "train").is_dir() and any((folder / split).is_dir() for split in ("test", "val")):
                return folder
        return prepare(self.dataset, self.root, self.cache_dir)

    def _check_training(self) -> None:
        """Refuse to go on with a training without images of a class that the checkpoint knows."""
        assert self._sets is not None
        if self._sets.train is None:
            prepare(self.dataset, self.root, self.cache_dir)  # which says what is missing
            self._sets = None  # it has come since
            return self.setup("fit")
        if self._adopted is not None and self._lacking:
            raise ValueError(
                f"the training images have none of {some(self._lacking)}, which the checkpoint was trained on"
            )

    def _without_images(self, images: ImageSet) -> list[str]:
        """The classes that a split has no image of."""
        counts = torch.bincount(images.labels[images.index], minlength=self.num_classes)
        return [self.class_names[label] for label in (counts == 0).nonzero().squeeze(1).tolist()]

    def _split(self, split: Literal["train", "val", "test"]) -> ImageSet | None:
        """The images of a split: on_bad_image=skip has taken bad ones out, and a note names classes without any."""
        self.setup()
        assert self._sets is not None
        images = getattr(self._sets, split)
        if images is None or split in self._told:
            return images
        if self.on_bad_image == "skip":
            images = self._readable(images, f"{split} images")
            self._sets = self._sets._replace(**{split: images})
        self._told.add(split)
        if split == "test" and self._adopted is not None and (lacking := self._without_images(images)):
            _note(f"the test images have none of {some(lacking)}: the figures are of the other classes")
        return images

    def _readable(self, images: ImageSet, what: str) -> ImageSet:
        kept, complaints = without_bad_images(images, max(1, self.num_workers))
        if not len(kept):
            raise ValueError(f"none of the {len(images):,} {what} can be read: {complaints[0]}")
        if complaints:
            _note(
                f"on_bad_image=skip: {len(complaints):,} of {len(images):,} {what} cannot be read and are left out: "
                f"{some(complaints, 3)}"
            )
        return kept

    def train_dataloader(self) -> ResumableLoader:
        self.setup("fit")
        return ResumableLoader(
            self._split("train"),  # type: ignore[arg-type]  # there is one, or setup would have raised
            self.batch_size,
            seed=self.seed,
            shuffle=not overfits(self.trainer),
            drop_last=self.drop_last,
            collate_fn=self._collate(train=True),  # type: ignore[arg-type]  # __getitems__ stacks
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        images = self._split("val")
        if images is None and self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING:
            raise ValueError("there are no validation images: val_size=0, or a folder without train and val")
        return [] if images is None else self._eval_loader(images)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._test_set())

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._predict_set())

    def predicted_paths(self, index: Tensor) -> list[str] | None:
        """The files of the images to predict, by their ``index`` (B,); None where they are not files of their own."""
        read = self._predict_set().read
        return [read.paths[i] for i in index.tolist()] if isinstance(read, FromFiles) else None

    def _predict_set(self) -> ImageSet:
        if self.predict_folder is None:
            return self._test_set()
        if self._predicted is None:
            images = read_unlabelled(Path(self.predict_folder), self._file_transform(train=False))
            self._predicted = self._readable(images, "images") if self.on_bad_image == "skip" else images
        return self._predicted

    def _test_set(self) -> ImageSet:
        images = self._split("test")
        assert images is not None
        return images

    def train_eval_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The training images without random transforms, for few-shot evaluation and embeddings; [] without any."""
        train = self._split("train")
        if train is None:
            return []
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
        if self._spec.read is None:
            return read_image_folder(
                root,
                self.class_names,
                self._file_transform(train=True),
                self._file_transform(train=False),
                of_checkpoint=self._adopted is not None,
            )
        return self._spec.read(root)

    def _numbered(self, splits: Splits) -> Splits:
        """The images of a dataset with classes of its own, by the checkpoint's numbers of these."""
        own = self._spec.class_names
        if self._adopted is None or own is None:
            return splits
        if self.in_chans != self._spec.in_chans or self.eval_crop != 1:
            raise ValueError(
                f"the checkpoint's images have {self.in_chans} channels and eval_crop={self.eval_crop}, and "
                f"{self.dataset} has {self._spec.in_chans} and is never cropped"
            )
        check_classes(self.dataset, own, self.class_names)
        number = torch.tensor([self.class_names.index(name) for name in own])
        train, test, val = (s and ImageSet(s.read, number[s.labels], s.index) for s in splits)
        assert test is not None
        return Splits(train, test, val)

    def _eval_reader(self, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return FromFiles(read.paths, self._file_transform(train=False)) if isinstance(read, FromFiles) else read

    def _file_transform(self, train: bool) -> v2.Compose:
        size = self.image_size
        if not train:
            return evaluation_transform(size, self.in_chans, self.eval_crop)
        if self.random_resized_crop is not None:
            return file_transform([v2.RandomResizedCrop(size, scale=(self.random_resized_crop, 1.0))], self.in_chans)
        return file_transform([v2.Lambda(middle_of_strip), v2.Resize(size), v2.CenterCrop(size)], self.in_chans)

    def _count_val(self, num_train: int) -> int:
        if self.val_size is None:
            return min(round(0.1 * num_train), _MOST_VAL_IMAGES)
        count = round(self.val_size * num_train) if isinstance(self.val_size, float) else self.val_size
        if count >= num_train:
            raise ValueError(
                f"val_size={self.val_size} leaves none of the {num_train} training images to train on: leave it out "
                "for a tenth, or give a share such as 0.1"
            )
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
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image={self.on_bad_image!r} is not one of error, skip")
        if self.on_bad_image != "error" and self._spec.read is not None and self.predict_folder is None:
            raise ValueError(
                f"on_bad_image={self.on_bad_image!r} is for folders of images; {self.dataset} is read as a whole"
            )
        for name in ("mean", "std"):
            if len(values[name]) != self.in_chans:
                raise ValueError(f"{name}={values[name]} has {len(values[name])} values for {self.in_chans} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be positive")
