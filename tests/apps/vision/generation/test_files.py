"""Drawn images as files: names of folders, the grid, and folders that stay as they are."""

from __future__ import annotations

import pytest
import torch

from apps.vision.generation.files import MARK, ImageFolder, folder_names, grid_of


def test_folders_are_called_like_their_classes():
    assert folder_names(["T-shirt/top", "Bag", "7"]) == ["T-shirt_top", "Bag", "7"]
    assert folder_names(["a/b", "a b", "..", "猫"]) == ["a_b_0", "a_b_1", "class", "猫"]


def test_a_grid_has_a_row_a_class_and_white_gaps():
    black = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    image = grid_of([black, black[:1]])
    assert image.size == (2 * 64 + 3 * 2, 2 * 64 + 3 * 2)  # gaps of 2 pixels
    assert image.getpixel((30, 100)) == (0, 0, 0)
    assert image.getpixel((100, 100)) == (255, 255, 255)  # the second row has one image
    # Small images are enlarged by a whole factor: 64 // 28 = 2.
    assert grid_of([torch.zeros(2, 1, 28, 28, dtype=torch.uint8)]).size == (2 * 56 + 3 * 2, 56 + 2 * 2)


def test_a_folder_with_files_of_others_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="mine holds other files than drawn images"):
            ImageFolder(tmp_path / "mine", overwrite)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / MARK).write_text("{}")
    with pytest.raises(ValueError, match="own exists: --overwrite replaces it"):
        ImageFolder(tmp_path / "own", False)
    ImageFolder(tmp_path / "own", True)
    (tmp_path / "empty").mkdir()
    ImageFolder(tmp_path / "empty", False)
