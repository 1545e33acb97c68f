"""A checkpoint keeps its class names and the scaling of its pixels, whatever folder it is asked about."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import ready, write_images, write_mnist
from PIL import Image
from quiet_trainer import quiet_trainer
from refusals import refused

from apps.cli import main
from apps.vision.data import VisionData
from apps.vision.encoding import ImageEncoding
from apps.vision.module import VisionClassifier

CLASSES = ("boot", "hat", "shoe")
ENCODING = ImageEncoding(8, 3, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 0.8, class_names=CLASSES)


def photos(root: Path, classes: tuple[str, ...] = CLASSES, splits: tuple[str, ...] = ("train", "test")) -> Path:
    for split in splits:
        write_images(root, split, 4, classes=classes)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on folders boot, hat and shoe, whose images have gone."""
    folder = tmp_path_factory.mktemp("photos")
    model = {"vit": {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}, "report": None}
    data = {"dataset": "image_folder", "root": str(photos(folder / "own")), "image_size": 8, "batch_size": 6}
    config = {
        "model": {"class_path": "VisionClassifier", "init_args": model},
        "data": {"class_path": "VisionData", "init_args": {**data, "mean": [0.1, 0.2, 0.3], "eval_crop": 0.8}},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
    }
    (folder / "photos.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", str(folder / "photos.yaml"), "--run_dir", str(folder / "run")]) == 0
    shutil.rmtree(folder / "own")
    return folder


@pytest.fixture
def run(trained: Path, capsys: pytest.CaptureFixture) -> list[str]:
    capsys.readouterr()
    return ["--config", str(trained / "photos.yaml"), "--run_dir", str(trained / "run"), "--ckpt_path", "best"]


def best(trained: Path) -> VisionClassifier:
    return VisionClassifier.load_from_checkpoint(trained / "run" / "checkpoints" / "best.ckpt")


def test_a_checkpoint_keeps_classes_and_scale_and_gives_them_to_data(trained: Path, tmp_path: Path) -> None:
    kept = torch.load(trained / "run" / "checkpoints" / "best.ckpt", weights_only=True)["encoding"]
    assert ImageEncoding.from_state(kept) == replace(ENCODING, std=(0.229, 0.224, 0.225))
    rule = "the checkpoint's encoding: ImageEncoding has no field 'features'"
    refused(rule, ImageEncoding.from_state, {"features": {}, "domain": None})
    data = VisionData("image_folder", root=str(photos(tmp_path / "own")))
    data.adopt(best(trained).encoding.state())
    assert (data.image_size, data.eval_crop, data.encoding.mean) == (8, 0.8, (0.1, 0.2, 0.3))
    assert next(iter(data.test_dataloader())).image.shape == (12, 3, 8, 8)
    other = VisionData("image_folder", root=str(photos(tmp_path, ("a hat", "boot", "shoe"))), image_size=8)
    rule = "it has a hat, which the checkpoint does not know, and lacks hat"
    refused(rule, quiet_trainer(tmp_path).test, best(trained), datamodule=other)


@pytest.mark.parametrize("command", ["test", "predict", "fit"])
def test_a_renamed_class_is_refused(run: list[str], tmp_path: Path, capsys, command: str) -> None:
    # Sorted, "zapato" would be class 2 as "shoe" was, but "a hat" would have moved every number.
    root = photos(tmp_path, ("a hat", "boot", "shoe"))
    more = ["--trainer.max_epochs", "2"] if command == "fit" else []
    assert main([command, *run, "--data.root", str(root), *more]) == 1
    known = "it has a hat, which the checkpoint does not know, and lacks hat"
    line = f"error: {root}/train: its classes are not those of the checkpoint: {known}"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_folder_that_lacks_a_class_is_numbered_by_the_checkpoint(run: list[str], tmp_path: Path, capsys) -> None:
    root = photos(tmp_path, ("hat", "shoe"))  # alone they would be 0 and 1
    (root / "test" / "boot").mkdir()  # an empty folder is a class without images
    assert main(["predict", *run, "--data.root", str(root), "--overwrite"]) == 0
    err = capsys.readouterr().err
    assert "the test images have none of boot: the figures are of the other classes" in err
    rows = [json.loads(line) for line in (Path(run[3]) / "predictions.jsonl").read_text().splitlines()]
    assert [(r["true_label"], r["true_class_name"]) for r in rows] == [(1, "hat")] * 4 + [(2, "shoe")] * 4
    assert all(r["class_name"] == [CLASSES[c] for c in r["label"]] for r in rows)
    assert main(["test", *run, "--data.root", str(root)]) == 0
    capsys.readouterr()
    assert main(["fit", *run, "--data.root", str(root), "--trainer.max_epochs", "2"]) == 1
    err = capsys.readouterr().err
    assert err == "error: the training images have none of boot, which the checkpoint was trained on\n"


