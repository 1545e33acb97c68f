"""Folders of images, a folder a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from apps.base.messages import one_line, some
from apps.base.progress import each
from apps.vision.image_files import FromFiles, read_image
from apps.vision.image_set import ImageSet, Splits, in_memory


def read_image_folder(
    root: Path,
    class_names: Sequence[str],
    train: Callable[..., Tensor],
    evaluate: Callable[..., Tensor],
    of_checkpoint: bool = False,
) -> Splits:
    """Read ``root/{train,val,test}/CLASS/``; without ``test``, ``val`` is the test split, as ImageNet is used.

    Args:
        root: the folder.
        class_names: names by label.
        train, evaluate: transforms of a decoded image in training and in evaluation.
        of_checkpoint: whether the classes are a checkpoint's. Then a split need not have images of all of them, and
            there may be no ``train``. Else they are those of ``train``, and every split has the same.

    Raises:
        ValueError: a split has another class, or no image.
    """
    samples = {}
    for name in ("train", "val", "test"):
        if not (root / name).is_dir():
            continue
        folders = class_folders(root / name)
        if of_checkpoint:
            check_classes(str(root / name), folders, class_names)
        elif odd := sorted(set(folders) ^ set(class_names)):
            raise ValueError(f"{root / name}: its classes are not those of train; they differ in {', '.join(odd[:5])}")
        samples[name] = _list_images(root / name, class_names, allow_empty=of_checkpoint)

    def split(name: str, transform: Callable[..., Tensor]) -> ImageSet:
        paths, labels = zip(*samples[name], strict=True)
        return ImageSet(FromFiles(paths, transform), torch.tensor(labels))

    test = "test" if "test" in samples else "val"
    val = split("val", evaluate) if test != "val" and "val" in samples else None
    return Splits(split("train", train) if "train" in samples else None, split(test, evaluate), val)


def read_small_images(folder: Path, class_names: Sequence[str], side: int) -> ImageSet:
    """Read all images below ``folder/CLASS`` into memory; each one must be ``side`` x ``side``."""
    if odd := sorted(set(class_folders(folder)) ^ set(class_names)):
        rule = f"its folders are not the {len(class_names)} classes"
        raise ValueError(f"{folder}: {rule}; they differ in {', '.join(odd[:5])}")

    samples = _list_images(folder, class_names)
    images = np.empty((len(samples), 3, side, side), np.uint8)
    for i, (path, _) in enumerate(each(samples, "reading images")):
        pixels = read_image(path)
        if pixels.shape != images.shape[1:]:
            raise ValueError(f"{path} is {pixels.shape[2]}x{pixels.shape[1]}, not {side}x{side} like the others")
        images[i] = pixels
    return in_memory(images, np.array([label for _, label in samples]), folder, len(class_names))


def read_unlabelled(folder: Path, transform: Callable[[Tensor], Tensor]) -> ImageSet:
    """Return all images in ``folder`` and below it, by path; their label is -1, which is none.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
    if not paths:
        what = "holds no image" if folder.is_dir() else "is no folder"
        raise ValueError(f"predict_folder={folder} {what}; images end in {', '.join(IMG_EXTENSIONS)}")
    return ImageSet(FromFiles(tuple(paths), transform), torch.full((len(paths),), -1))


def check_classes(where: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Refuse data with a class that is not ``known`` to a checkpoint, with a ``ValueError`` that names it."""
    unknown, lacking = sorted(set(classes) - set(known)), sorted(set(known) - set(classes))
    if unknown:
        also = f", and lacks {some(lacking)}" if lacking else ""
        raise ValueError(
            f"{where}: its classes are not those of the checkpoint: it has {some(unknown)}, which the checkpoint does "
            f"not know{also}"
        )


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders in ``folder``, sorted."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))


def _list_images(folder: Path, class_names: Sequence[str], allow_empty: bool = False) -> list[tuple[str, int]]:
    """Return the images below ``folder/CLASS`` with their labels, by class and path.

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
