"""Write the images of a model of images and texts as a folder a class, with the model's own splits and sizes.

    moesaic fit --config configs/multimodal/fashion_products.yaml --data.root DIR
    python benchmarks/image_folder.py runs/fashion_products masterCategory photos
    moesaic fit --config configs/vision/photos.yaml --data.root photos --data.image_size 56

So a classifier that is trained on the classes stands beside ``test/zero_shot_masterCategory`` of the run, which knows
them by their names alone. Images without a class in the attribute are left out, and so are the classes that one of the
splits lacks: every split of a classifier's folder has the same.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torchvision.io import write_png

import apps
from apps.data.splits import SPLITS
from apps.demonstrate.command import data_of


def _labels(pairs: Any, place: int) -> dict[int, int]:
    """Return the class of each image of a split, by the image's number."""
    image_N = pairs.image_N[pairs.index].unique()
    return dict(zip(image_N.tolist(), pairs.label_IA[image_N, place].tolist(), strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run of an ImageTextRetriever or an ImageCaptioner")
    parser.add_argument("attribute")
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    model = apps.load(args.run)
    data: Any = data_of(args.run / "config.yaml", model)
    if args.attribute not in data.class_names:
        parser.error(f"{args.attribute!r} is none of the run's attributes: {', '.join(data.class_names)}")
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    # Numbers keep apart two classes whose names differ in other signs alone.
    classes = enumerate(data.class_names[args.attribute])
    names = [f"{i:03}_" + re.sub(r"[^\w-]+", "_", name) for i, name in classes]
    place = list(data.class_names).index(args.attribute)
    labels = {split: _labels(data.examples(split), place) for split in SPLITS}
    kept = set.intersection(*({label for label in own.values() if label >= 0} for own in labels.values()))
    print(f"{len(kept)} of {len(names)} classes are in every split")
    for split, own in labels.items():
        chosen = {image: label for image, label in own.items() if label in kept}
        for image, label in chosen.items():
            path = args.folder / split / names[label] / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(data.pixels(torch.tensor([image]))[0], str(path))
        print(f"{split}: {len(chosen):,} of {len(own):,} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
