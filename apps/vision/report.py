"""The test report of an image classifier: few-shot accuracy, a capacity sweep, and which expert takes what."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.report import plots
from apps.report.base import Report, ReportConfig, first_batches, is_left_out
from apps.report.classified import Answers
from apps.report.heatmaps import heatmaps, maps_by_label
from apps.report.intervals import Interval
from apps.report.page import Part, Picture, Section, Table
from apps.report.page.experts import load_charts, map_charts
from apps.report.routed import expert_label_counts, experts_of_token, layer_label
from apps.report.tables import write_csv
from apps.vision.capacity_sweep import CapacityPoint, capacity_sweep, sweep_chart, sweep_picture
from apps.vision.few_shot import extract_features, few_shot, hard_labels
from apps.vision.pictures import routing_over_images
from core.fields import Count, CountOrZero, Positive

_logger = logging.getLogger(__name__)


@core.register_config
@dataclass(frozen=True)
class VisionReportConfig(ReportConfig):
    """Options of the report that ``moesaic test`` adds to the accuracy of an image classifier.

    Attributes:
        routing_examples: test images whose routing is drawn, to the end of a batch; 0 draws none.
        few_shot: shots a class of the linear evaluation on frozen features; empty leaves it out.
        few_shot_seeds: number of draws of labelled images.
        capacity_factors: factors of the capacity sweep, to which dropless is added; empty leaves it out.
        sweep_images: test images that each point of the sweep sees, the same for all, to the end of a batch.
        images: images drawn with the experts of their patches; 0 draws none.
    """

    routing_examples: CountOrZero = 50_000
    few_shot: tuple[Count, ...] = (5, 10)
    few_shot_seeds: Count = 5
    capacity_factors: tuple[Positive, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    sweep_images: Count = 2000
    images: CountOrZero = 6

    def brief(self) -> Self:
        return dataclasses.replace(self, few_shot=(), capacity_factors=())


@dataclass
class PatchRouting:
    """The experts that computed the patches of a test's images.

    Attributes:
        counts: computed pairs by class of the image, (num_classes, E) for each layer.
        stats: the layers' loads; None before the first batch.
        images: the images to be drawn, (H, W, C) each, as the model sees them.
        labels: classes of these images.
        experts: the expert of each of their patches, (grid height, grid width) an image, for each layer.
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    stats: core.RoutingStats | None = None
    images: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    experts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, model: Any, batch: Any, device: torch.device, wanted: int) -> Tensor:
        """Read a batch, and keep images to draw until there are ``wanted``, classes that have none first.

        Returns:
            The logits of the images, (B, num_classes).
        """
        with core.record(model) as tape:
            logits: Tensor = model(batch.image.to(device))
        if not len(tape):
            return logits
        stats = core.RoutingStats.from_tape(tape)
        self.stats = stats if self.stats is None else self.stats + stats
        label_B = hard_labels(batch.label)
        picks = _first_of_each_class(label_B, self.labels, wanted, model.num_classes)
        for entry in tape.entries:
            name = layer_label(entry.name)
            counts = expert_label_counts(entry.routing, label_B, model.num_classes)
            self.counts[name] = self.counts.get(name, 0) + counts
            ids_BHW1 = patch_experts(model, entry, len(label_B))
            if ids_BHW1 is None:
                continue  # few tokens enter the block: they have no places in a picture
            self.experts.setdefault(name, []).extend(ids_BHW1[picks].squeeze(-1).cpu().numpy())
        self.images += list(batch.image[picks].permute(0, 2, 3, 1).float().cpu().numpy())
        self.labels += label_B[picks].tolist()
        return logits

    def draw(self, trainer: Trainer, folder: Path, names: Sequence[str]) -> Section:
        """Write ``routing.png``, ``expert_class.png`` and ``load.png``; return what a page shows of them."""
        assert self.stats is not None
        parts: list[Part] = []
        if self.images:
            order = np.argsort(self.labels, kind="stable")
            picture = routing_over_images(
                displayed(np.stack(self.images), trainer)[order],
                {name: np.stack(own)[order] for name, own in self.experts.items()},
                max(counts.shape[1] for counts in self.counts.values()),
                [names[self.labels[i]] for i in order],
            )
            plots.save_picture(picture, folder / "routing.png")
            classes = ", ".join(dict.fromkeys(names[self.labels[i]] for i in order))
            seen = (
                f"{len(self.images)} test images ({classes}), and each again with its patches in the colour of their "
            )
            seen += f"expert{', in ' if self.experts else ''}{', '.join(self.experts)}"
            parts.append(Picture("routing.png", seen, "Patches and their experts, a column for each layer."))
        maps, too_many = maps_by_label({name: counts.cpu().numpy() for name, counts in self.counts.items()}, names)
        title = "Which expert takes the tokens of a class (its share of all)"
        title += f": the most specialised of {len(names)} classes" if too_many else ""
        picture = heatmaps([maps], title, "share of the class's tokens, %")
        plots.save_picture(picture, folder / "expert_class.png")
        layers = {layer_label(name): stats for name, stats in self.stats.layers.items()}
        loads = {name: stats.tokens_per_expert.cpu().numpy() for name, stats in layers.items()}
        drops = {name: stats.drop_rate for name, stats in layers.items()}
        plots.save_picture(plots.load_bars(loads, drops), folder / "load.png")
        parts = [*map_charts(maps, "Which expert takes a class", "class"), *load_charts(loads, drops), *parts]
        return Section("What the experts are used for", tuple(parts))


