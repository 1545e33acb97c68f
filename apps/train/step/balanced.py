"""``BalancedModule`` does what MoE layers ask of a training and of an evaluation, whatever the task is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import core

Stage = Literal["train", "val", "test"]


class BalancedModule(LightningModule):
    """A LightningModule with MoE layers inside: their balance losses, selection biases and figures.

    A subclass records a tape around its task's loss in each step (``core.record``), and hands it to ``keep_loads`` in a
    training step and to ``count_routing`` in an evaluation.
    """

    aux_weight: float = 1.0
    """Weight of the layers' balance losses relative to the task's loss."""

    detailed_routing: bool = False
    """Whether the log has the detailed figures of each layer."""

    on_routing: Callable[[str, core.RoutingStats], None] | None = None
    """Called with the prefix of the logged names and the statistics of all ranks, on every rank: after a training step
    that is logged, and after each pass of validation or test."""

    predict: Callable[..., Any]
    """Answers what a user has, such as image files; each app's model has its own, a user's module may have none."""

    _moe_tape: core.Tape | None = None
    _moe_stats: core.RoutingStats | None = None

    def keep_loads(self, tape: core.Tape) -> None:
        """Keep the experts' loads of a training step until the optimizer's step updates the selection biases."""
        # Only loads are kept: logits and scores of every micro-batch would stay until the optimizer's step.
        self._moe_tape = tape.loads() if self._moe_tape is None else self._moe_tape.merge(tape.loads())

    def balance_values(self, tape: core.Tape, aux: core.AuxLosses) -> dict[str, Tensor]:
        """Return the logged values of a training step's MoE layers, by name; empty for a model without any."""
        values = {f"train/{name}": value for name, value in aux.terms.items()}
        if core.moe_layers(self):  # a rank with an empty tape takes part in the sums too
            values["train/aux_loss"] = aux.total
            values |= self._routing_values(core.RoutingStats.from_tape(tape).all_reduce(), "routing")
        return values

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # In on_train_batch_end it would be too late: Lightning calls the callbacks' hook, which may save, first.
        super().optimizer_step(*args, **kwargs)
        self._update_biases()

    def _update_biases(self) -> None:
        tape, self._moe_tape = self._moe_tape, None
        if tape is not None:  # an empty one counts too: other ranks may have passes, and wait
            core.update_expert_bias(self, tape)

    def count_routing(self, tape: core.Tape) -> None:
        """Add the passes of an evaluation step to the figures of its epoch."""
        if len(tape):
            stats = core.RoutingStats.from_tape(tape)
            self._moe_stats = stats if self._moe_stats is None else self._moe_stats + stats

    def routing_so_far(self) -> dict[str, Tensor]:
        """Return the figures of an evaluation that runs, over this process's batches until now; empty before them."""
        return {} if self._moe_stats is None else routing_metrics(self._moe_stats)

    def log_routing(self, stage: Stage) -> None:
        """Log the figures of the whole pass: the imbalance of the sum over batches and ranks, not a mean."""
        stats, self._moe_stats = self._moe_stats, None
        if stats is None and not core.moe_layers(self):
            return
        # A rank without a batch takes part in the sums.
        stats = (stats or core.RoutingStats({})).all_reduce()
        if stats.layers:
            self.log_dict(self._routing_values(stats, f"{stage}/routing"), sync_dist=True)

    def _routing_values(self, stats: core.RoutingStats, prefix: str) -> dict[str, Tensor]:
        if self.on_routing is not None:
            self.on_routing(prefix, stats)
        return routing_metrics(stats, prefix, self.detailed_routing)

    def logs_this_step(self) -> bool:
        """Return whether the trainer logs the training step that runs."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0


def routing_metrics(stats: core.RoutingStats, prefix: str = "routing", detailed: bool = False) -> dict[str, Tensor]:
    """Return the figures of each layer, ``{prefix}/{layer}/{figure}``, and their means, ``{prefix}/{figure}``.

    Layers of one expert, such as the gates of blocks, are in the means only if all layers are such.
    """
    metrics: dict[str, Tensor] = {}
    figures: dict[str, list[float]] = {}
    averaged = [name for name, own in stats.layers.items() if len(own.chosen_per_expert) > 1] or list(stats.layers)
    for layer, layer_stats in stats.layers.items():
        for name, value in layer_stats.figures(detailed).items():
            metrics[f"{prefix}/{layer}/{name}"] = torch.tensor(value)
            if layer in averaged:
                figures.setdefault(name, []).append(value)
    metrics |= {f"{prefix}/{name}": torch.tensor(sum(v) / len(v)) for name, v in figures.items()}
    return metrics
