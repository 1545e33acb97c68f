"""Images to batches: their order, resuming, prediction and options."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from made_images import EVERY_TRANSFORM, indices, pixels, ready, write_images, write_mnist
from PIL import Image
from quiet_trainer import quiet_trainer
from refusals import refused
from torch import Tensor

from apps.vision.batch import ImageBatch
from apps.vision.data import VisionData


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
    options = {"batch_size": 8, "image_size": 28, **EVERY_TRANSFORM}

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
    options = {"batch_size": 8, "num_workers": num_workers, **EVERY_TRANSFORM}
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [4, 5, 7])  # 5 batches an epoch: in the middle and at the end
def test_a_run_resumed_through_lightning_is_the_unbroken_run(tmp_path: Path, steps: int) -> None:
    root = write_mnist(tmp_path / "data")
    options = {"batch_size": 8, "val_size": 4, **EVERY_TRANSFORM}
    unbroken = Probe()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = quiet_trainer(tmp_path, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    fit.fit(unbroken, ready("mnist", root, **options))
    (checkpoint,) = tmp_path.glob(f"step={steps}.ckpt")
    resumed = Probe()
    fit = quiet_trainer(tmp_path, max_epochs=2)
    fit.fit(resumed, ready("mnist", root, **options), ckpt_path=checkpoint, weights_only=True)
    assert resumed.seen == unbroken.seen[steps:]
    assert torch.equal(resumed.layer.weight, unbroken.layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tests_and_predicts_each_image_once(tmp_path: Path) -> None:
    data = ready("mnist", write_mnist(tmp_path), eval_batch_size=8)
    probe, run = Probe(), quiet_trainer(tmp_path)
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

    root = write_mnist(tmp_path)
    seen = []
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
