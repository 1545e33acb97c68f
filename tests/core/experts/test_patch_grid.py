"""``PatchGrid``: which positions are a patch, by hand, and the grids that tokens make."""

from __future__ import annotations

import pytest
import torch

from core.experts.patch_grid import PatchGrid


def test_patches_lie_row_by_row_and_so_do_the_positions_in_one():
    # 0 1 | 2 3 | 4 5
    # 6 7 | 8 9 | 10 11
    grid, x = PatchGrid(2, columns=6), torch.arange(12).view(1, 2, 6, 1)
    assert grid.cut(x).tolist() == [[[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]]
    assert torch.equal(grid.join(grid.cut(x), 2, 6), x)
    assert grid.spread(torch.tensor([[7, 8, 9]]), 2, 6).tolist() == [[[7, 7, 8, 8, 9, 9], [7, 7, 8, 8, 9, 9]]]


def test_the_channels_of_a_position_stay_together():
    grid, x = PatchGrid(2), torch.arange(3 * 16 * 5).view(3, 4, 4, 5)
    patches = grid.cut(x)
    assert patches.shape == (3, 4, 20)
    assert torch.equal(patches[1, 2], torch.cat([x[1, r, c] for r in (2, 3) for c in (0, 1)]))
    assert torch.equal(grid.join(patches, 4, 4), x)


@pytest.mark.parametrize(
    ("grid", "tokens", "size", "patches"),
    [
        (PatchGrid(2), 16, (4, 4), 4),
        (PatchGrid(2), 0, (0, 0), 0),
        (PatchGrid(2, prefix_tokens=3), 19, (4, 4), 4),
        (PatchGrid(3, columns=6), 54, (9, 6), 6),
        (PatchGrid(1, columns=5, prefix_tokens=1), 11, (2, 5), 10),
    ],
)
def test_the_grid_of_a_sequence(grid, tokens, size, patches):
    assert grid.size(tokens) == size
    assert grid.num_patches(tokens) == patches


@pytest.mark.parametrize(
    ("grid", "tokens", "message"),
    [
        (PatchGrid(2), 17, r"^17 positions are no square grid: set columns, .*or prefix_tokens, such as 1 for a class"),
        (PatchGrid(2, prefix_tokens=4), 3, r"^3 tokens are fewer than prefix_tokens=4$"),
        (PatchGrid(2, columns=4), 18, r"^18 positions do not fill rows of columns=4$"),
        (PatchGrid(2, columns=4), 12, r"^patch_size=2 does not divide a grid of 3 x 4 positions$"),
        (PatchGrid(2), 25, r"^patch_size=2 does not divide a grid of 5 x 5 positions$"),
    ],
)
def test_tokens_that_make_no_grid_are_refused(grid, tokens, message):
    with pytest.raises(ValueError, match=message):
        grid.size(tokens)
