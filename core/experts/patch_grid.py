"""``PatchGrid``: the layout of the positions of an image, and the square patches that they are cut into."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..fields import Checked, Count, CountOrZero


@dataclass(frozen=True)
class PatchGrid(Checked):
    """A grid of positions, cut into patches of p x p positions that do not overlap.

    Tokens lie row by row, after the prefix; patches lie row by row as well, and so do the positions in one.

    Attributes:
        patch_size: p.
        columns: positions in a row of the grid; None: the grid is square.
        prefix_tokens: tokens before the first position, such as a class token. They are in no patch.

    Raises:
        ValueError: a value is out of its range, or ``patch_size`` does not divide ``columns``.
    """

    patch_size: Count
    columns: Count | None = None
    prefix_tokens: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and self.columns % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide columns={self.columns}")

    @property
    def area(self) -> int:
        """The number of positions in a patch."""
        return self.patch_size**2

    def size(self, num_tokens: int) -> tuple[int, int]:
        """Return the height and the width of the grid of a sequence, in positions.

        Raises:
            ValueError: so many tokens make no such grid.
        """
        count, width = num_tokens - self.prefix_tokens, self.columns
        if count < 0:
            raise ValueError(f"{num_tokens} tokens are fewer than prefix_tokens={self.prefix_tokens}")
        if width is None:
            side = math.isqrt(count)
            if side**2 != count:
                hint = "set columns, the positions in a row, or prefix_tokens, such as 1 for a class token"
                raise ValueError(f"{count} positions are no square grid: {hint}")
            height = width = side
        elif count % width:
            raise ValueError(f"{count} positions do not fill rows of columns={width}")
        else:
            height = count // width
        self.check_size(height, width)
        return height, width

    def check_size(self, height: int, width: int) -> None:
        """Raise a ``ValueError`` if a grid of that size cannot be cut into whole patches."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide a grid of {height} x {width} positions")

    def num_patches(self, num_tokens: int) -> int:
        """Return the patches of a sequence of so many tokens; raise as ``size`` does."""
        height, width = self.size(num_tokens)
        return height * width // self.area

    def cut(self, x: Tensor) -> Tensor:
        """Return the patches of a grid, position after position: (B, h, w, D) to (B, n, p * p * D)."""
        p, (B, height, width, D) = self.patch_size, x.shape
        x = x.reshape(B, height // p, p, width // p, p, D).transpose(2, 3)
        return x.reshape(B, height * width // self.area, self.area * D)

    def join(self, y: Tensor, height: int, width: int) -> Tensor:
        """Return the grid of patches, as ``cut`` makes them: (B, n, p * p * D) to (B, h, w, D)."""
        p, (B, _, size) = self.patch_size, y.shape
        D = size // self.area
        return y.reshape(B, height // p, width // p, p, p, D).transpose(2, 3).reshape(B, height, width, D)

    def spread(self, values: Tensor, height: int, width: int) -> Tensor:
        """Return the value of its patch for each position: (B, n) to (B, h, w)."""
        return self.join(values.unsqueeze(-1).expand(-1, -1, self.area), height, width).squeeze(-1)
