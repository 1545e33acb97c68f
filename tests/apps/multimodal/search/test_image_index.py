"""The vectors of a folder's images are made anew only where an image or the model has changed."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from tinted import Tinted, write_tinted
from torch.testing import assert_close

from apps.multimodal.search.image_index import ImageIndex, model_digest, refreshed
from apps.multimodal.search.vectors import FolderImages, vectors_of_pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tinted(tmp_path / "photos", "a/red.png", "b/green.png", "blue.png")
    return tmp_path / "photos"


class Refresher:
    """Refreshes the index of a folder, in a cache of its own; ``encoded`` are the paths that the last time encoded."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.folder, self.cache, self.options = folder, folder.parent / "cache", options
        self.model, self.encoded = Tinted(), list[str]()

    def __call__(self, made_by: str = "one", path: Path | None = None) -> ImageIndex:
        self.encoded = []

        def encode(paths):
            self.encoded += paths
            images = FolderImages(self.folder, paths, self.model.encoding, **self.options)
            for i in range(len(paths)):
                batch = images.__getitems__([i])
                yield batch.index, vectors_of_pixels(self.model, batch.pixels).detach(), batch.complaints

        return refreshed(self.folder, path, self.cache, made_by, encode)


@pytest.fixture
def refresh(folder: Path) -> Refresher:
    return Refresher(folder)


def test_only_what_is_new_or_changed_is_encoded_again(refresh, folder):
    index = refresh()
    assert (index.paths, index.num_encoded) == (["a/red.png", "b/green.png", "blue.png"], 3)
    assert_close(index.vectors_ND, torch.eye(3))
    assert (refresh().paths, refresh.encoded) == (["a/red.png", "b/green.png", "blue.png"], [])
    write_tinted(folder, "c/purple.png")
    assert (refresh().num_encoded, refresh.encoded) == (1, ["c/purple.png"])
    (folder / "blue.png").write_bytes((folder / "c/purple.png").read_bytes() + b"\0")  # other content
    index = refresh()
    assert refresh.encoded == ["blue.png"]
    assert_close(index.vectors_ND[2], torch.tensor([0.8, 0.0, 0.6]))
    (folder / "a/red.png").unlink()
    index = refresh()
    assert (index.paths, refresh.encoded) == (["b/green.png", "blue.png", "c/purple.png"], [])
    assert_close(index.vectors_ND[0], torch.tensor([0.0, 1.0, 0.0]))


def test_moved_images_keep_their_vectors_and_another_model_encodes_all(refresh, folder):
    refresh()
    os.utime(folder / "a/red.png", ns=(1, 1))
    (folder / "blue.png").rename(folder / "azure.png")
    shutil.copy(folder / "b/green.png", folder / "z.png")
    index = refresh()
    assert (index.paths, refresh.encoded) == (["a/red.png", "azure.png", "b/green.png", "z.png"], [])
    assert_close(index.vectors_ND, torch.eye(3)[[0, 2, 1, 1]])
    assert (refresh().files[0].mtime_ns, refresh("two").num_encoded, refresh("two").num_encoded) == (1, 4, 0)
    encoding = Tinted().encoding
    assert model_digest("w", encoding) != model_digest("v", encoding)
    assert model_digest("w", encoding) != model_digest("w", type(encoding)(**{**vars(encoding), "image_size": 5}))
    assert model_digest("w", encoding) == model_digest("w", Tinted(max_tokens=4).encoding)  # no matter of an image


def test_unreadable_images_are_left_out_with_a_line_and_tried_again(refresh, folder, caplog):
    (folder / "bad.png").write_text("no image")
    assert refresh().paths == ["a/red.png", "b/green.png", "blue.png"]
    assert caplog.messages == [f"left out: {folder}/bad.png is corrupt: it is no image"]
    (folder / "bad.png").write_bytes((folder / "a/red.png").read_bytes() + b"\0")
    assert (refresh().num_encoded, refresh.encoded) == (1, ["bad.png"])
    caplog.clear()
    for i in range(23):
        (folder / f"{i}.png").write_text("no image")
    refresh()
    assert (len(caplog.messages), caplog.messages[-1]) == (21, "left out: 3 more images that cannot be read")


def test_an_error_keeps_what_was_encoded_before_it_and_folders_need_an_image(folder, tmp_path):
    (folder / "b/bad.png").write_text("no image")
    refresh = Refresher(folder, on_bad_image="error")
    for encoded in (["a/red.png", "b/bad.png", "b/green.png", "blue.png"], ["b/bad.png", "b/green.png", "blue.png"]):
        refused(r"b/bad\.png is corrupt: it is no image; data\.on_bad_image=skip leaves", refresh)
        assert refresh.encoded == encoded
    refused("none' is no folder", Refresher(tmp_path / "none"))
    photos = tmp_path / "empty"
    photos.mkdir()
    for name in (".hidden.png", "note.txt"):
        (photos / name).write_text("")
    refused(r"empty' holds no image; images end in \.jpg, ", Refresher(photos))
    (photos / "a.png").write_text("")
    refused(r"none of the 1 images of .* can be read: .*a\.png is corrupt", Refresher(photos))


def test_a_damaged_index_of_the_cache_is_made_anew_and_a_named_file_stays(refresh, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    refresh()
    (file,) = (refresh.cache / "image_vectors").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    assert refresh().num_encoded == 3
    assert "holds no index of images" in caplog.text
    assert "all images are encoded again" in caplog.text
    save_file({"w": torch.ones(1)}, own := tmp_path / "weights.safetensors")
    content = own.read_bytes()
    refused(r"it is another safetensors file: it stays as it is; give data\.index", refresh, path=own)
    assert (own.read_bytes(), refresh(path=tmp_path / "own.safetensors").num_encoded) == (content, 3)
    assert refresh(path=tmp_path / "own.safetensors").num_encoded == 0
    (tmp_path / "file").write_text("")
    refused("cannot be written: File exists", refresh, path=tmp_path / "file" / "below.safetensors")


def test_names_need_not_be_utf_8_and_links_are_walked_once(refresh, folder, caplog):
    name = os.fsdecode(b"red\xff.png")
    shutil.copy(folder / "a/red.png", folder / name)
    for _ in range(2):
        assert name in refresh().paths
    assert refresh.encoded == []
    (folder / name).unlink()
    (folder / "a" / "up").symlink_to(folder)  # a cycle, and a link that leads nowhere
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    with caplog.at_level(logging.WARNING, "apps"):
        assert refresh().paths == ["a/red.png", "b/green.png", "blue.png"]
    assert caplog.messages == [f"left out: {folder}/a/gone.png cannot be read: No such file or directory"]
    refresh.options = {"on_bad_image": "error"}
    refused(r"gone\.png cannot be read: .*; data\.on_bad_image=skip leaves such images", refresh)
