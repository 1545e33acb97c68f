"""A model of images and texts whose vectors one can compute by hand, and folders of images of one colour."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding

WORDS = ("red", "green", "blue")
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "dress")
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "purple": (204, 0, 153)}
"""Purple is 0.8 red and 0.6 blue, a vector of length 1."""


class Tinted(nn.Module):
    """The vector of an image is its mean colour, that of a text the colours that it names, each of length 1.

    Attributes:
        num_images: number of images that were encoded so far.
    """

    def __init__(self, max_tokens: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        text = TextEncoding(pieces=PIECES, max_tokens=max_tokens)
        self.dim = 3
        self.encoding = PairEncoding(text=text, image_size=4, in_chans=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        self.num_images = 0

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, image: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self.image_vectors(image), self.text_vectors(text_BL)

    def image_vectors(self, image: Tensor) -> Tensor:
        self.num_images += len(image)
        return nn.functional.normalize(self.scale * image.mean((2, 3)), dim=1)

    def text_vectors(self, text_BL: Tensor) -> Tensor:
        count_B3 = torch.stack([(text_BL == PIECES.index(word)).sum(1) for word in WORDS], 1)
        return nn.functional.normalize(self.scale * count_B3.float(), dim=1)


def write_tinted(folder: Path, *names: str, size: int = 6) -> None:
    """Write images such as ``shop/red.png``, in the colour that the last part of their name begins with."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        color = next(value for key, value in COLORS.items() if path.name.startswith(key))
        Image.new("RGB", (size, size), color).save(path)