def test_a_subset_without_a_class_may_go_on_and_bad_options_are_refused() -> None:
    data = VisionData("digits", subset=5)  # of ten classes
    data.adopt(data.encoding.state())
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 5  # type: ignore[arg-type]
    refused("on_bad_image='drop' is not one of error, skip", VisionData, "image_folder", root=".", on_bad_image="drop")
    rule = "on_bad_image='skip' is for folders of images; digits is read as a whole"
    refused(rule, VisionData, "digits", on_bad_image="skip")


def test_images_are_tested_or_predicted_without_the_training_folder(run: list[str], tmp_path: Path, capsys) -> None:
    root = photos(tmp_path, splits=("test",))
    for command in (["test"], ["predict", "--overwrite"]):
        assert main([*command, *run, "--data.root", str(root)]) == 0
    capsys.readouterr()
    assert main(["validate", *run, "--data.root", str(root)]) == 1
    assert "error: image_folder has no val images: val_size" in capsys.readouterr().err
    assert main(["fit", *run, "--data.root", str(root), "--trainer.max_epochs", "2"]) == 1
    assert f"root='{root}' holds no train/*/*" in capsys.readouterr().err
    write_images(tmp_path, "inbox", 2, side=12, classes=("new",))
    assert main(["predict", *run, "--data.predict_folder", str(tmp_path / "inbox"), "--overwrite"]) == 0
    rows = [json.loads(line) for line in (Path(run[3]) / "predictions.jsonl").read_text().splitlines()]
    assert [set(row["class_name"]) for row in rows] == [set(CLASSES)] * 2
    assert all("true_label" not in row and "true_class_name" not in row for row in rows)


@pytest.mark.parametrize("option, value, kept", [
    ("image_size", 12, "image_size=8"), ("eval_crop", 1.0, "eval_crop=0.8"),
    ("mean", (0.5, 0.5, 0.5), r"mean=\(0.1, 0.2, 0.3\)"),
])  # fmt: skip
def test_an_option_that_is_not_the_checkpoint_s_is_refused(trained, tmp_path: Path, option, value, kept) -> None:
    data = VisionData("image_folder", root=str(photos(tmp_path)), **{option: value})
    rule = rf"^data\.{option}=.* is not the checkpoint's, whose images have {kept}: leave it out$"
    refused(rule, lambda: (data.adopt(best(trained).encoding.state()), data.setup("test")))


def test_a_dataset_of_other_classes_is_refused(tmp_path: Path) -> None:
    # The digits' own ten in another order have the checkpoint's numbers; MNIST with another name for 0 is refused.
    data = VisionData("digits")
    state, plain = data.encoding.state(), ready("digits")
    labels = plain.opened.test.labels
    data.adopt({**state, "class_names": [*state["class_names"][1:], "0"]})  # digit d is number d - 1, 0 is number 9
    data.setup("test")
    assert torch.equal(data.opened.test.labels, (labels - 1) % 10)
    write_mnist(tmp_path / "mnist")  # a dataset in the cache, which is not to be fetched again for that
    other = VisionData("mnist", cache_dir=str(tmp_path))
    other.adopt({**state, "class_names": ["zero", *state["class_names"][1:]]})
    rule = "its classes are not those of the checkpoint: it has 0, which the checkpoint does not know, and lacks zero"
    refused(rf"^mnist: {rule}$", other.setup, "test")
    grey = VisionData("digits")
    grey.adopt(replace(ENCODING, class_names=tuple(state["class_names"])).state())
    refused(r"3 channels and eval_crop=0.8, and digits has 1 and is never cropped", grey.setup, "test")


def test_paths_and_pixels_are_predicted_as_the_data_module_has_them(trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(256, size=(11, 9, 3), dtype=np.uint8), rng.integers(256, size=(7, 20), dtype=np.uint8)]
    (tmp_path / "inbox").mkdir()
    paths = [tmp_path / "inbox" / f"{i}.png" for i in range(2)]
    for array, path in zip(arrays, paths, strict=True):
        Image.fromarray(array).save(path)
    model, data = best(trained).train(), VisionData("image_folder", predict_folder=str(tmp_path / "inbox"))
    data.adopt(model.encoding.state())
    (batch,) = data.predict_dataloader()
    model.eval()
    with torch.no_grad():
        wanted = model(batch.image[batch.index.argsort()]).softmax(-1)
    model.train()
    by_path, by_image = model.predict([str(paths[0]), paths[1]]), model.predict([Image.open(paths[0]), arrays[1]])
    assert model.training  # as it was
    for answers in (by_path, by_image):
        for answer, row in zip(answers, wanted, strict=True):
            assert list(answer.top) == [CLASSES[c] for c in row.argsort(descending=True)]
            assert answer.top == pytest.approx(dict(zip(CLASSES, row.tolist(), strict=True)), abs=2e-6)
            assert (answer.class_name, answer.probability) == next(iter(answer.top.items()))
    assert ([a.path for a in by_path], [a.path for a in by_image]) == ([str(p) for p in paths], [None, None])
    assert [len(a.top) for a in model.predict(paths, top=2)] == [2, 2]
    assert len(model.predict([paths[0]] * 70)) == 70  # more than are done at once
    assert model.predict([]) == []


