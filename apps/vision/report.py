"""What a trained image classifier is asked beside its accuracy: few-shot evaluation, a capacity sweep, who goes where.

The first part is functions of arrays and models; ``VisionReport`` at the end runs them in ``moesaic test`` and writes
pictures and tables into the run's folder.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import core
from apps.data.loader import batches_of_test
from apps.report import plots
from apps.report.intervals import mean_interval
from apps.report.routed import expert_label_counts, expert_of_token
from apps.report.tables import print_table, write_csv

_logger = logging.getLogger(__name__)

# ---- few-shot linear evaluation


@dataclass(frozen=True)
class FewShotResult:
    """Accuracies of one number of shots.

    Attributes:
        shots: labelled images a class.
        accuracies: one a seed, each with other labelled images.
        mean: of the accuracies.
        interval: half width of the 95 % interval of the mean (Student's t); None for one seed.
    """

    shots: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def interval(self) -> float | None:
        return mean_interval(self.accuracies).half_width


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of ``shots`` examples of each class, drawn without replacement, class by class.

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
    """Accuracy of a regularised least-squares classifier from features to {-1, 1} a class (V-MoE, 2106.05974, 3.2).

    Features are standardised by the labelled images; the strength of the regularisation is chosen by the leave-one-out
    error on them, so that no test image takes part.
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
) -> tuple[FewShotResult, ...]:
    """k-shot linear evaluation of frozen features.

    Args:
        features: (N, D) of the images that the labelled ones are drawn from.
        labels: (N,).
        test_features: (M, D).
        test_labels: (M,).
        shots: each k.
        num_seeds: draws of labelled images, seeds 0, 1, ...

    Raises:
        ValueError: a class has fewer than k images.
    """
    return tuple(
        FewShotResult(
            k,
            tuple(
                linear_accuracy(features[chosen], labels[chosen], test_features, test_labels)
                for chosen in (draw_shots(labels, k, seed) for seed in range(num_seeds))
            ),
        )
        for k in shots
    )


@torch.no_grad()
def extract_features(
    model: Any, batches: Iterable[Any], device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """What the head of ``model`` reads, (N, D) float32, and the labels, (N,), of all ``batches``."""
    features, labels = [], []
    for batch in batches:
        tokens = model.forward_features(batch.image.to(device))
        features.append(model.forward_head(tokens, pre_logits=True).float().cpu().numpy())
        labels.append(hard_labels(batch.label).cpu().numpy())
    return np.concatenate(features), np.concatenate(labels)


def hard_labels(label: Tensor) -> Tensor:
    """(B,) class numbers of (B,) class numbers or (B, num_classes) shares."""
    return label.argmax(-1) if label.ndim == 2 else label


# ---- capacity sweep


@dataclass(frozen=True)
class CapacityPoint:
    """A model evaluated at one capacity.

    Attributes:
        priority: who was served first, "position" or "score".
        capacity_factor: None is dropless.
        accuracy: top-1.
        flops_per_image: forward, products alone, of the rows really computed.
        drop_rate: share of the routed pairs no expert computed, over all layers.
        images: how many it was evaluated on.
    """

    priority: str
    capacity_factor: float | None
    accuracy: float
    flops_per_image: float
    drop_rate: float
    images: int


@torch.no_grad()
def capacity_sweep(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    factors: Sequence[float | None] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, None),
    priorities: Sequence[str] = ("position", "score"),
    device: torch.device | str = "cpu",
) -> tuple[CapacityPoint, ...]:
    """Accuracy against FLOPs as the evaluation capacity falls (V-MoE, 2106.05974, section 4.1 and figure 8).

    Below a factor of 1 some pairs must be dropped: by position whatever they show, by score those the router cares for
    least. Where the layer's group is the batch its images compete for capacity, so a point depends on the batches: they
    are the same for all points.

    Args:
        model: with MoE layers; in evaluation mode.
        batches: makes the batches anew for each point.
        factors: capacity factors; None is dropless, where priorities coincide and are run once.
        priorities: "position" is without batch-prioritised routing, "score" with it.
        device: where the model is.

    Raises:
        ValueError: the model has no MoE layer, or there is no batch.
    """
    if not core.moe_layers(model):
        raise ValueError("capacity_sweep needs a model with MoE layers")
    points: list[CapacityPoint] = []
    for priority, factor in itertools.product(priorities, factors):
        same = next((p for p in points if factor is None and p.capacity_factor is None), None)
        if same is not None:
            points.append(replace(same, priority=priority))
            continue
        right = images = flops = computed = chosen = 0
        with core.set_capacity_factor(model, factor, priority=priority):
            for batch in batches():
                with core.record(model) as tape:
                    logits: list[Tensor] = []
                    flops += core.count_flops(lambda x, out=logits: out.append(model(x)), batch.image.to(device))
                stats = core.RoutingStats.from_tape(tape).layers.values()
                computed += sum(int(s.tokens_per_expert.sum()) for s in stats)
                chosen += sum(int(s.chosen_per_expert.sum()) for s in stats)
                right += int((logits[0].argmax(-1).cpu() == hard_labels(batch.label).cpu()).sum())
                images += len(batch.image)
        if not images:
            raise ValueError("capacity_sweep got no batch")
        drop_rate = 1 - computed / max(chosen, 1)
        points.append(CapacityPoint(priority, factor, right / images, flops / images, drop_rate, images))
    return tuple(points)


