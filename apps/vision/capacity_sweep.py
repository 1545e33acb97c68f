"""Accuracy of a sparse image classifier as its evaluation capacity falls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.base.progress import each
from apps.nets.depths import TokenGate
from apps.report import plots
from apps.report.page import Line, LineChart
from apps.vision.few_shot import hard_labels

_PRIORITIES = {"position": "by position", "score": "batch-prioritised"}


@dataclass(frozen=True)
class CapacityPoint:
    """A model, evaluated at one capacity.

    Attributes:
        priority: order in which tokens were served, "position" or "score".
        capacity_factor: factor of the capacity; None is dropless.
        accuracy: top-1.
        flops_per_image: FLOPs of the forward's matrix products, over the rows that were really computed.
        drop_rate: share of the routed pairs that no expert computed, over all layers.
        images: number of images.
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
    device: torch.device | str = "cpu",
) -> tuple[CapacityPoint, ...]:
    """Return accuracy against FLOPs as the evaluation capacity falls (V-MoE, 2106.05974, section 4.1 and figure 8).

    Below a factor of 1 some pairs must be dropped: the last ones by position, or those of the lowest score. Where the
    layer's group is the batch its images compete for capacity, so all points see the same batches.

    Args:
        model: a classifier with MoE layers, in evaluation mode.
        batches: makes the batches anew for each point.
        factors: capacity factors, each with and without batch priority; None is dropless and is run once for both.
        device: where the model is.

    Raises:
        ValueError: the model has no MoE layer, or there is no batch.
    """
    if not core.moe_layers(model):
        raise ValueError("capacity_sweep needs a model with MoE layers")
    points: list[CapacityPoint] = []
    for priority, factor in each(list(itertools.product(_PRIORITIES, factors)), "accuracy against capacity"):
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
                layers = core.RoutingStats.from_tape(tape).layers
                stats = [s for name, s in layers.items() if not isinstance(model.get_submodule(name), TokenGate)]
                computed += sum(int(s.tokens_per_expert.sum()) for s in stats)
                chosen += sum(int(s.chosen_per_expert.sum()) for s in stats)
                right += int((logits[0].argmax(-1).cpu() == hard_labels(batch.label).cpu()).sum())
                images += len(batch.image)
        if not images:
            raise ValueError("capacity_sweep got no batch")
        drop_rate = 1 - computed / max(chosen, 1)
        points.append(CapacityPoint(priority, factor, right / images, flops / images, drop_rate, images))
    return tuple(points)


def sweep_chart(points: Sequence[CapacityPoint]) -> LineChart:
    """Return accuracy over FLOPs as a chart of a page, a line for each priority."""
    lines = []
    for priority, label in _PRIORITIES.items():
        own = sorted((p for p in points if p.priority == priority), key=lambda p: p.flops_per_image)
        mflops, accuracy = zip(*((p.flops_per_image / 1e6, 100 * p.accuracy) for p in own), strict=True)
        lines.append(Line(label, mflops, accuracy))
    summary = f"Accuracy as the evaluation capacity falls, {points[0].images:,} images."
    return LineChart("Accuracy against FLOPs", summary, "MFLOPs an image", "top-1, %", tuple(lines))


def sweep_picture(points: Sequence[CapacityPoint]) -> Any:
    """Draw accuracy over FLOPs, a line for each priority."""
    series = []
    for priority, label in _PRIORITIES.items():
        line = sorted((p for p in points if p.priority == priority), key=lambda p: p.flops_per_image)
        flops = [p.flops_per_image for p in line]
        series.append(plots.Series(label, flops, [p.accuracy for p in line], connected=True))
    title = f"Accuracy as the evaluation capacity falls, {points[0].images:,} images"
    return plots.quality_against_flops(series, title=title, unit="an image")
