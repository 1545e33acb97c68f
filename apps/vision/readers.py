"""Image files to uint8 tensors: the formats of the standard datasets, image folders, and the split of a set.

A reader that meets a file it cannot read raises one ValueError that names the file and the rule it breaks.
"""

from __future__ import annotations

import contextlib
import gzip
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from apps.base.inflate import read_limited
from apps.base.messages import one_line


class ImageSet(torch.utils.data.Dataset[Any]):
    """Images that are read by whole batches: ``set.__getitems__(positions)`` is (uint8 (B, C, H, W), label, index)."""

    def __init__(self, read: Callable[[Tensor], Tensor], labels: Tensor, index: Tensor | None = None) -> None:
        """``read`` gives the images at the indices it is passed; ``index`` selects and orders, by default all."""
        self.read = read
        self.labels = labels
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label, index = self.__getitems__([position])
        return image[0], label[0], index[0]

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = self.index[torch.as_tensor(positions)]
        return self.read(index), self.labels[index], index

    def subset(self, positions: Tensor) -> ImageSet:
        """The same images, fewer of them."""
        return ImageSet(self.read, self.labels, self.index[positions])

    def mixed(self) -> ImageSet:
        """The same images in an order without meaning, always the same one."""
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(0)))


@dataclass(frozen=True)
class FromTensor:
    """Images in memory: uint8 (N, C, H, W)."""

    images: Tensor

    def __call__(self, index: Tensor) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class FromFiles:
    """Image files, each decoded, cut and scaled by ``transform`` to uint8 (3, H, W)."""

    paths: tuple[str, ...]
    transform: Callable[[Tensor], Tensor]

    def __call__(self, index: Tensor) -> Tensor:
        try:
            return torch.stack([self.transform(read_image(self.paths[i])) for i in index.tolist()])
        except BadImage as error:
            raise BadImage(f"{error}; data.on_bad_image=skip leaves such images out") from error


class Splits(NamedTuple):
    """What a dataset brings along.

    ``val`` is None where it has no validation split of its own, ``train`` where a folder holds images to test alone.
    """

    train: ImageSet | None
    test: ImageSet
    val: ImageSet | None = None


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of MNIST (yann.lecun.com/exdb/mnist), plain or gzipped, bytes only.

    Raises:
        ValueError: truncated, not gzip, a wrong magic number, or more or fewer bytes than its header says.
    """
    data = _read_bytes(path)
    # magic: two zero bytes, the type (8: unsigned byte), the number of dimensions; then each size, big-endian
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4 or len(data) < 4 + 4 * data[3]:
        found = data[:4].hex(" ") or "nothing"
        raise ValueError(
            f"{path} is corrupt: an IDX file of bytes starts with 00 00 08 and a rank of 1 to 4, not {found}"
        )
    shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is corrupt: its header says {shape}, but {body.size} bytes follow")
    return body.reshape(shape)


def read_mnist(root: Path, folder: str) -> Splits:
    """The four IDX files of MNIST's layout in ``root``, gzipped or not, or in torchvision's ``root/folder/raw``."""
    torchvision_raw = root / folder / "raw"
    home = torchvision_raw if torchvision_raw.is_dir() else root

    def split(prefix: str) -> ImageSet:
        pair = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
        paths = [p if p.exists() else p.with_name(p.name + ".gz") for p in (home / name for name in pair)]
        images, labels = (read_idx(p) for p in paths)
        if images.ndim != 3:
            raise ValueError(f"{paths[0]} is corrupt: images have rank 3, not {images.ndim}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{paths[1]} is corrupt: {labels.shape[0]} labels for {images.shape[0]} images")
        return in_memory(images[:, None], labels, paths[1], num_classes=10)

    return Splits(split("train"), split("t10k"))


def read_csv_digits(root: Path, name: str, side: int, top: int) -> Splits:
    """Rows of ``side * side`` pixels from 0 to ``top`` and a label. Every fifth image of a class is for testing.

    The file has no split of its own: 20 % are held out, stratified, the same ones always.
    """
    path = root / name
    data = _read_bytes(path)
    try:
        rows = np.loadtxt(data.decode().splitlines(), delimiter=",", dtype=np.float32, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is corrupt: it is not a table of numbers ({error})") from error
    if rows.shape[1] != side * side + 1:
        raise ValueError(f"{path} is corrupt: {rows.shape[1]} columns, not {side * side} pixels and a label")
    pixels = rows[:, :-1]
    if pixels.min() < 0 or pixels.max() > top:
        raise ValueError(f"{path} is corrupt: pixels go from 0 to {top}, not {pixels.min():g} to {pixels.max():g}")
    images = (pixels * (255 / top)).round().astype(np.uint8).reshape(-1, 1, side, side)
    everything = in_memory(images, rows[:, -1].astype(np.int64), path, num_classes=10)
    test, train = stratified_split(everything.labels, round(0.2 * len(everything)), seed=0)
    return Splits(everything.subset(train), everything.subset(test))


def read_cifar(
    root: Path, folder: str, train: Sequence[str], test: str, key: str, class_names: Sequence[str]
) -> Splits:
    """CIFAR's Python batches in ``root/folder``, or an image folder ``root/{train,test}/CLASS/``."""
    if not (root / folder).is_dir():
        return Splits(*(read_small_images(root / split, class_names, side=32) for split in ("train", "test")))

    def split(names: Sequence[str]) -> ImageSet:
        batches = [_read_cifar_batch(root / folder / name, key) for name in names]
        images = np.concatenate([b[0] for b in batches])
        return in_memory(images, np.concatenate([b[1] for b in batches]), root / folder, len(class_names))

    return Splits(split(train), split((test,)))


