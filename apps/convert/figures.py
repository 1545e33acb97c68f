"""The size on disk, cost and score of a run, and a table of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import core
from apps.base.progress import bar
from apps.cli.trial import build_trial
from apps.train.cost.flops import measure_cost, megaflops
from apps.train.step.balance import routing_metrics
from apps.train.watch.progress import routing_figures


@dataclass(frozen=True)
class Figures:
    """Figures of a run.

    Attributes:
        bytes: size of its weights on disk, without an optimizer's state.
        num_params, active_params: parameters, and those that one token touches.
        flops: forward FLOPs of an example of the validation, or None.
        unit: unit of the FLOPs.
        score: the monitored value on the validation batches, or None.
        metric: its name.
    """

    bytes: int
    num_params: int
    active_params: int
    flops: float | None = None
    unit: str = ""
    score: float | None = None
    metric: str = ""


class RunTrial:
    """A run on the first batches of its validation data, on the CPU, as ``moesaic validate`` makes both.

    Args:
        checkpoint: the run's checkpoint.
        config: configuration, if none lies next to it.
        data: further words of the command line.
        batches: number of validation batches.

    Raises:
        ValueError: the model or the data are rejected.
    """

    def __init__(self, checkpoint: Path, config: Path | None, data: Sequence[str], batches: int) -> None:
        self.batches = batches
        self.cli = build_trial(checkpoint, config, batches, data)
        self.model: Any = self.cli.model

    def validated(self, checkpoint: str | None) -> Mapping[str, Any]:
        """Return the validation metrics, with the weights of a checkpoint, or with the model's."""
        arguments: dict[str, Any] = {"datamodule": self.cli.datamodule, "ckpt_path": checkpoint}
        (metrics,) = self.cli.trainer.validate(self.model, **arguments, verbose=False, weights_only=True)
        return metrics

    @torch.no_grad()
    def figures(self, num_bytes: int) -> Figures:
        """Return the run's figures; its model is loaded with them."""
        metrics = self.validated(None if self.cli.ckpt_path is None else str(self.cli.ckpt_path))
        cost = measure_cost(self.model, next(self._batches()))
        metric = self.model.monitor
        score = metrics.get(metric)
        return Figures(num_bytes, cost.num_params, cost.active_params, cost.flops_per_example, cost.unit, score, metric)

    def statistics(
        self, select: Callable[[Any], Any] | None = None, every_token: bool = False
    ) -> dict[str, core.ExpertStatistics]:
        """Return the statistics of the experts over the batches; ``figures`` has loaded the model.

        Args:
            select: returns the examples of a batch that count, or None; None: all count.
            every_token: as in ``core.expert_statistics``.

        Raises:
            ValueError: no example is selected, or as ``core.expert_statistics``.
        """
        batches = [batch if select is None else select(batch) for batch in self._batches()]
        batches = [batch for batch in batches if batch is not None]
        if not batches:
            raise ValueError(f"the first {self.batches} validation batches have no example of it: take more --batches")

        stats = core.RoutingStats({})
        with bar("statistics of the experts", len(batches)) as shown:

            def run(model: Any, batch: Any) -> None:
                nonlocal stats
                with core.record(model) as tape:
                    model(*model.example_inputs(batch))
                stats = stats + core.RoutingStats.from_tape(tape)
                shown.show(shown.done + 1, figures=routing_figures(routing_metrics(stats)))

            return core.expert_statistics(self.model, batches, run, every_token=every_token)

    def _batches(self) -> Iterator[Any]:
        return islice(iter(self.cli.datamodule.val_dataloader()), self.batches)


def counted(outline: nn.Module, num_bytes: int) -> Figures:
    """Return the figures of a model without a pass over data."""
    return Figures(num_bytes, sum(p.numel() for p in outline.parameters()), core.active_params(outline))


def weight_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of tensors; tied ones are there once."""
    places = {
        (v.untyped_storage().data_ptr(), v.storage_offset()): v.numel() * v.element_size() for v in state.values()
    }
    return sum(places.values())


def table(before: Figures, after: Figures) -> str:
    """Return both runs' figures as a table."""
    flops = f"MFLOPs {before.unit}"
    rows = [
        ("weights, MB", before.bytes / 1e6, after.bytes / 1e6, "{:,.2f}"),
        ("parameters", before.num_params, after.num_params, "{:,}"),
        ("active parameters", before.active_params, after.active_params, "{:,}"),
        (flops, before.flops, after.flops, ""),
        (before.metric, before.score, after.score, "{:.4f}"),
    ]
    shown = [("", "before", "after")]
    for name, a, b, form in rows:
        if a is not None and b is not None:
            old, new = (form.format(v) if form else megaflops(v) for v in (a, b))
            shown.append((name, old, new))
    widths = [max(len(row[i]) for row in shown) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in shown)
