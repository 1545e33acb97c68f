"""Drawn images: figures against their closed forms, their files, and the classes to draw of."""

import sys
import types

import numpy as np
import pytest
import torch
from made_images import write_images
from refusals import refused

from apps.vision.generation.data import GenerationData, labels_of
from apps.vision.generation.files import MARK, ImageFolder, folder_names, grid_of
from apps.vision.generation.metrics import (
    GenerationMetrics,
    features_of,
    frechet_distance,
    nearest,
    precision_and_recall,
    read_classifier,
)


def test_distances_precision_and_nearest_images_by_hand():
    # Means 0 and 3, deviations 1 and 2 (of samples, n - 1): 3^2 + (2 - 1)^2 = 10.
    first, second = np.array([[-1.0], [0.0], [1.0]]), np.array([[1.0], [3.0], [5.0]])
    assert frechet_distance(first, second) == pytest.approx(10.0)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
    # Real points 0, 1, 2, 10: with 1 neighbor their radii are 1, 1, 1, 8. Drawn ones 0.5 and 2.5, 2 apart: radii 2.
    real, drawn = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[0.5], [2.5]])
    assert precision_and_recall(real, drawn, 1) == (1.0, 0.75)  # 10 is within 2 of neither
    # 30 lies within no radius: precision 1/2. The two drawn are 29.5 apart: every real one is within.
    assert precision_and_recall(real, np.array([[0.5], [30.0]]), 1) == (0.5, 1.0)
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    batches = [torch.full((1, 1, 2, 2), 51, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)]
    distance, found = nearest(pixels, batches)
    assert distance.tolist() == pytest.approx([0.2, 0.0])  # 51 of 255
    assert found[:, 0, 0, 0].tolist() == [51, 255]


def test_weights_that_are_none(tmp_path):
    def read(name):
        features_of(GenerationMetrics(efficientnet=str(tmp_path / name)), None, torch.zeros(2, 1, 2, 2))

    refused(r"metrics\.efficientnet=.*nothing\.pth cannot be read", read, "nothing.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    refused(r"other\.pth has no weights of EfficientNet-Lite0", read, "other.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_classifier(str(tmp_path), ("0", "1"), 8, 1)


def test_efficientnet_takes_the_packages_weights_and_without_a_network_components_do(tmp_path):
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save({f"_{number}": value for number, value in enumerate(state.values())}, tmp_path / "own.pth")
    features = features_of(GenerationMetrics(efficientnet=str(tmp_path / "own.pth")), None, torch.zeros(0, 1, 2, 2))
    assert features.name == "EfficientNet-Lite0's features"
    assert features.each([torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)]).shape == (2, 1280)
    pixels = torch.randint(256, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = features_of(GenerationMetrics(), None, pixels)
    assert features.name == "4 principal components of pixels"
    # All four axes turn the pixels and change no distance.
    apart = torch.pdist(pixels.flatten(1).double() / 255)
    assert torch.allclose(torch.pdist(torch.from_numpy(features.each([pixels]))), apart)


class Extractor(torch.nn.Linear):
    """What torch-fidelity's network does with its file."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, pixels):
        return (super().forward(pixels.float().mean((2, 3))),)


def test_inception_runs_nothing_that_its_file_says(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("run").touch, ())

    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor))

    def features(state):
        torch.save(state, tmp_path / "own.pth")
        return features_of(GenerationMetrics(inception=str(tmp_path / "own.pth")), None, torch.zeros(0, 1, 2, 2))

    state = {"weight": torch.ones(2048, 3), "bias": torch.zeros(2048)}
    assert (features(state).each([torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)]) == 21).all()
    refused(r"own\.pth has no weights of torch-fidelity's Inception", features, {"bias": torch.zeros(3)})
    refused(r"metrics\.inception=.*own\.pth cannot be read", features, {"weight": Evil()})
    assert not (tmp_path / "run").exists()


def test_folders_have_the_names_of_classes_and_those_of_others_stay(tmp_path):
    assert folder_names(["T-shirt/top", "Bag", "7"]) == ["T-shirt_top", "Bag", "7"]
    assert folder_names(["a/b", "a b", "..", "猫"]) == ["a_b_0", "a_b_1", "class", "猫"]
    black = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    image = grid_of([black, black[:1]])
    assert image.size == (2 * 64 + 3 * 2, 2 * 64 + 3 * 2)  # gaps of 2 pixels
    assert image.getpixel((30, 100)) == (0, 0, 0)
    assert image.getpixel((100, 100)) == (255, 255, 255)  # the second row has one image
    # Small images are enlarged by a whole factor: 64 // 28 = 2.
    assert grid_of([torch.zeros(2, 1, 28, 28, dtype=torch.uint8)]).size == (2 * 56 + 3 * 2, 56 + 2 * 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        refused("mine holds other files than drawn images", ImageFolder, tmp_path / "mine", overwrite)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / MARK).write_text("{}")
    refused("own exists: --overwrite replaces it", ImageFolder, tmp_path / "own", False)
    ImageFolder(tmp_path / "own", True)
    (tmp_path / "empty").mkdir()
    ImageFolder(tmp_path / "empty", False)


NAMES = ("T-shirt/top", "Bag", "7")


def test_classes_go_by_name_and_else_by_number_and_one_image_is_too_few(tmp_path):
    # "7" is the name of class 2, and "1" of none
    assert (labels_of(["Bag", "7", 0], NAMES), labels_of(["1"], NAMES)) == ([1, 2, 0], [1])
    refused("classes=3 is none of the model's 3 classes: T-shirt/top, Bag, 7", labels_of, [3], NAMES)
    refused("classes=Bag is given twice", labels_of, [1, "Bag"], NAMES)
    refused(r"classes=\[\] names no class", labels_of, [], NAMES)
    refused("number=0 must be at least 1", GenerationData, number=0)
    refused("seed=-1 must not be negative", GenerationData, seed=-1)
    refused("mixup_alpha=0.2 mixes classes", GenerationData, mixup_alpha=0.2)
    refused("predict_folder=inbox: a generator reads no images", GenerationData, predict_folder="inbox")
    for split in ("train", "test"):
        write_images(tmp_path, split, 1, classes=("cat",))
        (tmp_path / split / "cat" / "0.png").rename(tmp_path / split / "cat" / f"{split}.png")
    data = GenerationData("image_folder", root=str(tmp_path), image_size=8, val_size=0)
    refused("image_folder has 1 training image: a generator needs 2 or more", data.setup, "fit")


@pytest.mark.parametrize("classes", ["3,7", "3, 7", [3, 7], ["3", 7]])
def test_batches_are_of_one_class(classes):
    batches = list(GenerationData(classes=classes, number=70, seed=5).predict_dataloader())
    sizes = [(int(b.label[0]), len(b.label), b.index.tolist()[0]) for b in batches]
    assert sizes == [(3, 64, 0), (3, 6, 64), (7, 64, 0), (7, 6, 64)]
    assert all(batch.seed == 5 and bool((batch.label == batch.label[0]).all()) for batch in batches)
    # All classes are the default.
    assert [int(batch.label[0]) for batch in GenerationData(number=1).predict_dataloader()] == list(range(10))
    assert [int(batch.label[0]) for batch in GenerationData(classes=4).predict_dataloader()] == [4]
