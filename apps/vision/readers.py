"""The files of the standard image datasets, each as `Splits`. A bad file is one ValueError that names it."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.base.inflate import naming_errors, read_limited
from apps.vision.image_folders import read_small_images
from apps.vision.image_set import ImageSet, Splits, in_memory, stratified_split


def read_idx(path: Path) -> np.ndarray:
    """Read an array in the IDX format of MNIST (yann.lecun.com/exdb/mnist), plain or gzipped, bytes only.

    Raises:
        ValueError: truncated, not gzip, a wrong magic number, or more or fewer bytes than its header says.
    """
    data = _read_bytes(path)
    # magic: two zero bytes, the type (8: unsigned byte), the number of dimensions; then each size, big-endian
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4 or len(data) < 4 + 4 * data[3]:
        start = data[:4].hex(" ") or "nothing"
        raise ValueError(
            f"{path} is corrupt: an IDX file of bytes starts with 00 00 08 and a rank of 1 to 4, not {start}"
        )
    shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is corrupt: its header says {shape}, but {body.size} bytes follow")
    return body.reshape(shape)


def read_mnist(root: Path, folder: str) -> Splits:
    """Read MNIST's four IDX files in ``root``, gzipped or not, or in torchvision's ``root/folder/raw``."""
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
    """Read rows of ``side * side`` pixels from 0 to ``top`` and a label.

    The file has no split of its own: 20 % are held out for testing, stratified, always the same ones.
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
    """Read CIFAR's Python batches in ``root/folder``, or an image folder ``root/{train,test}/CLASS/``."""
    if not (root / folder).is_dir():
        return Splits(*(read_small_images(root / split, class_names, side=32) for split in ("train", "test")))

    def split(names: Sequence[str]) -> ImageSet:
        batches = [_read_cifar_batch(root / folder / name, key) for name in names]
        images = np.concatenate([b[0] for b in batches])
        return in_memory(images, np.concatenate([b[1] for b in batches]), root / folder, len(class_names))

    return Splits(split(train), split((test,)))


class _NumpyUnpickler(pickle.Unpickler):
    """Load arrays and nothing else: a pickle may run any code, and a user's folder is not checked by hash."""

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


def _read_bytes(path: Path) -> bytes:
    with naming_errors(path):
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as unpacked:
            return read_limited(unpacked, path.stat().st_size, str(path))  # type: ignore[arg-type]
