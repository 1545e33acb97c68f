"""The datasets that have a name, in every layout; folders of images, of a user's too; splits."""

import dataclasses
import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made_images import indices, pixels, ready, write_images, write_mnist
from PIL import Image
from refusals import refused

from apps.data.given import GivenData
from apps.vision.data import VisionData
from apps.vision.datasets import VISION_DATASETS
from apps.vision.image_set import stratified_split
from apps.vision.own_data import config_for


def test_digits_and_mnist5k(tmp_path: Path) -> None:
    data = ready("digits", batch_size=2000, val_size=0.1)
    batch = next(iter(data.train_dataloader()))
    val, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    # 1797 images: 359 (20 %) for testing, 144 (10 % of the other 1438) for validation
    assert (len(batch.label), batch.image.shape, batch.image.dtype) == (1438 - 144, (1294, 1, 8, 8), torch.float32)
    assert batch.label.dtype == batch.index.dtype == torch.int64
    assert abs(batch.image.mean()) < 0.02
    assert abs(batch.image.std() - 1) < 0.02
    every = torch.cat([batch.index, val.index, test.index, *[b.index for b in list(data.test_dataloader())[1:]]])
    assert every.sort().values.tolist() == list(range(1797))
    assert (data.num_classes, data.in_chans, data.image_size, data.class_names) == (10, 1, 8, tuple("0123456789"))
    # every class has its share: 178 to 183 of 1797 images, so 14 or 15 of 144
    assert set(val.label.bincount().tolist()) <= {14, 15}
    rows = [",".join(["0"] * 783 + [str(i), str(i % 10)]) for i in range(50)]
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    data = ready("mnist5k", tmp_path, val_size=0.25)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.label) == 30  # 50 - 10 for testing, a quarter of 40 for validation
    assert torch.equal(pixels(batch, data)[:, 0, 27, 27].long(), batch.index)
    assert next(iter(data.test_dataloader())).label.bincount().tolist() == [1] * 10


@pytest.mark.parametrize("layout, zipped", [("", True), ("FashionMNIST/raw", False), ("FashionMNIST/raw", True)])
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
    assert (data.num_classes, data.in_chans, data.image_size, data.val_dataloader()) == (classes, 3, 32, [])
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
    refused(r"odd.png is 32x9, not 32x32", ready, "cifar10", tmp_path)
    (tmp_path / "test/deer").rename(tmp_path / "test/elk")
    (tmp_path / "train/cat/odd.png").unlink()
    refused(r"test: its folders are not the 10 classes; they differ in deer, elk", ready, "cifar10", tmp_path)


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
    assert list(ready("image_folder", tmp_path, image_size=8).sizes().values()) == [18, 2, 6]
    # with both, val is for validation, unless val_size asks for some of train
    write_images(tmp_path, "test", 2)
    assert list(ready("image_folder", tmp_path, image_size=8).sizes().values()) == [20, 6, 4]
    assert list(ready("image_folder", tmp_path, image_size=8, val_size=4).sizes().values()) == [16, 4, 4]
    (tmp_path / "test/b").rename(tmp_path / "test/c")
    refused(r"test: its classes are not those of train; they differ in b, c", ready, "image_folder", tmp_path)


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


def test_splits_keep_the_shares_and_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    chosen, rest = stratified_split(labels, 3, seed=0)
    assert sorted(labels[chosen].tolist()) == [0, 0, 1]
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(9))
    assert torch.equal(stratified_split(labels, 3, seed=0)[0], chosen)
    splits = {tuple(stratified_split(labels, 3, seed=s)[0].tolist()) for s in range(20)}
    assert len(splits) > 10  # of 15 * 3
    assert [len(p) for p in stratified_split(labels, 0, seed=0)] == [0, 9]
    root = write_mnist(tmp_path)
    a, b = (ready("mnist", root, val_size=10, subset=20, seed=s) for s in (0, 1))
    assert sorted(indices(a.train_dataloader())) == sorted(indices(b.train_dataloader()))
    assert indices(a.train_dataloader()) != indices(b.train_dataloader())
    assert indices(a.val_dataloader()) == indices(b.val_dataloader())
    assert not set(indices(a.train_dataloader())) & set(indices(a.val_dataloader()))
    c = ready("mnist", root, val_size=10, subset=20, split_seed=1)
    assert indices(a.val_dataloader()) != indices(c.val_dataloader())


