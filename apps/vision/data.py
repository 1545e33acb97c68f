"""Image datasets for Lightning: digits, MNIST, Fashion-MNIST, CIFAR, ImageNet and any folder of images.

Small datasets are one uint8 tensor in memory and batches are cut out of it by index: a batch costs a few milliseconds
and no worker process is needed. Folders of larger images are decoded by worker processes, one image at a time. Either
way the random transforms then work on the whole batch (`batch.Collate`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from apps.base.checks import check_name
from apps.base.messages import some
from apps.data.datasets import prepare
from apps.data.loader import in_order
from apps.data.splits import SPLITS, Split, count_of
from apps.vision.batch import Augment, Collate
from apps.vision.datasets import VISION_DATASETS
from apps.vision.encoding import ImageEncoding, evaluation_transform, file_transform, middle_of_strip
from apps.vision.image_data import ImageData
from apps.vision.image_files import FromFiles, without_bad_images
from apps.vision.image_folders import check_classes, class_folders, read_image_folder, read_unlabeled
from apps.vision.image_set import ImageSet, Splits, stratified_split

log = logging.getLogger(__name__)

_MOST_VAL_IMAGES = 10_000


_note = rank_zero_only(log.warning)


class VisionData(ImageData):
    """Images with labels, in train, validation and test batches of `ImageBatch`.

    A loader gives `PixelBatch`, which has the same attributes, and whose images are normalized where they are read.

    Args:
        dataset: digits, mnist5k, mnist, fashion_mnist, cifar10, cifar100, imagenet or image_folder (your own).
        randaugment_ops: operations of RandAugment an image; 2 is usual. 0: off.
        randaugment_magnitude: their strength, 0 to 30.
        random_erasing: probability of blanking a random box.
        mixup_alpha: parameter of mixup's Beta distribution; labels become soft. 0: off.
        cutmix_alpha: parameter of CutMix's Beta distribution; with mixup, each batch takes one of the two. 0: off.
        predict_folder: ``predict`` reads all images in this folder and those below it, which need no labels. Default:
            the test images.
        on_bad_image: a file in a folder that cannot be read ends the run with its name ("error"), or is left out of
            training and of all figures ("skip"), with a note of how many there were. For "skip" every image is decoded
            once before the first pass over it, by ``num_workers`` threads.
        kwargs: options of ``ImageData`` and ``SuiteData``. ``val_size`` and ``subset`` are stratified by class, and by
            default validation has the data's own split if there is one in addition to a test split, else a tenth, and
            at most 10,000. ``num_workers`` of 0 is best for the small datasets, which are in memory.

    A checkpoint keeps the names of the classes and how pixels are scaled in evaluation. Data that ``adopt`` it number
    the classes of a folder by these names.

    Raises:
        ValueError: an unknown dataset (with the nearest name), an option out of its range, a corrupt or missing file.

    Example::

        data = VisionData("fashion_mnist", val_size=5000, crop_padding=2, horizontal_flip=True)
        data.prepare_data()
        data.setup()
        image, label, index = next(iter(data.train_dataloader()))   # (128, 1, 28, 28), (128,), (128,)
    """

    datasets = VISION_DATASETS
    unit = "images"
    hold_out = "val_size (--data.val_size) holds some out, or a folder {split} has some"

    def __init__(
        self,
        dataset: str = "digits",
        randaugment_ops: int = 0,
        randaugment_magnitude: int = 9,
        random_erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        predict_folder: str | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.predict_folder, self.on_bad_image = predict_folder, on_bad_image
        self._augment = dataclasses.replace(
            self._augment,
            randaugment_ops=randaugment_ops,
            randaugment_magnitude=randaugment_magnitude,
            random_erasing=random_erasing,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
        )
        self._looked_at: set[str] = set()
        self._lacking: list[str] = []
        self._predicted: ImageSet | None = None
        self._class_names: tuple[str, ...] | None = self._spec.class_names
        self._check_options()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names by label: the checkpoint's, else the dataset's, or the sorted folders of a folder of images."""
        if self._adopted is not None:
            return self._adopted.class_names
        if self._class_names is None:
            self._class_names = class_folders(prepare(self.dataset, self.root, self.cache_dir) / "train")
        return self._class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    # ---- the encoding

    @property
    def encoding(self) -> ImageEncoding:
        return ImageEncoding(**self.pixel_fields, class_names=self.class_names)

    @classmethod
    def encoding_of(cls, state: Mapping[str, Any]) -> ImageEncoding:
        return ImageEncoding.from_state(state)

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        before = self._adopted
        super().adopt(encoding_state)
        if self._adopted is not before:
            self._predicted = None

    def forget(self) -> None:
        super().forget()
        self._looked_at.clear()

    # ---- the files

    @property
    def needs_no_dataset(self) -> bool:
        # A folder of files is not fetched, and reading it reports missing files.
        return self._adopted is not None and (self.predict_folder is not None or self._spec.read is None)

    def setup(self, stage: str | None = None) -> None:
        if stage != "predict" or self.predict_folder is None:
            super().setup(stage)

    def read(self) -> Splits:
        folder = self._folder()
        try:
            splits = self._read(folder)
        except ValueError as error:
            if folder != self.cache / self.dataset:  # the user's own, or a package's
                raise
            raise ValueError(f"{error}; delete it to have it fetched again") from error
        train, test, val = self._numbered(splits)
        # All training images count here: a small subset may well lack a class.
        self._lacking = [] if train is None else self._without_images(train)
        if train is not None and (self.val_size is not None or val is None):
            num_val = self._count_val(len(train))
            held_out, rest = stratified_split(train.labels[train.index], num_val, self.split_seed)
            # validation images of a folder come without the random crop
            val = ImageSet(self._eval_reader(train.read), train.labels, train.index[held_out]) if num_val else None
            train = train.subset(rest)
        if train is not None and self.subset is not None:
            if self.subset > len(train):
                raise ValueError(f"subset={self.subset} exceeds the {len(train)} training images")
            train = train.subset(stratified_split(train.labels[train.index], self.subset, self.split_seed)[0])
        return Splits(train, test, val)

    def _folder(self) -> Path:
        """Return where the dataset lies. To evaluate a checkpoint, a folder of images needs no training images."""
        if self._adopted is not None and self._spec.read is None and self.root is not None:
            folder = Path(self.root).expanduser()
            if not (folder / "train").is_dir() and any((folder / split).is_dir() for split in ("test", "val")):
                return folder
        return prepare(self.dataset, self.root, self.cache_dir)

    def check(self, stage: str | None) -> None:
        """Reject to train without images, or without images of a class that the checkpoint knows."""
        if stage != "fit":
            return
        if self.opened.train is None:
            prepare(self.dataset, self.root, self.cache_dir)  # this reports missing files
            self.forget()  # the files have come since
        if self._adopted is not None and self._lacking:
            raise ValueError(
                f"the training images have none of {some(self._lacking)}, which the checkpoint was trained on"
            )

    def _read(self, root: Path) -> Splits:
        if self._spec.read is None:
            return read_image_folder(
                root,
                self.class_names,
                self._file_transform(train=True),
                self._file_transform(train=False),
                of_checkpoint=self._adopted is not None,
                kept=(self.in_chans, self.image_size, self.image_size) if self._reads_alike else None,
            )
        return self._spec.read(root)

    def _numbered(self, splits: Splits) -> Splits:
        """Number the images of a dataset with classes of its own as the checkpoint does."""
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
        return Splits(*(s and ImageSet(s.read, number[s.labels], s.index) for s in splits))  # type: ignore[arg-type]

    def _count_val(self, num_train: int) -> int:
        if self.val_size is None:
            return min(round(0.1 * num_train), _MOST_VAL_IMAGES)
        count = count_of(self.val_size, num_train)
        if count >= num_train:
            raise ValueError(
                f"val_size={self.val_size} leaves none of the {num_train} training images to train on: leave it out "
                "for a tenth, or give a share such as 0.1"
            )
        return count

    def _without_images(self, images: ImageSet) -> list[str]:
        """Return the classes that a split has no image of."""
        counts = torch.bincount(images.labels[images.index], minlength=self.num_classes)
        return [self.class_names[label] for label in (counts == 0).nonzero().squeeze(1).tolist()]

    # ---- examples and batches

    def sizes(self) -> dict[Split, int]:
        return {split: len(getattr(self.opened, split) or ()) for split in SPLITS}

    def describe(self) -> str:
        return f"{super().describe()}, {self.num_classes} classes"

    def examples(self, split: Split) -> ImageSet | None:
        """Return a split's images without those that on_bad_image=skip leaves out, and note classes without any."""
        images = getattr(self.opened, split)
        if images is None or split in self._looked_at:
            return images
        if self.on_bad_image == "skip":
            images = self._readable(images, f"{split} images")
            self._opened = self.opened._replace(**{split: images})
        self._looked_at.add(split)
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

    def batching(self, examples: ImageSet) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "drop_last": self.drop_last, "collate_fn": self._collate(train=True)}

    def eval_loader(self, examples: ImageSet) -> DataLoader[Any]:
        # Files are often sorted by class. Where images compete for experts, each batch must look like the whole.
        assert self.eval_batch_size is not None
        return in_order(examples.mixed(), self.eval_batch_size, self.num_workers, self._collate(train=False))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader(self._predict_set())

    def train_eval_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the training images without random transforms; [] without any."""
        train = self.examples("train")
        if train is None:
            return []
        return self.eval_loader(ImageSet(self._eval_reader(train.read), train.labels, train.index))

    def predicted_paths(self, index: Tensor) -> list[str] | None:
        """Return the files of images to predict, by ``index`` (B,); None if they are not files of their own."""
        read = self._predict_set().read
        return [read.paths[i] for i in index.tolist()] if isinstance(read, FromFiles) else None

    def _predict_set(self) -> ImageSet:
        if self.predict_folder is None:
            images = self.examples("test")
            assert images is not None
            return images
        if self._predicted is None:
            images = read_unlabeled(Path(self.predict_folder), self._file_transform(train=False))
            self._predicted = self._readable(images, "images") if self.on_bad_image == "skip" else images
        return self._predicted

    def _collate(self, train: bool) -> Collate:
        augment = self._augment if train else Augment()
        if self._spec.read is None:  # a folder's images are cut as they are decoded
            augment = dataclasses.replace(augment, random_resized_crop=None)
        encoding = self.encoding
        return Collate(encoding.image_size, self.num_classes, encoding.mean, encoding.std, augment)

    def _eval_reader(self, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if self._reads_alike or not isinstance(read, FromFiles):
            return read
        return FromFiles(read.paths, self._file_transform(train=False))

    @property
    def _reads_alike(self) -> bool:
        """Whether files are cut the same way in training as in evaluation."""
        return self._augment.random_resized_crop is None and self.eval_crop == 1

    def _file_transform(self, train: bool) -> v2.Compose:
        size = self.image_size
        if not train:
            return evaluation_transform(size, self.in_chans, self.eval_crop)
        if self._augment.random_resized_crop is not None:
            return file_transform(
                [v2.RandomResizedCrop(size, scale=(self._augment.random_resized_crop, 1.0))], self.in_chans
            )
        return file_transform([v2.Lambda(middle_of_strip), v2.Resize(size), v2.CenterCrop(size)], self.in_chans)

    def _check_options(self) -> None:
        check_name("on_bad_image", self.on_bad_image, ["error", "skip"])
        if self._spec.read is not None and self.eval_crop != 1:
            raise ValueError(f"eval_crop={self.eval_crop} is for folders of images; {self.dataset} is never cropped")
        if self._spec.read is not None and self.on_bad_image != "error" and self.predict_folder is None:
            raise ValueError(
                f"on_bad_image={self.on_bad_image!r} is for folders of images; {self.dataset} is read as a whole"
            )
