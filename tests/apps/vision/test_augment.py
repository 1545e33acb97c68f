"""Random transforms of whole batches."""

import pickle
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import move_data_to_device
from made_images import EVERY_TRANSFORM, ready, write_mnist
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


def test_mixing_is_the_same_for_image_and_label() -> None:
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


def test_mixing_is_torchvision_s() -> None:
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


def test_every_option_together(tmp_path: Path) -> None:
    data = ready("fashion_mnist", write_mnist(tmp_path), batch_size=16, image_size=32, **EVERY_TRANSFORM)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (16, 1, 32, 32)
    assert batch.image.isfinite().all()
    assert batch.label.shape == (16, 10)
    val = next(iter(data.val_dataloader()))
    assert (val.image.shape, val.label.dtype) == ((4, 1, 32, 32), torch.int64)
