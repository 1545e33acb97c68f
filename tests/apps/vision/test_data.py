"""Images to batches, on files of a few images made on the spot."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from apps.vision.augment import BatchRandAugment, crop_and_flip, mix, random_erase, random_resized_crop
from apps.vision.data import VISION_DATASETS, ImageBatch, VisionData
from apps.vision.readers import read_idx, read_image, stratified_split

# --- files ---


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train: int = 40, test: int = 20, zipped: bool = True) -> Path:
    """Image n is n everywhere, its label n % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        n = np.arange(count)
        for kind, array in (("images-idx3", np.tile(n[:, None, None], (1, 28, 28))), ("labels-idx1", n % 10)):
            name, content = f"{prefix}-{kind}-ubyte", idx(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_images(
    folder: Path, split: str, per_class: int, side: int = 8, classes: tuple[str, ...] = ("a", "b")
) -> None:
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.full((side, side, 3), 10 * i + label, np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def ready(dataset: str, root: Path | None = None, **options: Any) -> VisionData:
    data = VisionData(dataset, root=None if root is None else str(root), **{"seed": 0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def pixels(batch: ImageBatch, data: VisionData) -> Tensor:
    """The images before normalising, 0 to 255."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    return ((batch.image * std + mean) * 255).round()


def indices(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch.index.tolist()]


# --- datasets ---


def test_digits() -> None:
    data = ready("digits", batch_size=2000, val_size=0.1)
    batch = next(iter(data.train_dataloader()))
    val, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    # 1797 images: 359 (20 %) for testing, 144 (10 % of the other 1438) for validation
    assert len(batch.label) == 1438 - 144
    assert batch.image.shape == (1294, 1, 8, 8)
    assert batch.image.dtype == torch.float32
    assert batch.label.dtype == batch.index.dtype == torch.int64
    assert abs(batch.image.mean()) < 0.02
    assert abs(batch.image.std() - 1) < 0.02
    every = torch.cat([batch.index, val.index, test.index, *[b.index for b in list(data.test_dataloader())[1:]]])
    assert every.sort().values.tolist() == list(range(1797))
    assert (data.num_classes, data.in_chans, data.image_size) == (10, 1, 8)
    assert data.class_names == tuple("0123456789")
    # every class has its share: 178 to 183 of 1797 images, so 14 or 15 of 144
    assert set(val.label.bincount().tolist()) <= {14, 15}


@pytest.mark.parametrize(
    "layout, zipped", [("", True), ("", False), ("FashionMNIST/raw", False), ("FashionMNIST/raw", True)]
)
def test_fashion_mnist_in_every_layout(tmp_path: Path, layout: str, zipped: bool) -> None:
    write_mnist(tmp_path / layout, zipped=zipped)
    if layout and zipped:
        (tmp_path / layout / "train-images-idx3-ubyte").touch()  # torchvision keeps both; the plain ones count
        write_mnist(tmp_path / layout, zipped=False)
    data = ready("fashion_mnist", tmp_path, batch_size=8, val_size=10)
    assert data.class_names[9] == "Ankle boot"
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert torch.equal(batch.label, batch.index % 10)
            assert torch.equal(pixels(batch, data)[:, 0, 0, 0].long(), batch.index)
    assert len(data.train_dataloader()) == 4  # 30 images: 8 + 8 + 8 + 6
    assert next(iter(data.val_dataloader())).label.bincount().tolist() == [1] * 10


def test_mnist5k_is_a_table(tmp_path: Path) -> None:
    rows = [",".join(["0"] * 783 + [str(i), str(i % 10)]) for i in range(50)]
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    data = ready("mnist5k", tmp_path, val_size=0.25)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.label) == 30  # 50 - 10 for testing, a quarter of 40 for validation
    assert torch.equal(pixels(batch, data)[:, 0, 27, 27].long(), batch.index)
    assert next(iter(data.test_dataloader())).label.bincount().tolist() == [1] * 10


@pytest.mark.parametrize("name, key, classes", [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)])
def test_cifar_batches(tmp_path: Path, name: str, key: str, classes: int) -> None:
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = "test_batch" if name == "cifar10" else "test"
    folder = tmp_path / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir()
    for n, file in enumerate([*train, test]):
        data = np.tile(np.arange(3, dtype=np.uint8).repeat(1024) + n, (20, 1))  # channel c is n + c
        (folder / file).write_bytes(pickle.dumps({"data": data, key: [0, classes - 1] * 10}, protocol=2))
    data = ready(name, tmp_path, val_size=0, batch_size=10)
    assert (data.num_classes, data.in_chans, data.image_size) == (classes, 3, 32)
    assert data.val_dataloader() == []
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(pixels(batch, data)[:, :, 0, 0].long(), batch.index[:, None] // 20 + torch.arange(3))
    assert len(data.test_dataloader().dataset) == 20


def test_cifar_as_a_folder_of_images(tmp_path: Path) -> None:
    names = VISION_DATASETS["cifar10"].class_names
    assert names is not None
    write_images(tmp_path, "train", 4, 32, names)
    write_images(tmp_path, "test", 2, 32, names)
    data = ready("cifar10", tmp_path, val_size=10)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(pixels(batch, data)[:, 0, 0, 0].long(), 10 * (batch.index % 4) + batch.label)
    Image.fromarray(np.zeros((9, 32, 3), np.uint8)).save(tmp_path / "train/cat/odd.png")
    with pytest.raises(ValueError, match=r"odd.png is 32x9, not 32x32"):
        ready("cifar10", tmp_path)
    (tmp_path / "test/deer").rename(tmp_path / "test/elk")
    (tmp_path / "train/cat/odd.png").unlink()
    with pytest.raises(ValueError, match=r"test: its folders are not the 10 classes; they differ in deer, elk"):
        ready("cifar10", tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_folder(tmp_path: Path, num_workers: int) -> None:
    write_images(tmp_path, "train", 10)
    write_images(tmp_path, "test", 2)
    data = ready("image_folder", tmp_path, image_size=4, batch_size=20, val_size=0.2, num_workers=num_workers)
    assert (data.num_classes, data.class_names, data.in_chans) == (2, ("a", "b"), 3)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (16, 3, 4, 4)
    assert torch.equal(pixels(batch, data)[:, 0, 0, 0].long(), 10 * (batch.index % 10) + batch.label)
    assert next(iter(data.val_dataloader())).label.tolist() == [0, 0, 1, 1]
    assert next(iter(data.test_dataloader())).image.shape == (4, 3, 4, 4)


def test_validation_of_an_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 10)
    write_images(tmp_path, "val", 3)
    # as ImageNet: val is what is tested on, and a tenth of train is held out
    data = ready("image_folder", tmp_path, image_size=8)
    assert [len(s) for s in data._sets] == [18, 2, 6]
    # with both, val is for validation, unless val_size asks for some of train
    write_images(tmp_path, "test", 2)
    assert [len(s) for s in ready("image_folder", tmp_path, image_size=8)._sets] == [20, 6, 4]
    assert [len(s) for s in ready("image_folder", tmp_path, image_size=8, val_size=4)._sets] == [16, 4, 4]
    (tmp_path / "test/b").rename(tmp_path / "test/c")
    with pytest.raises(ValueError, match=r"test: its classes are not those of train; they differ in b, c"):
        ready("image_folder", tmp_path)


def test_held_out_images_come_without_random_crops(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_images(tmp_path, name, 10, side=16)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for path in tmp_path.glob("*/*/*.png"):
        Image.fromarray(ramp).save(path)
    data = ready("image_folder", tmp_path, image_size=16, val_size=0.5, random_resized_crop=0.1)
    ramps = torch.from_numpy(ramp).permute(2, 0, 1).float()
    assert not torch.equal(pixels(next(iter(data.train_dataloader())), data)[0], ramps)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.train_eval_dataloader()):
        for image in pixels(next(iter(loader)), data):
            assert torch.equal(image, ramps)


def test_stratified_split_keeps_the_shares() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    chosen, rest = stratified_split(labels, 3, seed=0)
    assert sorted(labels[chosen].tolist()) == [0, 0, 1]
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(9))
    assert torch.equal(stratified_split(labels, 3, seed=0)[0], chosen)
    splits = {tuple(stratified_split(labels, 3, seed=s)[0].tolist()) for s in range(20)}
    assert len(splits) > 10  # of 15 * 3
    assert [len(p) for p in stratified_split(labels, 0, seed=0)] == [0, 9]


def test_subset_and_splits_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    a, b = (ready("mnist", root, val_size=10, subset=20, seed=s) for s in (0, 1))
    assert sorted(indices(a.train_dataloader())) == sorted(indices(b.train_dataloader()))
    assert indices(a.train_dataloader()) != indices(b.train_dataloader())
    assert indices(a.val_dataloader()) == indices(b.val_dataloader())
    assert not set(indices(a.train_dataloader())) & set(indices(a.val_dataloader()))
    c = ready("mnist", root, val_size=10, subset=20, split_seed=1)
    assert indices(a.val_dataloader()) != indices(c.val_dataloader())


# --- corrupt files ---


def test_idx_by_hand(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    assert read_idx(tmp_path / "x").tolist() == [[1, 2, 3], [4, 5, 255]]


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
    with pytest.raises(ValueError, match=rf"{name} is corrupt: .*{rule}") as caught:
        ready("mnist", root)
    assert "\n" not in str(caught.value)


def test_other_corrupt_files(tmp_path: Path) -> None:
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(ValueError, match=r"mnist_5k.csv.gz is corrupt: 3 columns, not 784 pixels and a label"):
        ready("mnist5k", tmp_path)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(b"1,2,three\n"))
    with pytest.raises(ValueError, match=r"mnist_5k.csv.gz is corrupt: it is not a table of numbers"):
        ready("mnist5k", tmp_path)
    whole = gzip.compress(b"1,2,3\n" * 100)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(whole[:-9])
    cut = r"mnist_5k.csv.gz is corrupt: it is truncated or no gzip file \(.*\)"
    with pytest.raises(ValueError, match=rf"\A[^ ]*{cut}\Z"):  # once, and none of our business to delete
        ready("mnist5k", tmp_path)
    cached = tmp_path / "cache" / "mnist5k" / "mnist_5k.csv.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"\A[^ ]*{cut}; delete it to have it fetched again\Z"):
        ready("mnist5k", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(ValueError, match=r"photo.jpg is corrupt"):
        read_image(str(tmp_path / "photo.jpg"))
    write_images(tmp_path, "train", 1)
    with pytest.raises(ValueError, match=r"holds no test/\*/\*"):
        ready("image_folder", tmp_path)
    write_images(tmp_path, "test", 1)
    (tmp_path / "test/b/0.png").unlink()
    with pytest.raises(ValueError, match=r"is no image folder: Found no valid file for the classes b"):
        ready("image_folder", tmp_path)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "colour.png"])
def test_sixteen_bits_become_the_upper_eight(tmp_path: Path, name: str) -> None:
    # 0x1234 is 0x12 = 18, 0xFFFF is 255, and what an 8-bit file holds, 7, is in the lower bits: 0.
    values = np.array([[0x1234, 0xFFFF, 7]], np.uint16)
    path = tmp_path / name
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
    assert (read.dtype, read.shape) == (torch.uint8, (3, 1, 3))
    assert read[:, 0].tolist() == [[18, 255, 0]] * 3


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_by_name(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'x.tif'} has pixels of 32 bits \(mode [FI]\)"):
        read_image(str(tmp_path / "x.tif"))


def test_an_image_too_large_for_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "x.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'x.tif'} is too large: .*100 pixels"):
        read_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("shape", [(2, 12000), (12000, 2), (5, 40), (12, 10)])
def test_a_strip_is_cut_before_it_is_scaled(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = []
    real = v2.functional.resize_image
    monkeypatch.setattr(v2.Resize, "transform", lambda self, x, _: scaled.append(x.shape) or real(x, self.size))
    image = torch.randint(256, (3, *shape), dtype=torch.uint8)
    found = VisionData("image_folder", root=".", image_size=4)._file_transform(train=False)(image)
    assert found.shape == (3, 4, 4)
    assert max(scaled[0]) <= 8 * min(shape)
    # As scaled whole: (2, 12000) by 2 to (4, 24000).
    assert torch.equal(found, v2.functional.center_crop(real(image, [4]), [4, 4]))


def test_a_pickle_may_hold_arrays_only(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / file).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"data_batch_1 is corrupt: .*it holds a posix.mkdir"):
        ready("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


# --- random transforms ---


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    padded = F.pad(image, (1, 1, 1, 1))[0, 0]
    windows = {tuple(padded[y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    torch.manual_seed(0)
    crops = {tuple(c.flatten().tolist()) for c in crop_and_flip(image.expand(200, 1, 3, 3), padding=1)}
    assert crops == windows  # all nine, each image by itself
    flips = {tuple(c.flatten().tolist()) for c in crop_and_flip(image.expand(50, 1, 3, 3), flip=True)}
    assert flips == {(1, 2, 3, 4, 5, 6, 7, 8, 9), (3, 2, 1, 6, 5, 4, 9, 8, 7)}
    assert crop_and_flip(image) is image


def test_channels_stay_together() -> None:
    grey = torch.randint(0, 255, (16, 1, 6, 6), dtype=torch.uint8)
    rgb = torch.cat([grey, grey, grey], 1)
    for out in (crop_and_flip(rgb, 2, True), random_resized_crop(rgb, 0.3), random_erase(rgb.float(), 1.0)):
        assert out.shape == rgb.shape
        assert torch.equal(out[:, 0], out[:, 2])


def test_a_resized_crop_magnifies_a_part() -> None:
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(64, 1, 16, 16)  # 10 a column
    torch.manual_seed(0)
    out = random_resized_crop(ramp, 0.25)[:, 0, 8].float()
    slope = (out[:, 12] - out[:, 4]) / 8
    # a box of relative width w has slope 10 w: from 10 * sqrt(0.25 * 3/4) = 4.3 to 10
    assert slope.min() >= 4
    assert slope.max() <= 10
    assert slope.max() - slope.min() > 3


def test_erasing_is_a_box_of_zeros() -> None:
    torch.manual_seed(0)
    images = torch.ones(64, 2, 16, 16)
    erased = random_erase(images, 0.5)
    share = (erased == 0).float().mean((1, 2, 3))
    hit = share > 0
    assert 20 < hit.sum() < 44
    assert share[hit].min() >= 0.01
    assert share[hit].max() <= 0.36  # a third, rounded to whole pixels
    for image in erased[hit][:, 0]:
        rows, cols = (image == 0).nonzero(as_tuple=True)
        assert (image == 0).sum() == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
    assert torch.equal(random_erase(images, 0.0), images)


def test_mixing_is_the_same_for_image_and_label() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone()  # image n is n everywhere
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        for _ in range(10):
            mixed, soft = mix(images, labels, 5, *alphas)
            assert soft.shape == (4, 5)
            torch.testing.assert_close(soft.sum(1), torch.ones(4))
            # the mean pixel is lambda * n + (1 - lambda) * neighbour, and so is the mean label
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(5.0))


def test_randaugment_draws_for_each_image() -> None:
    class Brightness(BatchRandAugment):
        _AUGMENTATION_SPACE: ClassVar = {"Brightness": v2.RandAugment._AUGMENTATION_SPACE["Brightness"]}

    torch.manual_seed(0)
    images = torch.full((32, 3, 4, 4), 100, dtype=torch.uint8)
    # magnitude 10 of 0..30 is 0.9 / 3 = 0.3: 130 or 70
    assert set(Brightness(1, 10, 31)(images).unique().tolist()) == {70, 130}
    noise = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    out = BatchRandAugment(2, 9, 31)(noise)
    assert out.shape == noise.shape
    assert out.dtype == torch.uint8
    assert len({tuple(o.flatten().tolist()) for o in BatchRandAugment(1, 9, 31)(noise[:1].expand(64, -1, -1, -1))}) > 10


ALL = {
    "crop_padding": 2,
    "horizontal_flip": True,
    "random_resized_crop": 0.5,
    "randaugment_ops": 2,
    "random_erasing": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
}


def test_every_option_together(tmp_path: Path) -> None:
    data = ready("fashion_mnist", write_mnist(tmp_path), batch_size=16, image_size=32, **ALL)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (16, 1, 32, 32)
    assert batch.image.isfinite().all()
    assert batch.label.shape == (16, 10)
    val = next(iter(data.val_dataloader()))
    assert val.image.shape == (4, 1, 32, 32)
    assert val.label.dtype == torch.int64


# --- order and resuming ---


def same(a: list[ImageBatch], b: list[ImageBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path, kind: str) -> None:
    if kind == "memory":
        name, root = "fashion_mnist", write_mnist(tmp_path)
    else:
        name, root = "image_folder", tmp_path
        for split in ("train", "test"):
            write_images(tmp_path, split, 20)
    options = {"batch_size": 8, "image_size": 28, **ALL}

    def run(epoch: int = 0, **changes: Any) -> list[ImageBatch]:
        loader = ready(name, root, **{**options, **changes}).train_dataloader()
        loader.batch_sampler.sampler.set_epoch(epoch)
        return list(loader)

    torch.manual_seed(0)
    first, state = run(), torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(7)
    assert same(first, run())
    assert same(first, run(num_workers=1))
    assert not same(first, run(epoch=1))
    assert not same(first, run(seed=1))
    # nor do they move the generator of the model
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_continues_in_mid_epoch(tmp_path: Path, num_workers: int) -> None:
    root = write_mnist(tmp_path)
    options = {"batch_size": 8, "num_workers": num_workers, **ALL}
    whole = list(ready("mnist", root, **options).train_dataloader())
    loader = ready("mnist", root, **options).train_dataloader()
    batches = iter(loader)
    before = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    resumed = ready("mnist", root, **options).train_dataloader()
    resumed.load_state_dict(state)
    assert same(before + list(resumed), whole)


class Probe(LightningModule):
    """Logistic regression that notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen: list[list[int]] = []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch.index.tolist())
        return F.cross_entropy(self.layer(batch.image.flatten(1)), batch.label)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.layer(batch.image.flatten(1)), batch.label))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.seen.append(batch.index.tolist())

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        return batch.index

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, devices=1, **{**quiet, **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 4, 5, 7, 10])  # 5 batches an epoch: in the middle and at the ends
def test_a_run_resumed_through_lightning_is_the_unbroken_run(tmp_path: Path, steps: int) -> None:
    root = write_mnist(tmp_path / "data")
    options = {"batch_size": 8, "val_size": 4, **ALL}
    unbroken = Probe()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_epochs=3, callbacks=[saver]).fit(unbroken, ready("mnist", root, **options))
    (checkpoint,) = tmp_path.glob(f"step={steps}.ckpt")
    resumed = Probe()
    fit = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    fit.fit(resumed, ready("mnist", root, **options), ckpt_path=checkpoint, weights_only=True)
    assert resumed.seen == unbroken.seen[steps:]
    assert torch.equal(resumed.layer.weight, unbroken.layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tests_and_predicts_each_image_once(tmp_path: Path) -> None:
    data = ready("mnist", write_mnist(tmp_path), eval_batch_size=8)
    probe, run = Probe(), trainer(tmp_path, enable_checkpointing=False)
    run.test(probe, data, verbose=False)
    assert sorted(i for batch in probe.seen for i in batch) == list(range(20))
    assert sorted(torch.cat(run.predict(probe, data)).tolist()) == list(range(20))


def test_batches_of_an_evaluation_hold_all_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path, split, 8)
    data = ready("image_folder", tmp_path, image_size=8, eval_batch_size=8, val_size=0.5)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.train_eval_dataloader()):
        assert all(set(batch.label.tolist()) == {0, 1} for batch in loader)  # the files are 8 of one, 8 of the other
        assert indices(loader) == indices(loader)
    for batch in data.test_dataloader():
        assert torch.equal(batch.label, batch.index // 8)


# --- predicting ---


def test_images_without_labels_are_found_in_all_folders_below(tmp_path: Path) -> None:
    for name, grey in (("b/2.png", 20), ("a/deep/1.PNG", 10), ("3.png", 30)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 6, 3), grey, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    data = VisionData("digits", predict_folder=str(tmp_path))
    data.setup("predict")
    assert data._sets is None  # the digits are not read
    (batch,) = data.predict_dataloader()
    assert batch.image.shape == (3, 1, 8, 8)
    found = dict(zip(data.predicted_paths(batch.index), pixels(batch, data)[:, 0, 0, 0].tolist(), strict=True))
    assert found == {str(tmp_path / n): g for n, g in (("3.png", 30), ("a/deep/1.PNG", 10), ("b/2.png", 20))}
    assert VisionData("digits").predicted_paths(batch.index) is None
    for folder, rule in ((tmp_path / "gone", "is no folder"), (tmp_path / "b" / "none", "holds no image")):
        if "none" in folder.name:
            folder.mkdir()
        with pytest.raises(ValueError, match=rf"predict_folder={folder} {rule}; images end in \.jpg"):
            VisionData("digits", predict_folder=str(folder)).predict_dataloader()


def test_ranks_share_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, 40 images: 14 each, so 2 are seen twice and every process makes as many steps."""
    import torch.distributed as dist

    root = write_mnist(tmp_path)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        seen.append(indices(ready("mnist", root, val_size=0, batch_size=4).train_dataloader()))
    assert [len(s) for s in seen] == [14] * 3
    assert sorted({i for s in seen for i in s}) == list(range(40))


def test_drop_last(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    assert len(ready("mnist", root, val_size=0, batch_size=16).train_dataloader()) == 3  # 16 + 16 + 8
    assert len(ready("mnist", root, val_size=0, batch_size=16, drop_last=True).train_dataloader()) == 2


# --- options ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "fashionmnist"}, r"dataset='fashionmnist' is not one of .*; did you mean 'fashion_mnist'\?"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"subset": 0}, "subset=0 must be at least 1"),
        ({"mixup_alpha": -0.1}, "mixup_alpha=-0.1 must not be negative"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha=-1.0 must not be negative"),
        ({"crop_padding": -1}, "crop_padding=-1 must not be negative"),
        ({"val_size": 1.0}, "val_size=1.0 as a share must be at least 0 and below 1"),
        ({"val_size": -5}, "val_size=-5 must not be negative"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude=31 must be 0 to 30"),
        ({"random_erasing": 1.5}, "random_erasing=1.5 must be a probability, 0 to 1"),
        ({"random_resized_crop": 0.0}, "random_resized_crop=0.0 must be above 0"),
        ({"eval_crop": 0.875}, "eval_crop=0.875 is for folders of images; digits is never cropped"),
        ({"mean": (0.5, 0.5, 0.5)}, r"mean=\(0.5, 0.5, 0.5\) has 3 values for 1 channels"),
        ({"std": (0.0,)}, r"std=\(0.0,\) must be positive"),
    ],
)
def test_a_wrong_option_names_value_and_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionData(**options)


def test_what_only_the_data_can_tell(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    with pytest.raises(ValueError, match="val_size=40 leaves none of the 40 training images"):
        ready("mnist", root, val_size=40)
    with pytest.raises(ValueError, match="subset=37 exceeds the 36 training images"):
        ready("mnist", root, subset=37)
    with pytest.raises(ValueError, match="batch_size=100 exceeds the 36 training examples"):
        ready("mnist", root, batch_size=100, drop_last=True).train_dataloader()


def test_num_classes_of_a_folder_needs_root() -> None:
    with pytest.raises(ValueError, match=r"image_folder cannot be fetched: set root"):
        VisionData("image_folder").num_classes  # noqa: B018
