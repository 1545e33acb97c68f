"""Folders of images, a folder a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apps.base.messages import some
from apps.base.progress import each
from apps.vision.image_files import ENDINGS, FromFiles, KeptPixels, read_image
from apps.vision.image_set import ImageSet, Splits, in_memory


def read_image_folder(
    root: Path,
    class_names: Sequence[str],
    train: Callable[..., Tensor],
    evaluate: Callable[..., Tensor],
    of_checkpoint: bool = False,
    kept: Sequence[int] | None = None,
) -> Splits:
    """Read ``root/{train,val,test}/CLASS/``; without ``test``, ``val`` is the test split, as ImageNet is used.

    Args:
        root: the folder.
        class_names: names by label.
        train, evaluate: transforms of a decoded image in training and in evaluation.
        of_checkpoint: whether the classes are a checkpoint's. Then a split need not have images of all of them, and
            there may be no ``train``. Else they are those of ``train``, and every split has the same.
        kept: shape of a training or validation image that is decoded once, uint8 (C, S, S); None: at each reading.

    Raises:
        ValueError: a split has another class, or no image; or a file is in two classes or splits.
    """
    samples, known = {}, dict[str, str]()
    for name in ("train", "val", "test"):
        if not (root / name).is_dir():
            continue
        folders = class_folders(root / name)
        if of_checkpoint:
            check_classes(str(root / name), folders, class_names)
        elif odd := sorted(set(folders) ^ set(class_names)):
            raise ValueError(f"{root / name}: its classes are not those of train; they differ in {', '.join(odd[:5])}")
        samples[name] = _list_images(root / name, class_names, known, allow_empty=of_checkpoint)

    def split(name: str, transform: Callable[..., Tensor]) -> ImageSet:
        paths, labels = zip(*samples[name], strict=True)
        pixels = None if kept is None or name == test else KeptPixels.of(len(paths), kept)
        return ImageSet(FromFiles(paths, transform, pixels), torch.tensor(labels))

    test = "test" if "test" in samples else "val"
    val = split("val", evaluate) if test != "val" and "val" in samples else None
    return Splits(split("train", train) if "train" in samples else None, split(test, evaluate), val)


def read_small_images(folder: Path, class_names: Sequence[str], side: int) -> ImageSet:
    """Read all images below ``folder/CLASS`` into memory; each one must be ``side`` x ``side``."""
    if odd := sorted(set(class_folders(folder)) ^ set(class_names)):
        rule = f"its folders are not the {len(class_names)} classes"
        raise ValueError(f"{folder}: {rule}; they differ in {', '.join(odd[:5])}")

    samples = _list_images(folder, class_names, {})
    images = np.empty((len(samples), 3, side, side), np.uint8)
    for i, (path, _) in enumerate(each(samples, "reading images")):
        pixels = read_image(path)
        if pixels.shape != images.shape[1:]:
            raise ValueError(f"{path} is {pixels.shape[2]}x{pixels.shape[1]}, not {side}x{side} like the others")
        images[i] = pixels
    return in_memory(images, np.array([label for _, label in samples]), folder, len(class_names))


def read_unlabeled(folder: Path, transform: Callable[[Tensor], Tensor]) -> ImageSet:
    """Return all images in ``folder`` and below it, by path; their label is -1, which is none.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(images_below(folder)) if folder.is_dir() else []
    if not paths:
        what = "holds no image" if folder.is_dir() else "is no folder"
        raise ValueError(f"predict_folder={folder} {what}; images end in {', '.join(ENDINGS)}")
    return ImageSet(FromFiles(tuple(paths), transform), torch.full((len(paths),), -1))


def check_classes(where: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Reject data with a class that is not ``known`` to a checkpoint, with a ``ValueError`` that names it."""
    unknown, lacking = sorted(set(classes) - set(known)), sorted(set(known) - set(classes))
    if unknown:
        also = f", and lacks {some(lacking)}" if lacking else ""
        raise ValueError(
            f"{where}: its classes are not those of the checkpoint: it has {some(unknown)}, which the checkpoint does "
            f"not know{also}"
        )


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders in ``folder``, sorted; hidden ones are not classes."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def images_below(folder: Path | str) -> dict[str, str]:
    """Return the image files in a folder and below it, each with its real path; hidden ones are left out.

    A link to a folder is followed, but no real folder is visited twice, and none that ``folder`` lies in. A link that
    leads nowhere counts as a file.

    Raises:
        OSError: a folder cannot be read.
    """
    visited = {str(parent) for parent in Path(folder).resolve().parents}
    found, folders, links = {}, [str(folder)], list[str]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)  # a folder keeps its own path if links lead to it as well
        real = os.path.realpath(here)
        if real in visited:
            continue
        visited.add(real)
        for entry in os.scandir(here):
            path, is_link = entry.path, entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path) if is_link else entry.is_dir():
                (links if is_link else folders).append(path)
            elif entry.name.lower().endswith(ENDINGS) and (os.path.isfile(path) or not os.path.exists(path)):
                leads = is_link and os.path.exists(path)
                found[path] = os.path.realpath(path) if leads else os.path.join(real, entry.name)
    return found


def class_images(folder: Path, known: dict[str, str]) -> list[str]:
    """Return the paths of a class's images, each file once.

    Args:
        folder: the folder of the class.
        known: paths of the images of other classes and splits by their real paths. It takes the new ones.

    Raises:
        ValueError: a file is known already.
    """
    own: dict[str, str] = {}
    for path, real in sorted(images_below(folder).items(), key=lambda item: os.path.split(item[0])):
        if real in known:
            raise ValueError(f"{path} and {known[real]} are one file: an image belongs to one class and one split")
        own.setdefault(real, path)
    known.update(own)
    return list(own.values())


def _list_images(
    folder: Path, class_names: Sequence[str], known: dict[str, str], allow_empty: bool = False
) -> list[tuple[str, int]]:
    """Return the images below ``folder/CLASS`` with their labels, by class and path; see ``class_images``.

    Raises:
        ValueError: there is none; or, unless ``allow_empty``, none of one class.
    """
    images = {name: class_images(folder / name, known) if (folder / name).is_dir() else [] for name in class_names}
    samples = [(path, label) for label, name in enumerate(class_names) for path in images[name]]
    lacking = [name for name in class_names if not images[name]]
    if not samples or (lacking and not allow_empty):
        raise ValueError(
            f"{folder} is no image folder: there is no image of {some(lacking)}; images end in {', '.join(ENDINGS)}"
        )
    return samples
