"""The datasets of images with texts that have a name: their files, their sizes, their constants and their readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apps.data.datasets import Dataset, register
from apps.data.sources import Made
from apps.multimodal import shapes
from apps.multimodal.pairs import RawPairs, ReadOptions


@dataclass(frozen=True, kw_only=True)
class PairDataset(Dataset):
    """A dataset of images with texts, and what `ImageTextData` must know to read it.

    Attributes:
        image_size: height and width that its images are scaled to.
        mean, std: constants of each channel, pixels in [0, 1]; the defaults are ImageNet's.
        attributes: names of the attributes that it has, unless others are asked for.
        is_table: whether it is a table of the user's, which options describe.
        read: a function from the prepared folder and the options to the pairs.
    """

    app: str = "multimodal"
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    attributes: tuple[str, ...] = ()
    is_table: bool = False
    read: Callable[[Path, ReadOptions], RawPairs]


PAIR_DATASETS: dict[str, PairDataset] = {
    d.name: d
    for d in (
        PairDataset(
            name="shapes",
            title="drawn coloured shapes with a sentence each, 32x32, 2,000 train, 250 val, 250 test",
            layouts=(("shapes.py",),),
            sources=(Made(Path(shapes.__file__)),),
            licence="free",
            image_size=shapes.SIDE,
            mean=(0.5, 0.5, 0.5),
            std=(0.3, 0.3, 0.3),
            attributes=tuple(shapes.ATTRIBUTES),
            read=lambda folder, options: shapes.read_shapes(options.attributes),
        ),
    )
}
for _dataset in PAIR_DATASETS.values():
    register(_dataset)
