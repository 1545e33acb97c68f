"""Files of images: their pixels, and the message about one that cannot be read."""

import gzip
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import idx, ready, write_images, write_mnist
from PIL import ExifTags, Image, ImageOps
from refusals import refused
from torchvision.transforms import v2

from apps.vision import image_files
from apps.vision.data import VisionData
from apps.vision.image_files import image_of, read_image, to_pixels
from apps.vision.readers import read_idx


def test_idx_by_hand_and_a_small_archive_of_too_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    assert read_idx(tmp_path / "x").tolist() == [[1, 2, 3], [4, 5, 255]]
    # Gzip files may be joined: 257 of 1 MiB of zeros, about 1 KiB each, pass the 256 MiB that any file may unpack to.
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)) * 257)
    refused(rf"^{path} is compressed over \d+ times .* at most 200 times is read", read_idx, path)


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((40, 28, 28))))[:60], "truncated or no gzip file"),
        ("train-images-idx3-ubyte.gz", b"<html>not found</html>", "truncated or no gzip file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x0d\3" + bytes(12)), "rank of 1 to 4, not 00 00 0d 03"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(b""), "rank of 1 to 4, not nothing"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((20, 28, 28)))[:-5]), "says .20, 28, 28., but 15675"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((20, 784)))), "images have rank 3, not 2"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(19))), "19 labels for 20 images"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.full(40, 10))), "labels go from 0 to 9, not 10 to 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",  # gzip's bytes hold the time
)  # fmt: skip
def test_a_corrupt_file_is_named_with_the_rule(tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    root = write_mnist(tmp_path)
    (root / name).write_bytes(content)
    refused(rf"{name} is corrupt: .*{rule}", ready, "mnist", root)


def test_other_corrupt_files(tmp_path: Path) -> None:
    table = tmp_path / "mnist_5k.csv.gz"
    table.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    refused(r"mnist_5k.csv.gz is corrupt: 3 columns, not 784 pixels and a label", ready, "mnist5k", tmp_path)
    table.write_bytes(gzip.compress(b"1,2,three\n"))
    refused(r"mnist_5k.csv.gz is corrupt: it is not a table of numbers", ready, "mnist5k", tmp_path)
    whole = gzip.compress(b"1,2,3\n" * 100)
    table.write_bytes(whole[:-9])
    cut = r"mnist_5k.csv.gz is corrupt: it is truncated or no gzip file \(.*\)"
    refused(rf"\A[^ ]*{cut}\Z", ready, "mnist5k", tmp_path)  # once, and none of our business to delete
    cached = tmp_path / "cache" / "mnist5k" / "mnist_5k.csv.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(whole[:-9])
    again = rf"\A[^ ]*{cut}; delete it to have it fetched again\Z"
    refused(again, ready, "mnist5k", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    refused(r"photo.jpg is corrupt", read_image, str(tmp_path / "photo.jpg"))
    write_images(tmp_path, "train", 1)
    refused(r"holds no test/\*/\*", ready, "image_folder", tmp_path)
    write_images(tmp_path, "test", 1)
    (tmp_path / "test/b/0.png").unlink()
    refused(r"is no image folder: there is no image of b", ready, "image_folder", tmp_path)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "colour.png"])