def test_an_image_that_cannot_be_predicted_is_named(trained: Path, tmp_path: Path) -> None:
    model = best(trained)
    (tmp_path / "text.jpg").write_text("not found")
    for images, message in (
        ([tmp_path / "text.jpg"], rf"^{tmp_path}/text\.jpg is corrupt: it is no image$"),
        ([tmp_path / "gone.jpg"], rf"^{tmp_path}/gone\.jpg cannot be read: No such file or directory$"),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 4))], r"^images\[1\] is float64 \(4, 4\): an array must be uint8"),
        ([np.zeros((3, 5, 6), np.uint8)], r"^images\[0\] is uint8 \(3, 5, 6\): an array must be uint8, \(H, W\) or"),
        ([None], r"^images\[0\] is of type NoneType, not a path, a PIL image or a uint8 array$"),
        ("a.png", r"^images must be a list: write predict\(\[image\]\) for one image$"),
        (np.zeros((4, 4, 3), np.uint8), r"^images must be a list"),
    ):
        refused(message, model.predict, images)
    refused("top=0 must be at least 1", model.predict, [], top=0)
    untrained = VisionClassifier(model.vit, image_size=8, in_chans=3, num_classes=3)
    refused("this model does not know its classes and the scale of its pixels", untrained.predict, [])


def test_loading_and_predicting_say_nothing(trained: Path, tmp_path: Path, capfd, caplog, recwarn) -> None:
    write_images(tmp_path, "inbox", 1, classes=("new",))
    with caplog.at_level(logging.INFO):
        best(trained).predict([tmp_path / "inbox" / "new" / "0.png"])
    assert ([r.getMessage() for r in caplog.records], [str(w.message) for w in recwarn]) == ([], [])
    assert capfd.readouterr() == ("", "")


def damaged(root: Path) -> list[str]:
    """Cut one of four images a class of the training, of hat and of shoe, and one to test; return their paths."""
    photos(root)
    bad = [str(root / f"{place}/1.png") for place in ("train/hat", "train/shoe", "test/boot")]
    for path in bad:
        Path(path).write_bytes(Path(path).read_bytes()[:-30])
    return bad


def folder(root: Path, **options) -> VisionData:
    return ready("image_folder", root, image_size=8, batch_size=4, val_size=0, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_files_are_named_or_left_out_and_counted_once(tmp_path: Path, caplog, num_workers: int) -> None:
    bad = damaged(tmp_path)
    with pytest.raises(ValueError) as caught:  # a worker's traceback surrounds it
        list(folder(tmp_path, num_workers=num_workers).train_dataloader())
    line = str(caught.value).strip().splitlines()[-1]
    assert any(f"{path} is corrupt: " in line for path in bad[:2])
    assert line.endswith("; data.on_bad_image=skip leaves such images out")
    data = folder(tmp_path, on_bad_image="skip", num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "apps"):
        seen = [i for _ in range(2) for batch in data.train_dataloader() for i in batch.index.tolist()]
        tested = [i for batch in data.test_dataloader() for i in batch.index.tolist()]
    # Places 0-3 are boots, 4-7 hats, 8-11 shoes; the second hat and shoe are cut, and to test the second boot.
    assert (sorted(seen), sorted(tested)) == (sorted(2 * [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]), [0, *range(2, 12)])
    train, test = [r.getMessage() for r in caplog.records]
    start = f"on_bad_image=skip: 2 of 12 train images cannot be read and are left out: {bad[0]} is corrupt"
    assert train.startswith(start)
    assert bad[1] in train
    assert test.startswith("on_bad_image=skip: 1 of 12 test images cannot be read")


def test_a_loader_without_damaged_files_continues_where_it_stood_and_others_predict(tmp_path: Path) -> None:
    bad, options = damaged(tmp_path), {"on_bad_image": "skip", "random_resized_crop": 0.5}
    whole = [batch.image for batch in folder(tmp_path, **options).train_dataloader()]
    loader = folder(tmp_path, **options).train_dataloader()
    next(iter(loader))
    resumed = folder(tmp_path, **options).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.image for batch in resumed]
    assert len(rest) == 2  # 10 images in batches of 4
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[1:], strict=True))
    data = VisionData("digits", predict_folder=str(tmp_path / "train"), on_bad_image="skip")
    paths = [p for batch in data.predict_dataloader() for p in data.predicted_paths(batch.index) or ()]
    assert len(paths) == 10
    assert not set(bad) & set(paths)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of the 12 images can be read: .*/boot/0\.png is corrupt: it is no"):
        VisionData("digits", predict_folder=str(tmp_path / "train"), on_bad_image="skip").predict_dataloader()
