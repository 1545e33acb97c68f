"""The batch of models of images and texts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairBatch(NamedTuple):
    """Pairs of an image and a text.

    Attributes:
        image: float32 (B, C, H, W), normalised by the encoding's constants.
        text_BL: int64 (B, L), ids of the texts' pieces, 0 for padding, which stands behind them.
        image_B: int64 (B,), numbers of the images in the data; pairs of one image have one number.
        caption_B: int64 (B,), numbers of the texts; equal texts have one number.
        label_BA: int64 (B, A), the class of each attribute, -1 where it is not known.
        index_B: int64 (B,), places of the pairs in the data.
    """

    image: Tensor
    text_BL: Tensor
    image_B: Tensor
    caption_B: Tensor
    label_BA: Tensor
    index_B: Tensor
