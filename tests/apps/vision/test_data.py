"""Images to batches: their random transforms, order, resuming, prediction and options."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import move_data_to_device
from made_images import EVERY_TRANSFORM, indices, pixels, ready, write_images, write_mnist
from PIL import Image
from refusals import refused
from torchvision.transforms import v2

from apps.vision.augment import (
    BatchRandAugment,
    crop_and_flip,
    draw_boxes,
    draw_mix,
    erase,
    mix,
    mix_labels,
    random_resized_crop,
)
from apps.vision.batch import ImageBatch
from apps.vision.data import VisionData


def same(a: list[ImageBatch], b: list[ImageBatch]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, chain(*a), chain(*b)))


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path, kind: str) -> None:
    if kind == "memory":
        name, root = "fashion_mnist", write_mnist(tmp_path)
    else:
        name, root = "image_folder", tmp_path
        for split in ("train", "test"):
            write_images(tmp_path, split, 20)
    options = {"batch_size": 8, "image_size": 32, **EVERY_TRANSFORM}

    def run(epoch: int = 0, **changes: Any) -> list[ImageBatch]:
        loader = ready(name, root, **{**options, **changes}).train_dataloader()
        loader.batch_sampler.sampler.set_epoch(epoch)
        return list(loader)

    torch.manual_seed(0)
    first, state = run(), torch.get_rng_state()
    torch.manual_seed(1)
    torch.rand(7)
    assert (first[0].image.shape[2:], first[0].label.ndim) == ((32, 32), 2)  # scaled, and of mixed classes
    assert first[0].image.isfinite().all()
    assert same(first, run())
    assert same(first, run(num_workers=1))
    assert not same(first, run(epoch=1))
    assert not same(first, run(seed=1))
    # nor do they move the generator of the model
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_continues_in_mid_epoch(tmp_path: Path, num_workers: int) -> None:
    root, options = write_mnist(tmp_path), {"batch_size": 8, "num_workers": num_workers, **EVERY_TRANSFORM}
    whole = list(ready("mnist", root, **options).train_dataloader())
    loader = ready("mnist", root, **options).train_dataloader()
    batches = iter(loader)
    before, state = [next(batches) for _ in range(2)], loader.state_dict()
    resumed = ready("mnist", root, **options).train_dataloader()
    resumed.load_state_dict(state)
    assert same(before + list(resumed), whole)


def test_batches_of_an_evaluation_hold_all_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path, split, 8)
    data = ready("image_folder", tmp_path, image_size=8, eval_batch_size=8, val_size=0.5)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.train_eval_dataloader()):
        assert all(set(batch.label.tolist()) == {0, 1} for batch in loader)  # the files are 8 of one, 8 of the other
        assert indices(loader) == indices(loader)
    for batch in data.test_dataloader():
        assert torch.equal(batch.label, batch.index // 8)


def test_images_without_labels_are_read_from_all_folders_below(tmp_path: Path) -> None:
    for name, grey in (("b/2.png", 20), ("a/deep/1.PNG", 10), ("3.png", 30)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 6, 3), grey, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    data = VisionData("digits", predict_folder=str(tmp_path))
    data.setup("predict")
    assert data._opened is None  # the digits are not read
    (batch,) = data.predict_dataloader()
    assert batch.image.shape == (3, 1, 8, 8)
    pixel_of_path = dict(zip(data.predicted_paths(batch.index), pixels(batch, data)[:, 0, 0, 0].tolist(), strict=True))
    assert pixel_of_path == {str(tmp_path / n): g for n, g in (("3.png", 30), ("a/deep/1.PNG", 10), ("b/2.png", 20))}
    assert VisionData("digits").predicted_paths(batch.index) is None
    (tmp_path / "none").mkdir()
    for folder, rule in ((tmp_path / "gone", "is no folder"), (tmp_path / "none", "holds no image")):
        with pytest.raises(ValueError, match=rf"predict_folder={folder} {rule}; images end in \.jpg"):
            VisionData("digits", predict_folder=str(folder)).predict_dataloader()


def test_ranks_share_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, 40 images: 14 each, so 2 are seen twice and every process makes as many steps."""
    import torch.distributed as dist

    root, seen = write_mnist(tmp_path), []
    for rank in range(3):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        seen.append(indices(ready("mnist", root, val_size=0, batch_size=4).train_dataloader()))
    assert ([len(s) for s in seen], sorted({i for s in seen for i in s})) == ([14] * 3, list(range(40)))


@pytest.mark.parametrize("options, message", [
    ({"dataset": "fashionmnist"}, r"dataset='fashionmnist' is not one of .*; did you mean 'fashion_mnist'\?"),
    ({"image_size": 0}, "image_size=0 must be at least 1"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"subset": 0}, "subset=0 must be at least 1"),
    ({"val_size": 1.0}, r"val_size=1\.0 is neither an integer nor a share below 1"),
    ({"val_size": -5}, "val_size=-5 must not be negative"),
    ({"eval_crop": 0.875}, "eval_crop=0.875 is for folders of images; digits is never cropped"),
    ({"mean": (0.5, 0.5, 0.5)}, r"mean=\(0.5, 0.5, 0.5\) has 3 values for 1 channels"),
    ({"std": (0.0,)}, r"std=\(0.0,\) must be positive"),
])  # fmt: skip
def test_a_wrong_option_names_value_and_rule(options: dict[str, Any], message: str) -> None:
    refused(message, VisionData, **options)