def patch_experts(model: Any, entry: Any, num_images: int, most: int = 1) -> Tensor | None:
    """Return the experts that computed each patch, best first, int64 (B, grid height, grid width, most); E where there
    are fewer.

    Args:
        model: the ``VMoE`` that was recorded.
        entry: a pass of one of its layers.
        num_images: number of images B of the pass.
        most: number of experts of a patch.

    Returns:
        The experts; None where the layer's tokens are not the image's.
    """
    ids_BSK = experts_of_token(entry.routing, most).unflatten(0, (num_images, -1))
    layer, size = model.get_submodule(entry.name), model.patch_embed.grid_size
    if isinstance(layer, core.PatchMoE):  # the router chose for several patches at once
        return torch.stack([layer.grid.spread(ids_BS, *size) for ids_BS in ids_BSK.unbind(-1)], -1)
    if ids_BSK.shape[1] != model.num_prefix_tokens + model.patch_embed.num_patches:
        return None
    return ids_BSK[:, model.num_prefix_tokens :].unflatten(1, size)


def _first_of_each_class(label_B: Tensor, taken: Sequence[int], wanted: int, num_classes: int) -> list[int]:
    """Return the positions in a batch of images to be shown, those of classes not shown yet first."""
    picks: list[int] = []
    seen = set(taken)
    for position, label in enumerate(label_B.tolist()):
        if len(taken) + len(picks) >= wanted:
            break
        if label not in seen or len(seen) == num_classes:
            picks.append(position)
            seen.add(label)
    return picks


class VisionReport(Report):
    """The report of a test in one process: few-shot accuracy, the capacity sweep and the pictures of the routing.

    It writes ``few_shot.csv``, ``capacity_sweep.csv`` and ``.png``, ``routing.png``, ``expert_class.png``,
    ``load.png``, and logs ``test/few_shot_<k>``.
    """

    def __init__(self, config: VisionReportConfig) -> None:
        self.config = config

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if is_left_out(trainer):
            return None
        model: Any = pl_module.model
        results = self._few_shot(trainer, pl_module)
        for shots, accuracy in results.items():
            pl_module.log(f"test/few_shot_{shots}", accuracy.mean, batch_size=1, rank_zero_only=True)
        routing, answers = PatchRouting(), Answers(model.num_classes)
        points: tuple[CapacityPoint, ...] = ()
        if self.config.pictures:
            for batch in self._first(trainer, self.config.routing_examples):
                logits_BC = routing.add(model, batch, pl_module.device, self.config.images)
                answers.add(logits_BC, hard_labels(batch.label))
        if core.moe_layers(model):
            # Expert choice has a capacity of its own; soft slots and merged experts have none.
            has_capacity = bool(model.moes) and all("capacity_factor" in moe.router.layer_options for moe in model.moes)
            if self.config.capacity_factors and has_capacity:
                points = capacity_sweep(
                    model,
                    lambda: self._first(trainer, self.config.sweep_images),
                    (*self.config.capacity_factors, None),
                    device=pl_module.device,
                )
        return trainer, results, routing, answers, points

    def write(self, collected: Any, folder: Path) -> list[Section]:
        trainer, results, routing, answers, points = collected
        names = class_names(trainer, len(answers.counts_CC))
        sections = [Section("Answers", tuple(answers.parts(names)))]
        if routing.stats is not None:
            sections.append(routing.draw(trainer, folder, names))
        if points:
            sections.append(_write_sweep(points, folder))
            if self.config.pictures:
                plots.save_picture(sweep_picture(points), folder / "capacity_sweep.png")
        if results:
            sections.append(_write_few_shot(results, folder))
        return sections

    def _first(self, trainer: Trainer, images: int) -> Iterable[Any]:
        return first_batches(batches_of_test(trainer), images, lambda batch: len(batch.image))

    def _few_shot(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, Interval]:
        if not self.config.few_shot:
            return {}
        support = support_batches(trainer)
        if support is None:
            _logger.info("few-shot evaluation left out: no images to draw labelled ones from")
            return {}
        features, labels = extract_features(pl_module.model, support, pl_module.device)
        test_features, test_labels = extract_features(pl_module.model, batches_of_test(trainer), pl_module.device)
        counts = np.bincount(labels)
        most = int(counts[counts > 0].min()) if np.count_nonzero(counts) > 1 else 0
        shots = [k for k in self.config.few_shot if k <= most]
        if len(shots) < len(self.config.few_shot):
            left = ", ".join(f"{k}-shot" for k in self.config.few_shot if k > most)
            _logger.info(f"{left} left out: a class has only {most} images to draw from")
        return few_shot(features, labels, test_features, test_labels, shots, self.config.few_shot_seeds)