def read_small_images(folder: Path, class_names: Sequence[str], side: int) -> ImageSet:
    """All images below ``folder/CLASS`` in memory; each one must be ``side`` x ``side``."""
    folders = class_folders(folder)
    if sorted(folders) != sorted(class_names):
        odd = sorted(set(folders) ^ set(class_names))
        rule = f"its folders are not the {len(class_names)} classes"
        raise ValueError(f"{folder}: {rule}; they differ in {', '.join(odd[:5])}")

    samples = _list_images(folder, class_names)
    images = np.empty((len(samples), 3, side, side), np.uint8)
    for i, (path, _) in enumerate(samples):
        pixels = read_image(path)
        if pixels.shape != images.shape[1:]:
            raise ValueError(f"{path} is {pixels.shape[2]}x{pixels.shape[1]}, not {side}x{side} like the others")
        images[i] = pixels
    return in_memory(images, np.array([label for _, label in samples]), folder, len(class_names))


def read_image_folder(
    root: Path,
    class_names: Sequence[str],
    train: Callable[..., Tensor],
    evaluate: Callable[..., Tensor],
    of_checkpoint: bool = False,
) -> Splits:
    """``root/{train,val,test}/CLASS/``; without ``test``, ``val`` is the test split, as ImageNet is used.

    Args:
        root: the folder.
        class_names: by label.
        train, evaluate: what becomes of a decoded image, in training and in evaluation.
        of_checkpoint: the classes are a model's that is trained: a split need not have images of all of them, and there
            may be no ``train``. Else they are those of ``train``, and every split has the same.

    Raises:
        ValueError: a split has another class, or no image.
    """
    samples = {}
    for name in ("train", "val", "test"):
        if not (root / name).is_dir():
            continue
        found = class_folders(root / name)
        if of_checkpoint:
            check_classes(str(root / name), found, class_names)
        elif set(found) != set(class_names):
            odd = sorted(set(found) ^ set(class_names))
            raise ValueError(f"{root / name}: its classes are not those of train; they differ in {', '.join(odd[:5])}")
        samples[name] = _list_images(root / name, class_names, allow_empty=of_checkpoint)

    def split(name: str, transform: Callable[..., Tensor]) -> ImageSet:
        paths, labels = zip(*samples[name], strict=True)
        return ImageSet(FromFiles(paths, transform), torch.tensor(labels))

    test = "test" if "test" in samples else "val"
    val = split("val", evaluate) if test != "val" and "val" in samples else None
    return Splits(split("train", train) if "train" in samples else None, split(test, evaluate), val)


