"""Columns of vectors, such as the embeddings of images and titles: each becomes one more embedding of its row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apps.recsys.encoding.features import VectorFeature


class VectorArch(nn.Module):
    """A linear map for each column of vectors; a missing vector gives a learned one.

    Vectors are divided by their root mean square in training, so that a map starts with outputs of about one size
    whatever the embedding it was made by.

    Args:
        features: the columns.
        dim: width d of the outputs.
        copies: number of separate maps of each column, for models that share nothing.

    Attributes:
        dims: widths of the outputs, one a column.
    """

    _scale_V: Tensor

    def __init__(self, features: Sequence[VectorFeature], dim: int, copies: int = 1) -> None:
        super().__init__()
        self.sizes, self.copies = tuple(feature.size for feature in features), copies
        self.dims = (dim,) * len(features)
        self.weight = nn.ParameterList(
            [(2 * torch.rand(copies, size, dim) - 1) / math.sqrt(size) for size in self.sizes]
        )
        self.missing = nn.ParameterList([torch.zeros(copies, 1, dim) for _ in self.sizes])
        scale = [1 / feature.scale for feature in features for _ in range(feature.size)]
        self.register_buffer("_scale_V", torch.tensor(scale), persistent=False)

    def forward(self, vector_BV: Tensor) -> Tensor:
        """Map (B, V), the columns side by side, NaN if missing, to (B, n d); (copies, B, n d) of several copies."""
        outputs = []
        parts = (vector_BV * self._scale_V).split(list(self.sizes), dim=1)
        for x_BS, weight_KSd, missing_K1d in zip(parts, self.weight, self.missing, strict=True):
            is_missing_B1 = x_BS[:, :1].isnan()
            y_KBd = torch.matmul(x_BS.nan_to_num(0.0), weight_KSd)
            outputs.append(torch.where(is_missing_B1, missing_K1d, y_KBd))
        y_KBH = torch.cat(outputs, dim=-1)
        return y_KBH[0] if self.copies == 1 else y_KBH
