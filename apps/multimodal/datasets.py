"""The datasets of images with texts that have a name: their files, their sizes, their constants and their readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from apps.data.datasets import Dataset, Late, register
from apps.data.sources import Made

if TYPE_CHECKING:
    from apps.multimodal.pairs.pairs import RawPairs, ReadOptions


@dataclass(frozen=True, kw_only=True)
class PairDataset(Dataset):
    """A dataset of images with texts, and what `ImageTextData` must know to read it.

    Attributes:
        image_size: height and width that its images are scaled to.
        mean, std: constants of each channel, pixels in [0, 1]; the defaults are ImageNet's.
        attributes: names of the attributes that it has, unless others are asked for.
        made: whether it is computed, and has no files.
        is_table: whether it is a table of the user's, which options describe.
        read: a function from the prepared folder and the options to the pairs.
    """

    app: str = "multimodal"
    image_size: int = 224
    in_chans: ClassVar[int] = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    attributes: tuple[str, ...] = ()
    made: bool = False
    is_table: bool = False
    read: Callable[[Path, ReadOptions], RawPairs]


PAIR_DATASETS: dict[str, PairDataset] = {
    d.name: d
    for d in (
        PairDataset(
            name="shapes",
            title="synthetic colored shapes with a sentence each, 32x32, 2,000 train, 250 val, 250 test",
            layouts=(("shapes.py",),),
            sources=(Made(Path(__file__).with_name("pairs") / "shapes.py"),),
            license="free",
            image_size=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.3, 0.3, 0.3),
            attributes=("colour", "shape", "size", "texture", "place", "background"),
            made=True,
            read=Late("apps.multimodal.pairs.shapes.read_known"),
        ),
        PairDataset(
            name="fashion_products",
            title="photos of 9,583 fashion products, 112x112, with titles and 7 labels; split 8:1:1 by title",
            layouts=(("products.csv", "images112.npz"),),
            license="none stated; research use",
            note="A subset of Fashion Product Images (Kaggle, Myntra's photos): products.csv and images112.npz.",
            image_size=64,
            mean=(0.84, 0.83, 0.82),
            std=(0.27, 0.28, 0.28),
            attributes=("gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "usage"),
            read=Late("apps.multimodal.readers.fashion_products.read_fashion_products"),
        ),
        PairDataset(
            name="coco_captions",
            title="COCO captions 2017: 118,287 train and 5,000 validation images (used as test), 5 captions each",
            layouts=(
                (
                    "annotations/captions_train2017.json",
                    "annotations/captions_val2017.json",
                    "train2017/*",
                    "val2017/*",
                ),
                ("dataset_coco.json", "train2014/*", "val2014/*"),
                (
                    "annotations/captions_train2014.json",
                    "annotations/captions_val2014.json",
                    "train2014/*",
                    "val2014/*",
                ),
            ),
            license="captions CC BY 4.0; photos by the terms of Flickr",
            note="Fetched by hand from cocodataset.org.",
            read=Late("apps.multimodal.readers.captions.read_coco"),
        ),
        PairDataset(
            name="flickr30k",
            title="Flickr30k: 31,783 photos, 5 captions each",
            layouts=(
                ("results_20130124.token", "flickr30k-images/*"),
                ("dataset_flickr30k.json", "flickr30k-images/*"),
                ("results.csv", "flickr30k_images/*"),
                ("flickr30k_images/results.csv",),
            ),
            license="research and education; photos by the terms of Flickr",
            note="Asked for at shannon.cs.illinois.edu/DenotationGraph.",
            read=Late("apps.multimodal.readers.captions.read_flickr30k"),
        ),
        PairDataset(
            name="image_captions",
            title="your own images, with a table of their captions",
            layouts=(("*",),),
            license="yours",
            note="--data.table names the .csv, .tsv, .jsonl or .parquet file.",
            is_table=True,
            read=Late("apps.multimodal.readers.tables.read_table"),
        ),
    )
}
for _dataset in PAIR_DATASETS.values():
    register(_dataset)