def check_classes(where: str, found: Sequence[str], known: Sequence[str]) -> None:
    """Refuse data with a class that a checkpoint does not know.

    Raises:
        ValueError: naming the classes that either has and the other has not.
    """
    unknown, lacking = sorted(set(found) - set(known)), sorted(set(known) - set(found))
    if unknown:
        also = f", and lacks {some(lacking)}" if lacking else ""
        raise ValueError(
            f"{where}: its classes are not those of the checkpoint: it has {some(unknown)}, which the checkpoint does "
            f"not know{also}"
        )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` of the names, and how many others there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_unlabelled(folder: Path, transform: Callable[[Tensor], Tensor]) -> ImageSet:
    """All images in ``folder`` and below it, by path; their label is -1, which is none.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
    if not paths:
        what = "holds no image" if folder.is_dir() else "is no folder"
        raise ValueError(f"predict_folder={folder} {what}; images end in {', '.join(IMG_EXTENSIONS)}")
    return ImageSet(FromFiles(tuple(paths), transform), torch.full((len(paths),), -1))


class BadImage(ValueError):
    """A file that holds no image, or one that is cut, damaged, too large or of 32 bits."""


def read_image(path: str) -> Tensor:
    """The image as RGB, uint8 (3, H, W); of 16 bits a channel the upper 8.

    Raises:
        BadImage: the file is not an image, is cut or too large, or its pixels have 32 bits.
        ValueError: there is no such file, or it cannot be opened.
    """
    # Pillow reads the header, for 0.03 to 0.08 ms: it refuses what a small file would unpack to.
    with _named(path), Image.open(path) as image:
        with contextlib.suppress(RuntimeError):
            pixels = decode_image(path, ImageReadMode.RGB)  # a third of Pillow's time, but a few formats only
            return pixels if pixels.dtype == torch.uint8 else to_dtype(pixels, torch.uint8, scale=True)
        return _of_pillow(image, path)


def to_pixels(image: Any, name: str) -> Tensor:
    """The image as RGB, uint8 (3, H, W).

    Args:
        image: a path, an image of Pillow's, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        name: what an error calls one that has no path.

    Raises:
        ValueError: anything else, or an image that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(str(image))
    if isinstance(image, Image.Image):
        with _named(name):
            return _of_pillow(image, name)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} is of type {type(image).__name__}, not a path, a PIL image or a uint8 array")
    channels = image.shape[2:] if image.ndim == 3 else (1,) if image.ndim == 2 else ()
    if image.dtype != np.uint8 or channels not in ((1,), (3,), (4,)) or not image.size:
        raise ValueError(f"{name} is {image.dtype} {image.shape}: an array must be uint8, (H, W) or (H, W, 3)")
    pixels = torch.from_numpy(image.reshape(*image.shape[:2], *channels).copy()).permute(2, 0, 1)
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]


def without_bad_images(images: ImageSet, num_threads: int) -> tuple[ImageSet, list[str]]:
    """Decode all images once: those that can be read, in their order, and one complaint for each of the others."""
    read = images.read
    if not isinstance(read, FromFiles):
        return images, []

    def complaint(i: int) -> str | None:
        try:
            read_image(read.paths[i])
        except BadImage as error:
            return str(error)
        return None

    complaints: list[str | None] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for some_of_them in images.index.split(4096):  # a future for each of a million would take a gigabyte
            complaints += pool.map(complaint, some_of_them.tolist())
    kept = torch.tensor([c is None for c in complaints], dtype=torch.bool)
    return images.subset(kept.nonzero().squeeze(1)), [c for c in complaints if c is not None]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which image an error is about."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large: {error}") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not of what the file holds
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else one_line(str(error))
        raise BadImage(f"{name} is corrupt: {reason}") from error


def _of_pillow(image: Image.Image, name: str) -> Tensor:
    if image.mode.startswith(("I", "F")):
        return _upper_bits(image, name).expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _upper_bits(image: Image.Image, path: str) -> Tensor:
    """Grey pixels of 16 bits as uint8 (1, H, W). Pillow's ``convert`` would cut all above 255 off."""
    # In PNG and PPM files, mode I is how some versions of Pillow give 16 bits; else it is of 32.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        raise BadImage(f"{path} has pixels of 32 bits (mode {image.mode}) and no rule for their range: save it with 16")
    return torch.from_numpy((np.array(image) >> 8).astype(np.uint8))[None]


def in_memory(images: np.ndarray, labels: np.ndarray, path: Path, num_classes: int) -> ImageSet:
    """Uint8 (N, C, H, W) and labels in ``range(num_classes)``, which came from ``path``, as a set."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{path} is corrupt: labels go from 0 to {num_classes - 1}, not {found}")
    # arrays made of file bytes are read-only: torch would warn
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    return ImageSet(FromTensor(pixels), torch.from_numpy(labels.astype(np.int64)))


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as unpacked:
            return read_limited(unpacked, path.stat().st_size, str(path))  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is corrupt: it is truncated or no gzip file ({error})") from error


class _NumpyUnpickler(pickle.Unpickler):
    """Arrays and nothing else: a pickle may run any code, and a user's folder is not checked by hash."""

    def find_class(self, module: str, name: str) -> Any:
        array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer")
        if array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _read_cifar_batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            batch = _NumpyUnpickler(file, encoding="latin1").load()
        images, labels = np.asarray(batch["data"]), np.asarray(batch[key])
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except Exception as error:  # a cut pickle raises nearly anything
        raise ValueError(f"{path} is corrupt: it is no CIFAR batch ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise ValueError(f"{path} is corrupt: images {images.shape} and labels {labels.shape}, not (N, 3072) and (N,)")
    return images.reshape(-1, 3, 32, 32), labels


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in ``folder``, sorted."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))


def _list_images(folder: Path, class_names: Sequence[str], allow_empty: bool = False) -> list[tuple[str, int]]:
    """The images below ``folder/CLASS`` with their labels, by class and path.

    Raises:
        ValueError: there is none; or, unless ``allow_empty``, none of one class.
    """
    numbers = {name: label for label, name in enumerate(class_names)}
    try:
        samples = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=allow_empty)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no image folder: {one_line(str(error))}") from error
    if not samples:
        raise ValueError(f"{folder} holds no image; images end in {', '.join(IMG_EXTENSIONS)}")
    return samples


def stratified_split(labels: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``num`` positions at random with the classes in their shares, and the rest; both sorted.

    The images of a class are shuffled and put at even distances on [0, 1]; the first ``num`` on that line are chosen.

    Args:
        labels: int64 (N,).
        num: how many to choose, 0 to N.
        seed: the only source of randomness.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = (torch.arange(len(mine), dtype=torch.float64) + 0.5) / len(mine)
    ranked = order[place[order].argsort(stable=True)]  # ties between classes fall as they were shuffled
    return ranked[:num].sort().values, ranked[num:].sort().values
