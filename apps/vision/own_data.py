"""A configuration for a folder of images that a user names."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from PIL import Image

from apps.base.files import delete, temporary_path
from apps.base.messages import counted, one_line, some
from apps.data.given import EXPERTS, GivenConfig, GivenData
from apps.vision.image_folders import class_folders, class_images, images_below

LEAST_IMAGES = 8
"""Least number of images of a class: a quarter of them are two to test on, and one of the rest validates."""

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
Keys = tuple[str, ...]
_LOOKED_AT = 20
_SEEN = 120_000
"""Images that a training shows the model, within these limits of epochs: a minute or two of one core."""
_EPOCHS = (10, 60)
_MANY = 1000


def config_for(given: GivenData) -> GivenConfig | None:
    """Return the configuration of a small network for a folder of images; None: another kind of data.

    The folder holds a folder of images for each class, or ``train/`` and ``test/`` (or ``val/``) with such folders.
    Without test images a quarter of each class is held out, always the same ones; then images are linked, each into its
    split, below ``given.folder``.

    Raises:
        ValueError: splits of other names, images outside of classes, a single class, a class of too few images, or an
            image that cannot be read.
    """
    if len(given.paths) != 1 or not given.paths[0].is_dir():
        return None
    root = given.paths[0]
    if next(images_in(root), None) is None:
        return None
    splits = class_folders(root)
    is_known = {"train"} <= set(splits) <= {"train", "val", "test"}
    if splits and not is_known and all(s.lower() in _SPLITS and class_folders(root / s) for s in splits):
        raise ValueError(f"{root} holds {some(splits)}, which are no classes: rename these folders to train, val, test")
    train = root / "train" if (root / "train").is_dir() else root
    classes = _classes(train)
    notes: tuple[str, ...] = ()
    if train is root or not any((root / split).is_dir() for split in ("test", "val")):
        root = _held_out(classes, given.folder / "images")
        notes = (f"A quarter of the images of each of the {len(classes)} classes is held out for the test.",)
    images = [path for paths in classes.values() for path in paths]
    return _config(given, root, size_for(images), len(images), notes)


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the image files in a folder and below it."""
    return (p for p in map(Path, images_below(folder)) if p.is_file())


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class, sorted."""
    known: dict[str, str] = {}
    images = {name: map(Path, class_images(folder / name, known)) for name in class_folders(folder)}
    classes = {name: paths for name, of_class in images.items() if (paths := [p for p in of_class if p.is_file()])}
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds images in {len(classes)} folders of classes: put the images of each class into a folder "
            "with its name, two classes at least"
        )
    for name, paths in classes.items():
        if len(paths) < LEAST_IMAGES:
            raise ValueError(
                f"{folder / name} holds {counted(len(paths), 'image')}: a class needs {LEAST_IMAGES} at least"
            )
    return classes


def _held_out(classes: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Link the images of each class into ``folder/train`` and a quarter of them into ``folder/test``."""
    if folder.is_dir():
        return folder
    made = temporary_path(folder)
    delete(made)
    for name, paths in classes.items():
        order = random.Random(0).sample(range(len(paths)), len(paths))
        test = set(order[: len(paths) // 4])
        for number, path in enumerate(paths):
            split = made / ("test" if number in test else "train") / name
            split.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), split / f"{number:06}{path.suffix}")
    os.replace(made, folder)
    return folder


def size_for(paths: Sequence[Path]) -> int:
    """Return 32 where the images have at most 40 pixels on their shorter side, and 64 for larger ones.

    Raises:
        ValueError: one of the images that are looked at cannot be read.
    """
    step = max(1, len(paths) // _LOOKED_AT)
    sides = []
    for path in paths[::step]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {one_line(str(error))}") from None
    return 32 if statistics.median(sides) <= 40 else 64


def _config(given: GivenData, root: Path, size: int, num_images: int, notes: Sequence[str]) -> GivenConfig:
    """Return a convolutional network with 8 experts a position of its last grid, of which a position takes 2.

    In the file of a person who asked for a model, and for no comparison, the experts are a comment: without them the
    network learns as much at equal steps, and is quicker.
    """
    widths = [24, 48, 96] if size <= 32 else [24, 48, 96, 192]
    experts = {**EXPERTS, "expert": {"class_path": "core.FFN", "init_args": {"hidden_dim": 2 * widths[-1]}}}
    sparse = {"moe": experts, "moe_blocks": [-1]}
    of_experts = {"adamw_parts": ["experts"], "expert_lr_scale": 0.3}  # as good as by Muon, and quicker
    model = {
        "conv": {"widths": widths},
        **({} if given.in_place else sparse),
        "label_smoothing": 0.1,
        "optimizer": {"name": "muon", "lr": 1.0e-2, **of_experts, "schedule": "linear", "warmup_steps": 0.1},
    }
    data = {
        "dataset": "image_folder",
        "root": str(root),
        "image_size": size,
        "batch_size": 128 if num_images >= _MANY else 32,
        "eval_batch_size": 256,
        "crop_padding": size // 16,
        "horizontal_flip": False,
    }
    epochs = min(max(_SEEN // num_images, _EPOCHS[0]), _EPOCHS[1])
    made = GivenConfig.of(notes, {"max_epochs": epochs}, model=("VisionClassifier", model), data=("VisionData", data))
    model_keys, data_keys = ("model", "init_args"), ("data", "init_args")
    comments: dict[Keys, str] = {
        (*data_keys, "horizontal_flip"): "true where left and right mean the same: photos, not signs"
    }
    above: dict[Keys, tuple[str, ...]] = {}
    if given.in_place:
        as_yaml = (f"  {line}" for line in yaml.safe_dump(sparse, sort_keys=False).splitlines())
        above[(*model_keys, "label_smoothing")] = ("With 8 experts a position, of which each takes 2:", *as_yaml)
    return replace(made, comments=comments, above=above, verdict=() if given.in_place else None)
