"""The test report of an image classifier: few-shot accuracy, and which expert takes what."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import core
from apps.data.loader import batches_of_test
from apps.report.base import Report, ReportConfig, first_batches, is_left_out
from apps.report.classified import Answers
from apps.report.images import Tile, save_images, tinted
from apps.report.intervals import Interval
from apps.report.page import Part, Picture, Section, Table
from apps.report.routed import choosing, experts_of_token, layer_label
from apps.report.tables import write_csv
from apps.report.use import ExpertUse, Labels, load_parts, map_parts, tokens_of
from apps.vision.few_shot import extract_features, few_shot, hard_labels
from apps.vision.model import VMoE
from core.fields import Count, CountOrZero

_logger = logging.getLogger(__name__)


@core.register_config
@dataclass(frozen=True)
class VisionReportConfig(ReportConfig):
    """Options of the report that ``moesaic test`` adds to the accuracy of an image classifier.

    Attributes:
        routing_examples: test images whose routing is plotted, to the end of a batch; 0 plots none.
        few_shot: shots a class of the linear evaluation on frozen features; empty leaves it out.
        few_shot_seeds: number of draws of labeled images.
        images: images shown with the experts of their patches; 0 shows none.
    """

    routing_examples: CountOrZero = 50_000
    few_shot: tuple[Count, ...] = (5, 10)
    few_shot_seeds: Count = 5
    images: CountOrZero = 6

    def brief(self) -> Self:
        return dataclasses.replace(self, few_shot=())


@dataclass
class Shown:
    """Images that are shown with the experts of their patches.

    Attributes:
        images: the images, (H, W, C) each, as the model sees them.
        labels: classes of these images.
        experts: the expert of each of their patches, (grid height, grid width) an image, by layer.
    """

    images: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    experts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, model: Any, tape: core.Tape, batch: Any, wanted: int) -> None:
        """Keep images of a batch until there are ``wanted``, classes that have none first."""
        label_B = hard_labels(batch.label)
        picks = _first_of_each_class(label_B, self.labels, wanted, model.num_classes)
        for entry in choosing(tape.entries) if picks else ():
            ids_BHW1 = patch_experts(model, entry, len(label_B))
            if ids_BHW1 is not None:  # few tokens enter some blocks: they have no places in a picture
                own = self.experts.setdefault(layer_label(entry.name), [])
                own += list(ids_BHW1[picks].squeeze(-1).cpu().numpy())
        self.images += list(batch.image[picks].permute(0, 2, 3, 1).float().cpu().numpy())
        self.labels += label_B[picks].tolist()

    def draw(self, trainer: Trainer, path: Path, names: Sequence[str], num_experts: int) -> Picture:
        """Write the images, by class, and return its page section."""
        order = np.argsort(self.labels, kind="stable")
        titles = [names[self.labels[i]] for i in order]
        images = displayed(np.stack(self.images), trainer)
        rows = patch_rows([(images[i], {n: own[i] for n, own in self.experts.items()}) for i in order], num_experts)
        save_images(rows, path, "Expert of each patch", titles, num_experts)
        seen = f"{len(order)} test images ({', '.join(dict.fromkeys(titles))}), and each again with its patches in the "
        seen += f"color of their expert, in {', '.join(self.experts)}"
        return Picture(path.name, seen, "Patches and their experts, a column for each layer.")


def patch_rows(
    images: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], num_experts: int
) -> list[list[Tile | None]]:
    """Return a row for each image: the image, and for each layer the image with the experts of its patches.

    Args:
        images: each as in ``Tile``, with the experts of its patches by layer.
        num_experts: E.
    """
    return [
        [
            Tile(image, "" if row else "image"),
            *(tinted(image, ids, num_experts, "" if row else name) for name, ids in experts.items()),
        ]
        for row, (image, experts) in enumerate(images)
    ]


def patch_experts(model: Any, entry: Any, num_images: int, most: int = 1) -> Tensor | None:
    """Return the experts that computed each patch, best first, int64 (B, grid height, grid width, most); -1 if there
    are fewer.

    Args:
        model: the ``VMoE`` that was recorded.
        entry: a pass of one of its layers.
        num_images: number of images B of the pass.
        most: number of experts of a patch.

    Returns:
        The experts; None if the layer's tokens are not the image's.
    """
    ids_BSK = experts_of_token(entry.routing, most).unflatten(0, (num_images, -1))
    layer, size = model.get_submodule(entry.name), grid_size(model, ids_BSK.shape[1])
    if isinstance(layer, core.PatchMoE):  # the router chose for several patches at once
        return torch.stack([layer.grid.spread(ids_BS, *size) for ids_BS in ids_BSK.unbind(-1)], -1)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if ids_BSK.shape[1] != prefix + math.prod(size):
        return None
    return ids_BSK[:, prefix:].unflatten(1, size)


def grid_size(model: Any, num_tokens: int) -> tuple[int, int]:
    """Return height and width of the grid of an image's tokens: of its patches, else of the positions of a layer."""
    if isinstance(model, VMoE):
        return model.patch_embed.grid_size
    side = math.isqrt(num_tokens - getattr(model, "num_prefix_tokens", 0))
    return side, side


