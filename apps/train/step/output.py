"""Results of a task's loss on a batch, and of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

import core
from apps.train.step.distilling import Distribution


@dataclass(frozen=True)
class TaskOutput:
    """The result of an app's ``task_loss``.

    Attributes:
        loss: mean loss over the examples, (), without any auxiliary loss.
        outputs: first argument of the metrics' ``update``, such as logits (B, C).
        targets: second argument of the metrics' ``update``.
        num_examples: number of examples B.
        terms: parts of the loss to log, each (); empty where the loss is one term.
        groups: user of each example, int64 (B,): third argument of the metrics' ``update``; None for no such metrics.
        weight: weight of this batch in an epoch's mean, such as its tokens; None for ``num_examples``.
        distribution: in training, the model's prediction, which a teacher's prediction is compared with.
        cold: what of each example has no row in training, int (B,): fourth argument of the metrics' ``update``.
    """

    loss: Tensor
    outputs: Any
    targets: Any
    num_examples: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None
    weight: int | None = None
    distribution: Distribution | None = None
    cold: Tensor | None = None


class TrainingLoss(NamedTuple):
    """The loss of a training step and its parts.

    Attributes:
        total: loss that the step minimizes, ().
        out: result of the task.
        aux: balance losses of the MoE layers.
        tape: record of the layers' passes.
    """

    total: Tensor
    out: TaskOutput
    aux: core.AuxLosses
    tape: core.Tape
