"""Figures of drawn images, against their closed forms."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from apps.vision.generation.metrics import (
    GenerationMetrics,
    features_of,
    frechet_distance,
    nearest,
    precision_and_recall,
    read_classifier,
)


def test_the_distance_of_two_normals_in_one_dimension():
    # Means 0 and 3, deviations 1 and 2 (of samples, n - 1): 3^2 + (2 - 1)^2 = 10.
    first, second = np.array([[-1.0], [0.0], [1.0]]), np.array([[1.0], [3.0], [5.0]])
    assert frechet_distance(first, second) == pytest.approx(10.0)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)


def test_precision_and_recall_count_points_within_radii():
    # Real points 0, 1, 2, 10: with 1 neighbor their radii are 1, 1, 1, 8. Drawn ones 0.5 and 2.5, 2 apart: radii 2.
    real, drawn = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[0.5], [2.5]])
    assert precision_and_recall(real, drawn, 1) == (1.0, 0.75)  # 10 is within 2 of neither
    # 30 lies within no radius: precision 1/2. The two drawn are 29.5 apart: every real one is within.
    assert precision_and_recall(real, np.array([[0.5], [30.0]]), 1) == (0.5, 1.0)


def test_the_nearest_training_image_is_found_over_batches():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    batches = [torch.full((1, 1, 2, 2), 51, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)]
    distance, found = nearest(pixels, batches)
    assert distance.tolist() == pytest.approx([0.2, 0.0])  # 51 of 255
    assert found[:, 0, 0, 0].tolist() == [51, 255]


def test_without_a_network_distances_are_in_principal_components():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, 1, 2, 2), generator=draw, dtype=torch.uint8)
    features = features_of(GenerationMetrics(), None, pixels)
    assert features.name == "4 principal components of pixels"
    # All four axes turn the pixels and change no distance.
    apart = torch.pdist(pixels.flatten(1).double() / 255)
    assert torch.allclose(torch.pdist(torch.from_numpy(features.each([pixels]))), apart)


def test_weights_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.efficientnet=.*nothing\.pth cannot be read"):
        features_of(GenerationMetrics(efficientnet=str(tmp_path / "nothing.pth")), None, torch.zeros(2, 1, 2, 2))
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has no weights of EfficientNet-Lite0"):
        features_of(GenerationMetrics(efficientnet=str(tmp_path / "other.pth")), None, torch.zeros(2, 1, 2, 2))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_classifier(str(tmp_path), ("0", "1"), 8, 1)


def test_efficientnet_takes_the_packages_weights_by_their_order(tmp_path):
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save({f"_{number}": value for number, value in enumerate(state.values())}, tmp_path / "own.pth")
    features = features_of(GenerationMetrics(efficientnet=str(tmp_path / "own.pth")), None, torch.zeros(0, 1, 2, 2))
    assert features.name == "EfficientNet-Lite0's features"
    assert features.each([torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)]).shape == (2, 1280)


def test_inception_runs_nothing_that_its_file_says(tmp_path, monkeypatch):
    class Extractor(torch.nn.Linear):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__(3, 2048)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, pixels):
            return (super().forward(pixels.float().mean((2, 3))),)

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("run").touch, ())

    package = types.ModuleType("torch_fidelity")
    part = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    part.FeatureExtractorInceptionV3 = Extractor
    for module in (package, part):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def features(state):
        torch.save(state, tmp_path / "own.pth")
        return features_of(GenerationMetrics(inception=str(tmp_path / "own.pth")), None, torch.zeros(0, 1, 2, 2))

    state = {"weight": torch.ones(2048, 3), "bias": torch.zeros(2048)}
    assert (features(state).each([torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)]) == 21).all()
    with pytest.raises(ValueError, match=r"own\.pth has no weights of torch-fidelity's Inception"):
        features({"bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"metrics\.inception=.*own\.pth cannot be read"):
        features({"weight": Evil()})
    assert not (tmp_path / "run").exists()