_PRIORITY_LABELS = {"position": "by position", "score": "batch-prioritised", "random": "at random"}


def sweep_picture(points: Sequence[CapacityPoint], baselines: Sequence[plots.Series] = ()) -> Any:
    """Accuracy over FLOPs, a line a priority, and ``baselines`` beside them."""
    series = []
    for priority in dict.fromkeys(p.priority for p in points):
        line = sorted((p for p in points if p.priority == priority), key=lambda p: p.flops_per_image)
        series.append(
            plots.Series(
                _PRIORITY_LABELS.get(priority, priority),
                [p.flops_per_image for p in line],
                [p.accuracy for p in line],
                connected=True,
            )
        )
    title = f"Accuracy as the evaluation capacity falls, {points[0].images:,} images"
    return plots.quality_against_flops([*series, *baselines], title=title)


# ---- where tokens go


def expert_class_counts(routing: Any, labels_B: Tensor, num_classes: int) -> Tensor:
    """Computed pairs by class of their image and by expert, int64 (num_classes, E).

    Of soft slots and merged experts: tokens by the expert with the largest share.
    """
    label_T = labels_B.repeat_interleave(routing.num_tokens // len(labels_B))
    return expert_label_counts(routing, label_T, num_classes)


def class_share(counts: Tensor) -> np.ndarray:
    """(num_classes, E) counts as shares of each class's pairs."""
    return (counts / counts.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()


# ---- in `moesaic test`


@core.register_config
@dataclass(frozen=True)
class ReportConfig:
    """What ``moesaic test`` adds to the accuracy of an image classifier.

    Attributes:
        few_shot: shots a class of the linear evaluation on frozen features; empty leaves it out.
        few_shot_seeds: draws of labelled images.
        capacity_factors: of the capacity sweep, to which dropless is added; empty leaves it out.
        sweep_images: test images that each point of the sweep sees, the same for all, to the end of a batch.
        pictures: images in the picture of the routing; 0 leaves all pictures out.
    """

    few_shot: tuple[int, ...] = (5, 10)
    few_shot_seeds: int = 5
    capacity_factors: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    sweep_images: int = 2000
    pictures: int = 6

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.few_shot):
            raise ValueError(f"report.few_shot={tuple(self.few_shot)} must be numbers of at least 1")
        if any(not 0 < f < float("inf") for f in self.capacity_factors):
            raise ValueError(f"report.capacity_factors={tuple(self.capacity_factors)} must be positive numbers")
        for name, least in (("few_shot_seeds", 1), ("sweep_images", 1), ("pictures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"report.{name}={getattr(self, name)} must be at least {least}")


class VisionReport(Callback):
    """After a test in one process: few-shot accuracy, the capacity sweep and the pictures of the routing.

    Writes into ``<run folder>/report``: ``few_shot.csv``, ``capacity_sweep.csv`` and ``.png``, ``routing.png``,
    ``expert_class.png``, ``load.png``; prints the tables; logs ``test/few_shot_<k>``.

    Args:
        config: what to do.
    """

    def __init__(self, config: ReportConfig) -> None:
        self.config = config

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:  # each process has a share of the images, and of a sharded model a share of that
            if trainer.is_global_zero:
                _logger.info("the report is left out with several processes: test with --trainer.devices 1 for it")
            return
        folder = Path(trainer.default_root_dir) / "report"
        model: Any = pl_module.model
        written: list[Path] = []
        if self.config.few_shot:
            written += self._few_shot(trainer, pl_module, folder)
        if core.moe_layers(model):
            if self.config.pictures:
                written += self._pictures(trainer, pl_module, folder)
            # Expert choice has a capacity of its own, soft slots and merged experts have none.
            if self.config.capacity_factors and "capacity_factor" in model.moe.router.layer_options():
                written += self._sweep(trainer, pl_module, folder)
        if written:
            _logger.info(f"{folder}: {', '.join(p.name for p in written)}")

    def _few_shot(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> list[Path]:
        support = support_batches(trainer)
        if support is None:
            _logger.info("few-shot evaluation left out: no images to draw labelled ones from")
            return []
        features, labels = extract_features(pl_module.model, support, pl_module.device)
        test_features, test_labels = extract_features(pl_module.model, batches_of_test(trainer), pl_module.device)
        counts = np.bincount(labels)
        most = int(counts[counts > 0].min()) if np.count_nonzero(counts) > 1 else 0
        shots = [k for k in self.config.few_shot if k <= most]
        if len(shots) < len(self.config.few_shot):
            left = ", ".join(f"{k}-shot" for k in self.config.few_shot if k > most)
            _logger.info(f"{left} left out: a class has only {most} images to draw from")
        results = few_shot(features, labels, test_features, test_labels, shots, self.config.few_shot_seeds)
        for r in results:
            pl_module.log(f"test/few_shot_{r.shots}", r.mean, batch_size=1, rank_zero_only=True)
        if not results:
            return []
        seeds = self.config.few_shot_seeds
        rows = [{"shots": r.shots, "accuracy": r.mean, "interval": r.interval, "seeds": seeds} for r in results]
        print_table(
            f"Few-shot linear evaluation, {'one draw' if seeds == 1 else f'mean of {seeds} draws'}",
            ("shots a class", "test accuracy, %", "95 % interval"),
            [
                (str(r.shots), f"{100 * r.mean:.2f}", "–" if r.interval is None else f"± {100 * r.interval:.2f}")
                for r in results
            ],
        )
        return [write_csv(folder / "few_shot.csv", rows)]

    def _sweep(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> list[Path]:
        points = capacity_sweep(
            pl_module.model,
            lambda: _limited(batches_of_test(trainer), self.config.sweep_images),
            (*self.config.capacity_factors, None),
            device=pl_module.device,
        )
        by_factor = {(p.priority, p.capacity_factor): p for p in points}
        rows = []
        for factor in dict.fromkeys(p.capacity_factor for p in points):
            plain, score = by_factor["position", factor], by_factor["score", factor]
            rows.append(
                (
                    "dropless" if factor is None else f"{factor:g}",
                    f"{100 * plain.drop_rate:.1f}",
                    f"{plain.flops_per_image / 1e6:.2f}",
                    f"{100 * plain.accuracy:.2f}",
                    f"{100 * score.accuracy:.2f}",
                )
            )
        print_table(
            f"Capacity sweep at inference, {points[0].images:,} test images",
            ("capacity", "dropped, %", "MFLOPs/image", "top-1, %", "with batch priority, %"),
            rows,
        )
        records = [{f.name: getattr(p, f.name) for f in fields(p)} for p in points]
        return [
            write_csv(folder / "capacity_sweep.csv", records),
            plots.save_picture(sweep_picture(points), folder / "capacity_sweep.png"),
        ]

    def _pictures(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> list[Path]:
        model: Any = pl_module.model
        num_classes = model.num_classes
        counts: dict[str, Tensor] = {}
        shown: dict[str, list[np.ndarray]] = {}
        images: list[np.ndarray] = []
        labels: list[int] = []
        stats: core.RoutingStats | None = None
        grid = model.patch_embed.grid_size
        for batch in batches_of_test(trainer):
            with torch.no_grad(), core.record(model) as tape:
                model(batch.image.to(pl_module.device))
            batch_stats = core.RoutingStats.from_tape(tape)
            stats = batch_stats if stats is None else stats + batch_stats
            label_B = hard_labels(batch.label)
            picks = _first_of_each_class(label_B, labels, self.config.pictures, num_classes)
            for entry in tape.entries:
                name = block_name(entry.name)
                c = expert_class_counts(entry.routing, label_B, num_classes)
                counts[name] = counts[name] + c if name in counts else c
                if picks:
                    ids = expert_of_token(entry.routing).unflatten(0, (len(label_B), -1))[picks]
                    ids = ids[:, model.num_prefix_tokens :].unflatten(1, grid)
                    shown.setdefault(name, []).append(ids.cpu().numpy())
            if picks:
                images.append(batch.image[picks].permute(0, 2, 3, 1).float().cpu().numpy())
                labels += [int(label_B[p]) for p in picks]
        if stats is None:
            return []
        names = class_names(trainer, num_classes)
        experts = {name: np.concatenate(parts) for name, parts in shown.items()}
        num_experts = max(c.shape[1] for c in counts.values())
        order = np.argsort(labels, kind="stable")
        pictured = displayed(np.concatenate(images), trainer)[order]
        loads = {block_name(n): s.tokens_per_expert.cpu().numpy() for n, s in stats.layers.items()}
        drops = {block_name(n): s.drop_rate for n, s in stats.layers.items()}
        # A class without a test image has no shares, and would be drawn as one whose tokens no expert takes.
        with_images = sum(c.sum(1) for c in counts.values()).nonzero().squeeze(1).tolist()  # type: ignore[union-attr]
        return [
            plots.save_picture(
                plots.routing_over_images(
                    pictured, {n: e[order] for n, e in experts.items()}, num_experts, [names[labels[i]] for i in order]
                ),
                folder / "routing.png",
            ),
            plots.save_picture(
                plots.expert_class_heatmap(
                    {n: class_share(c[with_images]) for n, c in counts.items()}, [names[label] for label in with_images]
                ),
                folder / "expert_class.png",
            ),
            plots.save_picture(plots.load_bars(loads, drops), folder / "load.png"),
        ]


def block_name(layer: str) -> str:
    """The layer ``blocks.3.mlp`` as "block 3"; other names as they are."""
    parts = layer.split(".")
    return f"block {parts[parts.index('blocks') + 1]}" if "blocks" in parts[:-1] else layer


def _first_of_each_class(label_B: Tensor, taken: Sequence[int], wanted: int, num_classes: int) -> list[int]:
    """Positions in a batch of images still to be shown: classes not shown yet first."""
    picks: list[int] = []
    seen = set(taken)
    for position, label in enumerate(label_B.tolist()):
        if len(taken) + len(picks) >= wanted:
            break
        if label not in seen or len(seen) == num_classes:
            picks.append(position)
            seen.add(label)
    return picks


def _limited(batches: Iterable[Any], images: int) -> Iterator[Any]:
    """Whole batches until ``images`` were seen."""
    seen = 0
    for batch in batches:
        if seen >= images:
            return
        yield batch
        seen += len(batch.image)


def support_batches(trainer: Trainer) -> Iterable[Any] | None:
    """Batches to draw labelled images from, without random transforms, within the trainer's limit for validation.

    The validation split, which the features were not trained on, else the training images; None without a data module.
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
    """The data's names of its classes, else their numbers."""
    names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    return [str(n) for n in names] if names and len(names) == num_classes else [str(c) for c in range(num_classes)]


def displayed(images: np.ndarray, trainer: Trainer) -> np.ndarray:
    """Normalised (N, H, W, C) images as values in 0..1, by the data's mean and std, else by their own range."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is not None and std is not None:
        return np.clip(images * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32), 0.0, 1.0)
    low, high = images.min(), images.max()
    return (images - low) / max(high - low, 1e-12)