def test_sizes_that_the_data_cannot_have_are_refused(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    refused(r"val_size=40 leaves none of the 40 training images .* for a tenth", ready, "mnist", root, val_size=40)
    refused("subset=37 exceeds the 36 training images", ready, "mnist", root, subset=37)
    whole = ready("mnist", root, batch_size=100, drop_last=True)
    refused("batch_size=100 exceeds the 36 training examples", whole.train_dataloader)
    refused(r"image_folder cannot be fetched: set root", lambda: VisionData("image_folder").num_classes)
    for drop_last, count in ((False, 3), (True, 2)):  # 16 + 16 + 8
        data = ready("mnist", root, val_size=0, batch_size=16, drop_last=drop_last)
        assert len(data.train_dataloader()) == count


@pytest.mark.parametrize(("images", "held_out"), [(9, 1), (100, 10), (1728, 173), (100_000, 10_000), (10**6, 10_000)])
def test_a_tenth_is_held_out_of_a_folder_of_any_size_and_no_more_than_10000(images: int, held_out: int) -> None:
    assert VisionData("image_folder", root=".")._count_val(images) == held_out


def test_a_crop_is_a_window_of_the_padded_image_and_channels_stay_together() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    padded = F.pad(image, (1, 1, 1, 1))[0, 0]
    windows = {tuple(padded[y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    torch.manual_seed(0)
    crops = {tuple(c.flatten().tolist()) for c in crop_and_flip(image.expand(200, 1, 3, 3), padding=1)}
    assert crops == windows  # all nine, each image by itself
    flips = {tuple(c.flatten().tolist()) for c in crop_and_flip(image.expand(50, 1, 3, 3), flip=True)}
    assert flips == {(1, 2, 3, 4, 5, 6, 7, 8, 9), (3, 2, 1, 6, 5, 4, 9, 8, 7)}
    assert crop_and_flip(image) is image
    grey = torch.randint(0, 255, (16, 1, 6, 6), dtype=torch.uint8)
    rgb = torch.cat([grey, grey, grey], 1)
    erased = erase(rgb.float(), draw_boxes(rgb, 1.0))
    for out in (crop_and_flip(rgb, 2, True), random_resized_crop(rgb, 0.3), erased):
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
    erased = erase(images, draw_boxes(images, 0.5))
    share = (erased == 0).float().mean((1, 2, 3))
    hit = share > 0
    assert 20 < hit.sum() < 44
    assert share[hit].min() >= 0.01
    assert share[hit].max() <= 0.36  # a third, rounded to whole pixels
    for image in erased[hit][:, 0]:
        rows, cols = (image == 0).nonzero(as_tuple=True)
        assert (image == 0).sum() == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
    assert torch.equal(erase(images, draw_boxes(images, 0.0)), images)


def test_mixing_is_torchvision_s_and_the_same_for_image_and_label() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone()  # image n is n everywhere
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        for _ in range(10):
            drawn = draw_mix(images, *alphas)
            mixed, soft = mix(images, drawn), mix_labels(labels, 5, drawn.share)
            assert soft.shape == (4, 5)
            torch.testing.assert_close(soft.sum(1), torch.ones(4))
            # the mean pixel is lambda * n + (1 - lambda) * neighbor, and so is the mean label
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(5.0))
    images, labels = torch.randn(6, 3, 9, 7), torch.arange(6) % 4
    for method, alphas in ((v2.MixUp, (0.4, 0.0)), (v2.CutMix, (0.0, 1.0))):
        torch.manual_seed(3)
        torch.randint(1, ())  # of the two methods
        expected, soft = method(alpha=max(alphas), num_classes=4)(images, labels)
        torch.manual_seed(3)
        drawn = draw_mix(images, *alphas)
        assert torch.equal(mix(images, drawn), expected)
        assert torch.equal(mix_labels(labels, 4, drawn.share), soft)


def test_randaugment_draws_for_each_image() -> None:
    class Brightness(BatchRandAugment):
        _AUGMENTATION_SPACE: ClassVar = {"Brightness": v2.RandAugment._AUGMENTATION_SPACE["Brightness"]}

    torch.manual_seed(0)
    images = torch.full((32, 3, 4, 4), 100, dtype=torch.uint8)
    # magnitude 10 of 0..30 is 0.9 / 3 = 0.3: 130 or 70
    assert set(Brightness(1, 10, 31)(images).unique().tolist()) == {70, 130}
    noise = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    out = BatchRandAugment(2, 9, 31)(noise)
    assert (out.shape, out.dtype) == (noise.shape, torch.uint8)
    assert len({tuple(o.flatten().tolist()) for o in BatchRandAugment(1, 9, 31)(noise[:1].expand(64, -1, -1, -1))}) > 10


def test_images_travel_as_uint8_and_are_finished_where_they_arrive(tmp_path: Path) -> None:
    options = {"mean": (0.5,), "std": (0.25,), "random_erasing": 0.5, "mixup_alpha": 0.2}
    data = ready("fashion_mnist", write_mnist(tmp_path), batch_size=16, **options)
    sent = pickle.loads(pickle.dumps(next(iter(data.train_dataloader()))))  # as a worker process sends it
    assert sent.batch.image.dtype == torch.uint8
    got = data.on_after_batch_transfer(move_data_to_device(sent, torch.device("cpu")), 0)
    assert type(got) is ImageBatch
    # pixel / 255 of mean 0.5 and deviation 0.25: erased, then mixed
    image = erase((sent.batch.image / 255.0 - 0.5) / 0.25, sent.box_B4)
    torch.testing.assert_close(got.image, mix(image, sent.drawn), atol=1e-5, rtol=0)
    for own, other in zip(got, sent, strict=True):
        assert torch.equal(own, other)  # also unpacked, or read from a loader without a trainer
    assert sent.to("meta").image.is_meta  # constants are numbers: no tensor is copied to the pixels' device
    try:
        torch.set_default_dtype(torch.bfloat16)  # Lightning under bf16-true
        assert torch.equal(sent.image, got.image.bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
