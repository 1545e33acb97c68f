"""``StepBalance`` does what MoE layers ask of a training and of an evaluation, whatever the task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import core

Stage = Literal["train", "val", "test"]


@dataclass
class StepBalance:
    """The balance losses, selection biases and figures of a LightningModule's MoE layers, over its steps.

    A module holds one as ``balance`` and records a tape around its task's loss in each step (``core.record``). It hands
    the tape to ``keep`` in a training step and to ``count`` in an evaluation.

    Attributes:
        weight: of the layers' balance losses relative to the task's loss.
        detailed: whether the log has the detailed figures of each layer.
        on_routing: called with the prefix of the logged names and the statistics of all ranks, on every rank: after a
            training step that is logged, and after each pass of validation or test.
    """

    weight: float = 1.0
    detailed: bool = False
    on_routing: Callable[[str, core.RoutingStats], None] | None = None
    _loads: core.Tape | None = None
    _stats: core.RoutingStats | None = None

    def total(self, loss: Tensor, aux: core.AuxLosses, tape: core.Tape) -> Tensor:
        """Return the loss that a step minimizes, (): the task's plus the weighted balance losses."""
        return loss + self.weight * aux.total if len(tape) else loss

    def keep(self, tape: core.Tape) -> None:
        """Keep the experts' loads of a training step until the optimizer's step updates the selection biases."""
        # Only loads are kept: logits and scores of every micro-batch would stay until the optimizer's step.
        self._loads = tape.loads() if self._loads is None else self._loads.merge(tape.loads())

    def update_biases(self, module: LightningModule) -> None:
        """Update the selection biases by the loads that were kept; call it after each step of the optimizer."""
        tape, self._loads = self._loads, None
        if tape is not None:  # an empty one counts too: other ranks may have passes, and wait
            core.update_expert_bias(module, tape)

    def values(self, module: LightningModule, tape: core.Tape, aux: core.AuxLosses) -> dict[str, Tensor]:
        """Return the logged values of a training step's MoE layers, by name; empty for a model without any."""
        values = {f"train/{name}": value.detach() for name, value in aux.terms.items()}
        if core.moe_layers(module):  # a rank with an empty tape takes part in the sums too
            values["train/aux_loss"] = aux.total.detach()
            values |= self._figures(core.RoutingStats.from_tape(tape).all_reduce(), "routing")
        return values

    def start_pass(self) -> None:
        """Forget what an interrupted pass left behind."""
        self._stats = None

    def count(self, tape: core.Tape) -> None:
        """Add the routing of an evaluation step to the figures of its pass."""
        if len(tape):
            stats = core.RoutingStats.from_tape(tape)
            self._stats = stats if self._stats is None else self._stats + stats

    def so_far(self) -> dict[str, Tensor]:
        """Return the figures of an evaluation that runs, over this process's batches until now; empty before them."""
        return {} if self._stats is None else routing_metrics(self._stats)

    def end_pass(self, module: LightningModule, stage: Stage) -> None:
        """Log the figures of the whole pass: the imbalance of the sum over batches and ranks, not a mean."""
        stats, self._stats = self._stats, None
        if stats is None and not core.moe_layers(module):
            return
        # A rank without a batch takes part in the sums.
        stats = (stats or core.RoutingStats({})).all_reduce()
        if stats.layers:
            module.log_dict(self._figures(stats, f"{stage}/routing"), sync_dist=True)

    def _figures(self, stats: core.RoutingStats, prefix: str) -> dict[str, Tensor]:
        if self.on_routing is not None:
            self.on_routing(prefix, stats)
        return routing_metrics(stats, prefix, self.detailed)


def balance_of(module: Any) -> StepBalance | None:
    """Return the ``StepBalance`` that a module holds; None: its MoE layers, if it has any, are balanced elsewhere."""
    balance = getattr(module, "balance", None)
    return balance if isinstance(balance, StepBalance) else None


def logs_this_step(module: LightningModule) -> bool:
    """Return whether the trainer logs the training step that runs."""
    return (module.global_step + 1) % module.trainer.log_every_n_steps == 0


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