def _first_of_each_class(label_B: Tensor, taken: Sequence[int], wanted: int, num_classes: int) -> list[int]:
    """Return the positions in a batch of images to be shown, classes not shown yet first."""
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
    """The report of a test in one process: few-shot accuracy and the pictures of the routing.

    It writes ``few_shot.csv``, ``routing.png``, ``expert_class.png``, ``load.png``, and logs ``test/few_shot_<k>``.
    """

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if is_left_out(trainer):
            return None
        model: Any = pl_module.model
        results = self._few_shot(trainer, pl_module)
        for shots, accuracy in results.items():
            pl_module.log(f"test/few_shot_{shots}", accuracy.mean, batch_size=1, rank_zero_only=True)
        use = ExpertUse(tokens_of(pl_module), {"class": Labels("class", model.num_classes)})
        shown, answers = Shown(), Answers(model.num_classes)
        if self.config.pictures:
            for batch in first_batches(batches_of_test(trainer), self.config.routing_examples, lambda b: len(b.image)):
                with torch.no_grad(), core.record(model) as tape:
                    logits_BC = model(batch.image.to(pl_module.device))
                use.add(tape, batch)
                if len(tape):
                    shown.add(model, tape, batch, self.config.images)
                answers.add(logits_BC, hard_labels(batch.label))
        return trainer, results, use, shown, answers

    def write(self, collected: Any, folder: Path) -> list[Section]:
        trainer, results, use, shown, answers = collected
        names = class_names(trainer, len(answers.counts_CC))
        sections = [Section("Answers", tuple(answers.parts(names)))]
        if use.stats.layers:
            counts = use.counts["class"]
            parts: list[Part] = [*map_parts([(counts, names)], "a class", "class", folder / "expert_class.png")]
            parts += load_parts(use.stats, folder / "load.png")
            if shown.experts:
                most = max(counts_CE.shape[1] for counts_CE in counts.values())
                parts.append(shown.draw(trainer, folder / "routing.png", names, most))
            sections.append(Section("What the experts are used for", tuple(parts)))
        if results:
            sections.append(_write_few_shot(results, folder))
        return sections

    def _few_shot(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, Interval]:
        if not self.config.few_shot:
            return {}
        support = support_batches(trainer)
        if support is None:
            _logger.info("few-shot evaluation left out: no images to draw labeled ones from")
            return {}
        features, labels = extract_features(pl_module.model, support, pl_module.device)
        test_features, test_labels = extract_features(pl_module.model, batches_of_test(trainer), pl_module.device)
        classes = np.union1d(labels, test_labels)  # one that only the test has cannot be told
        most = int(np.bincount(labels, minlength=classes[-1] + 1)[classes].min()) if len(classes) > 1 else 0
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
    return Section("Few labeled images", (table,))


def support_batches(trainer: Trainer) -> Iterable[Any] | None:
    """Return batches to draw labeled images from, untransformed, within the trainer's limit for validation.

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
        if not len(loader):  # a folder with only images to test
            return None
    limit = trainer.limit_val_batches
    return itertools.islice(loader, int(limit if isinstance(limit, int) else limit * len(loader)))


def class_names(trainer: Trainer, num_classes: int) -> list[str]:
    """Return the names that the data gives its classes, else their numbers."""
    names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    return [str(n) for n in names] if names and len(names) == num_classes else [str(c) for c in range(num_classes)]


def displayed(images: np.ndarray, trainer: Trainer) -> np.ndarray:
    """Return normalized (N, H, W, C) images as values in 0..1, by the data's mean and std, else by their own range."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    encoding = getattr(data, "encoding", data)
    mean, std = getattr(encoding, "mean", None), getattr(encoding, "std", None)
    if mean is not None and std is not None:
        return np.clip(images * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32), 0.0, 1.0)
    low, high = images.min(), images.max()
    return (images - low) / max(high - low, 1e-12)
