"""Files of images: what is laid over an image, and that a file is whole or not there."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from apps.report.images import NO_EXPERT, Tile, heated, save_images, tinted


def test_patches_have_the_color_and_number_of_their_expert():
    tile = tinted(np.zeros((4, 4)), np.array([[0, 1], [2, 3]]), 3, "block 1")  # no expert computed the last patch
    assert tile.over.shape == (2, 2, 4)
    assert list(tile.over[0, 0]) == pytest.approx([0x00 / 255, 0x72 / 255, 0xB2 / 255, 0.6])
    assert tile.over[1, 1, 3] == 0
    assert tile.texts == (("0", "1"), ("2", NO_EXPERT))
    assert tinted(np.zeros((64, 64)), np.zeros((16, 16), int), 3).texts == ()


def test_the_largest_weight_is_the_brightest():
    over = heated(np.ones((4, 4, 3)), np.array([[0.1, 0.2]]), "word").over
    assert over[0, 1, :3].sum() > over[0, 0, :3].sum()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [[Tile(np.ones((8, 8, 3)), "image"), None], [Tile(np.zeros((8, 8, 1)), is_framed=True)]]
    path = save_images(rows, tmp_path / "new" / "a.png", "A $title$", ["a name", "$b$"], num_experts=4)
    with Image.open(path) as image:
        assert image.mode in ("RGB", "RGBA")
    before = path.read_bytes()

    def full(figure, file, **kwargs):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="no space"):
        save_images(rows, path, "title")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert path.read_bytes() == before
