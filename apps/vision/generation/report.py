"""The test report of a generator: drawn images and their figures, and the experts by noise level and by class."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.report.base import Report, ReportConfig, first_batches, is_left_out
from apps.report.images import Tile, save_images
from apps.report.page import BarChart, Part, Picture, Section, Table, Text
from apps.report.use import ExpertUse, Labels, load_parts, map_parts, tokens_of
from apps.train.cost.flops import measure_cost
from apps.vision.generation.data import MOST_AT_ONCE, Wanted
from apps.vision.generation.diffusion import NUM_BANDS, bands
from apps.vision.generation.files import grid_of
from apps.vision.generation.metrics import (
    features_of,
    frechet_distance,
    nearest,
    precision_and_recall,
    read_classifier,
)
from apps.vision.image_files import to_array
from core.fields import CountOrZero

BANDS = tuple(f"{band / NUM_BANDS:.1f} to {(band + 1) / NUM_BANDS:.1f}" for band in range(NUM_BANDS))
_SHOWN = 10
"""Classes, images of each, and steps that pictures have at most."""
_FIGURES = {
    "class_accuracy": ("of their class, by the classifier, %", 100),
    "frechet": ("Fréchet distance to test images", 1),
    "frechet_of_training": ("the same of as many training images", 1),
    "precision": ("precision, %", 100),
    "recall": ("recall, %", 100),
    "nearest_ratio": ("distance to the nearest training image, relative to test images'", 1),
    "mflops_per_image": ("MFLOPs per image", 1),
    "seconds_per_image": ("seconds per image", 1),
}
"""Titles of the figures, and what a value is multiplied with there."""
_REFERENCE = 50_000
"""Training images at most among which the nearest are looked for."""


@core.register_config
@dataclass(frozen=True)
class GenerationReportConfig(ReportConfig):
    """Options of what ``moesaic test`` adds to the loss of a generator.

    Raises:
        ValueError: a number out of its range.
    """

    routing_examples: CountOrZero = 2000


@dataclass(frozen=True)
class _Collected:
    """What a test has found.

    Attributes:
        names: names of the classes.
        use: experts by noise level and by class.
        loss_bands: mean loss of the test images at each band of levels; NaN without any.
        drawn: images by class, uint8 (N, C, H, W) each.
        steps: levels of the shown steps, and what the network sees in the noise at each.
        alike: some drawn images and the nearest training image of each.
        rows: figures with what they are.
        features: whose features the distances are measured in.
    """

    names: tuple[str, ...]
    use: ExpertUse
    loss_bands: tuple[float, ...]
    drawn: list[Tensor]
    steps: list[tuple[float, Tensor]]
    alike: tuple[Tensor, Tensor] | None
    rows: list[tuple[str, str]]
    features: str


class GenerationReport(Report):
    """After a test: figures of drawn images, ``classes.png``, ``steps.png``, ``nearest.png``, and the experts'
    ``expert_level.png``, ``expert_class.png`` and ``load.png``."""

    config: GenerationReportConfig

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> _Collected | None:
        if is_left_out(trainer):
            return None
        module: Any = pl_module
        labels = {"level": Labels("level", NUM_BANDS), "class": Labels("class", module.num_classes)}
        use, sums, counts = ExpertUse(tokens_of(module), labels), torch.zeros(NUM_BANDS), torch.zeros(NUM_BANDS)
        for batch in first_batches(batches_of_test(trainer), self.config.routing_examples, lambda b: len(b.label)):
            batch = trainer.strategy.batch_to_device(batch)
            with torch.no_grad(), core.record(module) as tape:
                out = module.task_loss(batch)
            use.add(tape, batch)
            band_B = bands(out.targets).cpu()
            sums.index_add_(0, band_B, out.outputs.float().cpu())
            counts.index_add_(0, band_B, torch.ones(len(band_B)))
        loss_bands = tuple((sums / counts).tolist())
        drawn, steps, alike, rows, features = (
            self._drawn(trainer, module) if module.metrics.images else ([], [], None, [], "")
        )
        return _Collected(module.encoding.class_names, use, loss_bands, drawn, steps, alike, rows, features)

    def _drawn(self, trainer: Any, module: Any) -> tuple[Any, ...]:
        """Draw images, measure and log their figures."""
        config, encoding, data = module.metrics, module.encoding, trainer.datamodule
        classifier = None
        if config.classifier is not None:
            shape = (encoding.image_size, encoding.in_chans)
            classifier = read_classifier(config.classifier, encoding.class_names, *shape)
        each = -(-config.images // module.num_classes)
        began = time.perf_counter()
        drawn = []
        for label in range(module.num_classes):
            parts = torch.arange(each).split(MOST_AT_ONCE)
            of_class = [Wanted(torch.full_like(index, label), index, 0) for index in parts]
            drawn.append(torch.cat([module.drawn(wanted, module.sampling).cpu() for wanted in of_class]))
        pixels, seconds = torch.cat(drawn), (time.perf_counter() - began) / (each * module.num_classes)
        steps = self._steps(module)

        def real(batches: Any, most: int) -> Iterator[Tensor]:
            for batch in first_batches(batches, most, lambda b: len(b.label)):
                yield denormalized(batch.image, encoding)

        tested = torch.cat([*real(batches_of_test(trainer), len(pixels))])[: len(pixels)]
        training = lambda: real(data.train_eval_dataloader(), _REFERENCE)  # noqa: E731
        some = torch.cat([*real(data.train_eval_dataloader(), len(pixels))] or [tested])[: len(pixels)]
        features = features_of(config, classifier, some)
        module.judged_in = features.name
        real_ND, drawn_ND, train_ND = (features.each(x.split(256)) for x in (tested, pixels, some))
        precision, recall = precision_and_recall(real_ND, drawn_ND, config.neighbors)
        gaps, found = nearest(pixels, training())
        own_gaps, _ = nearest(tested, training())
        batch = trainer.strategy.batch_to_device(next(iter(batches_of_test(trainer))))
        flops = measure_cost(module, batch).flops_per_example * module.sampling.evaluations
        values = {
            "frechet": frechet_distance(real_ND, drawn_ND),
            "frechet_of_training": frechet_distance(real_ND, train_ND),
            "precision": precision,
            "recall": recall,
            "nearest_ratio": float(gaps.mean() / own_gaps.mean()),
            "mflops_per_image": flops / 1e6,
            "seconds_per_image": seconds,
        }
        if classifier is not None:
            label_N = torch.arange(module.num_classes).repeat_interleave(each)
            values["class_accuracy"] = _accuracy(classifier, pixels, label_N)
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # without training images
        for name, value in values.items():
            module.log(f"test/{name}", value, batch_size=1, rank_zero_only=True)
        closest = gaps.argsort()[:_SHOWN]
        return drawn, steps, (pixels[closest], found[closest]), _rows(values, len(pixels)), features.name

    def _steps(self, module: Any) -> list[tuple[float, Tensor]]:
        """Return what the network sees in the noise at steps of equal distance, of one image a class."""
        label_B = torch.arange(min(module.num_classes, _SHOWN))
        seen: list[tuple[float, Tensor]] = []
        keep = lambda level, image: seen.append((level, image.cpu()))  # noqa: E731
        last = module.drawn(Wanted(label_B, torch.zeros_like(label_B), 0), module.sampling, keep)
        places = np.unique(np.linspace(0, len(seen) - 1, _SHOWN - 1).round().astype(int))
        return [*(seen[place] for place in places), (0.0, last.cpu())]

    def write(self, collected: _Collected, folder: Path) -> list[Section]:
        sections = []
        if collected.drawn:
            table = Table("Figures of drawn images", ("figure", "value"), tuple(collected.rows))
            note = f"Distances, precision and recall are in {collected.features}, against as many test images."
            parts: list[Part] = [table, Text.of(note)]
            sections.append(Section("Drawn images", (*parts, *(self._pictures(collected, folder)))))
        names = [name for band, name in enumerate(BANDS) if collected.loss_bands[band] == collected.loss_bands[band]]
        if names:
            losses = {"loss": tuple(value for value in collected.loss_bands if value == value)}
            seen = "Mean squared error of the prediction of test images, by the noise level that they have."
            bars = BarChart("Loss by noise level", seen, "noise level", "loss", tuple(names), losses)
            sections.append(Section("Loss", (bars,)))
        if collected.use.stats.layers:
            counts = collected.use.counts
            by_level = map_parts(
                [(counts["level"], BANDS)], "a noise level", "noise level", folder / "expert_level.png"
            )
            by_class = map_parts([(counts["class"], collected.names)], "a class", "class", folder / "expert_class.png")
            loads = load_parts(collected.use.stats, folder / "load.png")
            sections.append(Section("What the experts are used for", (*by_level, *by_class, *loads)))
        return sections

    def _pictures(self, collected: _Collected, folder: Path) -> Iterator[Picture]:
        if not self.config.pictures:
            return
        shown = ", ".join(collected.names[:_SHOWN])
        grid_of([images[:_SHOWN] for images in collected.drawn[:_SHOWN]]).save(folder / "classes.png")
        yield Picture("classes.png", f"Drawn images, a row a class: {shown}", f"A row a class: {shown}.")
        rows = [
            [Tile(to_array(images[row]) / 255, f"{level:.2f}" if row == 0 else "") for level, images in collected.steps]
            for row in range(len(collected.steps[0][1]))
        ]
        save_images(
            rows, folder / "steps.png", "What the network sees in the noise, by level", collected.names[:_SHOWN]
        )
        yield Picture(
            "steps.png", "The image at each noise level, a row a class", "From noise to an image, step by step."
        )
        if collected.alike is not None:
            grid_of(collected.alike).save(folder / "nearest.png")
            caption = "The drawn images nearest to training images, above these."
            yield Picture("nearest.png", caption, caption)


@torch.no_grad()
def _accuracy(classifier: Any, pixels: Tensor, label_N: Tensor) -> float:
    parts = (classifier(classifier.encoding.normalized(part, classifier.device)) for part in pixels.split(MOST_AT_ONCE))
    return float((torch.cat([logits.argmax(-1).cpu() for logits in parts]) == label_N).double().mean())


def _rows(values: Mapping[str, float], count: int) -> list[tuple[str, str]]:
    measured = [(f, values[name]) for name, f in _FIGURES.items() if name in values]
    return [("images", f"{count:,}"), *((title, f"{times * value:.4g}") for (title, times), value in measured)]


def denormalized(image: Tensor, encoding: Any) -> Tensor:
    """Return normalized images (B, C, H, W) as uint8."""
    mean, std = (torch.tensor(v, device=image.device).view(-1, 1, 1) for v in (encoding.mean, encoding.std))
    return ((image.float() * std + mean).clamp(0, 1) * 255).round().byte().cpu()