def test_sixteen_bits_become_the_upper_eight(tmp_path: Path, name: str) -> None:
    # 0x1234 is 0x12 = 18, 0xFFFF is 255, and what an 8-bit file holds, 7, is in the lower bits: 0.
    values, path = np.array([[0x1234, 0xFFFF, 7]], np.uint16), tmp_path / name
    if name == "colour.png":  # Pillow writes none
        rows = b"\0" + values.astype(">u2")[..., None].repeat(3, 2).tobytes()
        header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    elif name == "grey.pgm":
        path.write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    read = read_image(str(path))
    assert (read.dtype, read.shape, read[:, 0].tolist()) == (torch.uint8, (3, 1, 3), [[18, 255, 0]] * 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int) -> None:
    form = ("JPEG", "PNG", "WEBP", "TIFF")[orientation % 4]  # each with two orientations
    # Quarters of 16 x 16 pixels are one color each, so that JPEG keeps them. Pillow says how each orientation is read.
    quarters = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [255, 255, 0]]])
    image, exif = Image.fromarray(quarters.astype(np.uint8).repeat(16, 0).repeat(16, 1)), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "x", form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.array(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    file = (tmp_path / "x").read_bytes()
    with Image.open(tmp_path / "x") as opened:
        ways = [read_image(str(tmp_path / "x")), to_pixels(opened, "x"), image_of(file, "x", [form], 10_000)]
    for pixels in ways:
        assert pixels.shape == expected.shape
        middles = (pixels[:, 8::16, 8::16].int() - torch.from_numpy(expected)[:, 8::16, 8::16].int()).abs()
        assert middles.max() < 16


def test_links_in_a_folder_of_images_are_followed_once(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for split in ("train", "test"):
        write_images(photos, split, 3)
    write_images(tmp_path, "elsewhere", 2, classes=("more",))
    (photos / "train/a/.git").mkdir()
    (photos / "train/.ipynb_checkpoints").mkdir()
    for hidden in ("train/a/.git/x.png", "train/a/._0.png", "train/.ipynb_checkpoints/0.png"):
        (photos / hidden).write_bytes(b"none of the images")
    for ending in ("gif", "jfif", "jpe"):
        Image.new("RGB", (8, 8)).save(photos / f"train/b/3.{ending}")
    (elsewhere / "more/back").symlink_to(elsewhere)  # a cycle outside, and three to folders above the class
    for name, target in (("up", photos), ("self", photos / "train/a"), ("split", photos / "train"), ("out", elsewhere)):
        (photos / "train/a" / name).symlink_to(target)
    (photos / "train/a/again.png").symlink_to(photos / "train/a/0.png")
    for name in "ab":
        (photos / f"train/{name}/gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "train/b/round.png").symlink_to(photos / "train/b/round.png")

    data = ready("image_folder", photos, image_size=8, val_size=0, on_bad_image="skip")
    assert data.class_names == ("a", "b")
    images = data.examples("train")
    train = [str(Path(images.read.paths[i]).relative_to(photos / "train")) for i in images.index.tolist()]
    assert train == [
        *("a/0.png", "a/1.png", "a/2.png", "a/out/more/0.png", "a/out/more/1.png"),
        *("b/0.png", "b/1.png", "b/2.png", "b/3.gif", "b/3.jfif", "b/3.jpe"),
    ]
    with pytest.raises(ValueError, match=r"cannot be read: (No such|Too many) .*on_bad_image=skip leaves"):
        list(ready("image_folder", photos, image_size=8, val_size=0).train_dataloader())
    data = VisionData("digits", predict_folder=str(photos / "train"), on_bad_image="skip")
    assert len(data.predict_dataloader().dataset) == 12  # the link again.png has a row of its own


@pytest.mark.parametrize("link", ["train/b/same.png", "test/a/same.png", "val/a/same.png"])
def test_a_file_in_two_classes_or_splits_is_named(tmp_path: Path, link: str) -> None:
    for split in ("train", "test", "val"):
        write_images(tmp_path, split, 3)
    (tmp_path / link).symlink_to(tmp_path / "train/a/1.png")
    refused(rf"/{link} and .*/train/a/1\.png are one file: .* one class and one split", ready, "image_folder", tmp_path)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_by_name(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "x.tif")
    refused(rf"{tmp_path / 'x.tif'} has pixels of 32 bits \(mode [FI]\)", read_image, str(tmp_path / "x.tif"))


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.jpg"])  # torchvision decodes the last two, whatever the size
def test_a_small_file_of_too_many_pixels_is_named_before_it_is_decoded(tmp_path: Path, name: str, monkeypatch) -> None:
    Image.new("L", (10, 10)).save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    monkeypatch.setattr("apps.vision.image_files.decode_image", None)
    refused(rf"^{tmp_path / name} is too large: .*100 pixels", read_image, str(tmp_path / name))


@pytest.mark.parametrize("shape", [(2, 12000), (12000, 2), (5, 40), (12, 10)])
def test_a_strip_is_cut_before_it_is_scaled(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scaled, real = [], v2.functional.resize_image
    monkeypatch.setattr(v2.Resize, "transform", lambda self, x, _: scaled.append(x.shape) or real(x, self.size))
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    cut = VisionData("image_folder", root=".", image_size=4)._file_transform(train=False)(image)
    assert cut.shape == (3, 4, 4)
    assert max(scaled[0]) <= 8 * min(shape)
    # Scaling the whole image, such as (2, 12000) to (4, 24000), gives the same pixels.
    assert torch.equal(cut, v2.functional.center_crop(real(image, [4]), [4, 4]))


def test_a_pickle_may_hold_arrays_only(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / file).write_bytes(pickle.dumps(Evil()))
    refused(r"data_batch_1 is corrupt: .*it holds a posix.mkdir", ready, "cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_file_is_decoded_once_if_it_is_cut_alike_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "train", per_class=3)
    write_images(tmp_path, "test", per_class=1)
    decoded: list[str] = []
    monkeypatch.setattr(image_files, "read_image", lambda path: decoded.append(path) or read_image(path))

    def read_twice(**options: Any) -> tuple[torch.Tensor, int]:
        decoded.clear()
        data = ready("image_folder", tmp_path, image_size=8, val_size=1, **options)
        first, again = (torch.cat([b.image for b in data.train_eval_dataloader()]) for _ in range(2))
        assert torch.equal(first, again)
        list(data.val_dataloader())
        return first, len(decoded)

    kept, times = read_twice()
    assert (len(kept), times) == (5, 6)
    # By forked workers too; not where each reading draws anew, or no disk is free.
    assert torch.equal(read_twice(num_workers=2)[0], kept)
    assert read_twice(random_resized_crop=0.5)[1] == 11
    monkeypatch.setattr(image_files, "_MOST_KEPT", 100)
    once, times = read_twice()
    assert torch.equal(once, kept)
    assert times == 11