def _write_few_shot(results: Mapping[int, Interval], folder: Path) -> Section:
    seeds = next(iter(results.values())).count
    table = Table(
        f"Few-shot linear evaluation, {'one draw' if seeds == 1 else f'mean of {seeds} draws'}",
        ("shots a class", "test accuracy, %", "95 % interval"),
        tuple(
            (str(k), f"{100 * a.mean:.2f}", "–" if a.half_width is None else f"± {100 * a.half_width:.2f}")
            for k, a in results.items()
        ),
    )
    rows = [{"shots": k, "accuracy": a.mean, "interval": a.half_width, "seeds": seeds} for k, a in results.items()]
    write_csv(folder / "few_shot.csv", rows)
    return Section("Few labelled images", (table,))


def _write_sweep(points: Sequence[CapacityPoint], folder: Path) -> Section:
    half = len(points) // 2  # the same factors by position, then by score
    table = Table(
        f"Capacity sweep at inference, {points[0].images:,} test images",
        ("capacity", "dropped, %", "MFLOPs/image", "top-1, %", "with batch priority, %"),
        tuple(
            (
                "dropless" if plain.capacity_factor is None else f"{plain.capacity_factor:g}",
                f"{100 * plain.drop_rate:.1f}",
                f"{plain.flops_per_image / 1e6:.2f}",
                f"{100 * plain.accuracy:.2f}",
                f"{100 * score.accuracy:.2f}",
            )
            for plain, score in zip(points[:half], points[half:], strict=True)
        ),
    )
    write_csv(folder / "capacity_sweep.csv", [asdict(p) for p in points])
    return Section("Less capacity at inference", (sweep_chart(points), table))


def support_batches(trainer: Trainer) -> Iterable[Any] | None:
    """Return batches to draw labelled images from, untransformed, within the trainer's limit for validation.

    They come from the validation split, which the features were not trained on, else from the training images. Without
    either, return None.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        return None
    data.setup("validate")
    loader = data.val_dataloader()
    if not len(loader):
        train = getattr(data, "train_eval_dataloader", None)
        if train is None:
            return None
        loader = train()
        if not len(loader):  # a folder of images to test alone
            return None
    limit = trainer.limit_val_batches
    return itertools.islice(loader, int(limit if isinstance(limit, int) else limit * len(loader)))


def class_names(trainer: Trainer, num_classes: int) -> list[str]:
    """Return the names that the data gives its classes, else their numbers."""
    names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    return [str(n) for n in names] if names and len(names) == num_classes else [str(c) for c in range(num_classes)]


def displayed(images: np.ndarray, trainer: Trainer) -> np.ndarray:
    """Return normalised (N, H, W, C) images as values in 0..1, by the data's mean and std, else by their own range."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is not None and std is not None:
        return np.clip(images * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32), 0.0, 1.0)
    low, high = images.min(), images.max()
    return (images - low) / max(high - low, 1e-12)
