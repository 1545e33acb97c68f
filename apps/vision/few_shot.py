"""Few-shot linear evaluation of an image classifier's frozen features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.base.progress import each
from apps.report.intervals import Interval, mean_interval


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Return the indices of ``shots`` examples of each class, sampled without replacement, class by class.

    Raises:
        ValueError: a class has fewer.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < shots:
            raise ValueError(f"{shots}-shot evaluation needs {shots} images a class: class {label} has {len(of_class)}")
        drawn.append(rng.choice(of_class, shots, replace=False))
    return np.concatenate(drawn)


def linear_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the accuracy of a regularized least-squares classifier from features to {-1, 1} a class.

    V-MoE (2106.05974, section 3.2) evaluates so. Features are standardized by the labeled images; the strength of the
    regularization is chosen by the leave-one-out error on them, so that no test image takes part.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    classifier = RidgeClassifierCV(alphas=2.0 ** np.arange(-10, 11, 2) * len(features))
    classifier.fit(scaler.transform(features), labels)
    return float(classifier.score(scaler.transform(test_features), test_labels))


def few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    shots: Sequence[int] = (5, 10),
    num_seeds: int = 5,
) -> dict[int, Interval]:
    """Return, for each k in ``shots``, the accuracy of the k-shot linear evaluation over the draws.

    Args:
        features, labels: (N, D) and (N,), the images that the labeled ones are sampled from.
        test_features, test_labels: (M, D) and (M,).
        shots: labeled images per class.
        num_seeds: number of draws of labeled images, with seeds 0, 1, ...

    Raises:
        ValueError: a class has fewer than k images.
    """
    results = {}
    for k in shots:
        drawn = (draw_shots(labels, k, seed) for seed in range(num_seeds))
        results[k] = mean_interval([linear_accuracy(features[i], labels[i], test_features, test_labels) for i in drawn])
    return results


@torch.no_grad()
def extract_features(
    model: Any, batches: Iterable[Any], device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the head of ``model``, (N, D) float32, and the labels, (N,), over all ``batches``."""
    features, labels = [], []
    for batch in each(batches, "features of the images"):
        tokens = model.forward_features(batch.image.to(device))
        features.append(model.forward_head(tokens, pre_logits=True).float().cpu().numpy())
        labels.append(hard_labels(batch.label).cpu().numpy())
    return np.concatenate(features), np.concatenate(labels)


def hard_labels(label: Tensor) -> Tensor:
    """Return the (B,) class numbers of (B,) class numbers or (B, num_classes) shares."""
    return label.argmax(-1) if label.ndim == 2 else label