def write_noise(folder: Path, count: int, side: int = 20) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((side, side + 4, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")


def given(root: Path, tmp_path: Path) -> GivenData:
    return GivenData((root,), None, tmp_path / "made")


def test_a_quarter_of_each_class_is_held_out_or_a_test_split_of_its_own_taken(tmp_path):
    for name, count in (("cat", 12), ("dog", 8)):
        write_noise(tmp_path / "photos" / name, count)
    made = config_for(given(tmp_path / "photos", tmp_path))
    assert made.notes == ("A quarter of the images of each of the 2 classes is held out for the test.",)
    arguments = made.config["data"]["init_args"]
    assert (arguments["image_size"], arguments["batch_size"], made.config["trainer"]["max_epochs"]) == (32, 32, 60)
    # A comparison gets experts, and a person a dense network with the experts in a comment.
    shown = config_for(dataclasses.replace(given(tmp_path / "photos", tmp_path), in_place=True))
    sparse, dense = (one.config["model"]["init_args"] for one in (made, shown))
    assert (made.verdict, shown.verdict) == (None, ())
    comment = yaml.safe_load("\n".join(shown.above["model", "init_args", "label_smoothing"][1:]))
    assert {**dense, **comment} == sparse
    assert list(comment) == ["moe", "moe_blocks"]
    data = VisionData(**arguments)
    # 12 / 4 + 8 / 4 test; a tenth of the other 15, rounded, validates.
    assert data.sizes() == {"train": 13, "val": 2, "test": 5}
    assert config_for(given(tmp_path / "photos", tmp_path)).config == made.config  # again, from the same links
    for split, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            write_noise(tmp_path / "split" / split / name, count, side=50)
    made = config_for(given(tmp_path / "split", tmp_path))
    assert (made.notes, made.config["data"]["init_args"]["root"]) == ((), str(tmp_path / "split"))
    assert made.config["data"]["init_args"]["image_size"] == 64
    assert made.config["model"]["init_args"]["conv"]["widths"] == [24, 48, 96, 192]


@pytest.mark.parametrize("splits", [("Test", "Train"), ("test", "train", "validation"), ("test", "val")])
def test_splits_of_other_names_are_no_classes(tmp_path, splits):
    for split in splits:
        for name in ("cat", "dog"):
            write_noise(tmp_path / "photos" / split / name, 8)
    rule = f"holds {', '.join(splits)}, which are no classes: rename .* train, val, test"
    refused(rule, config_for, given(tmp_path / "photos", tmp_path))
    # With a folder of another name, or with images of their own, they may be classes.
    write_noise(tmp_path / "photos" / "third", 8)
    assert config_for(given(tmp_path / "photos", tmp_path)) is not None


def test_other_folders_are_not_images_and_wrong_ones_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert config_for(given(empty, tmp_path)) is None
    write_noise(tmp_path / "one" / "cat", 8)
    refused("holds images in 1 folders of classes", config_for, given(tmp_path / "one", tmp_path))
    write_noise(tmp_path / "one" / "dog", 3)
    refused("dog holds 3 images: a class needs 8 at least", config_for, given(tmp_path / "one", tmp_path))
    (tmp_path / "one" / "dog").rename(tmp_path / "dog")
    write_noise(tmp_path / "one" / "ox", 8)
    (tmp_path / "one" / "cat" / "0.png").write_text("no image")
    refused(r"0\.png cannot be read as an image", config_for, given(tmp_path / "one", tmp_path))
