"""The kind of a task by name, and the outputs of several tasks side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.recsys.encoding.features import Target
from apps.recsys.kinds.binary import Kind
from apps.recsys.kinds.classes import Multiclass, Ordinal
from apps.recsys.kinds.numbers import Count, Quantile, Regression, Revenue, Tweedie, WeightedLogistic

KINDS: dict[str, type[Kind]] = {
    "binary": Kind,
    "regression": Regression,
    "count": Count,
    "poisson": Count,
    "tweedie": Tweedie,
    "revenue": Revenue,
    "quantile": Quantile,
    "ordinal": Ordinal,
    "multiclass": Multiclass,
}
"""Kinds by the name of ``TaskConfig.kind``."""


def kind_of(target: Target) -> Kind:
    """Return the kind of a task."""
    if target.kind == "regression" and target.loss == "weighted_logistic":
        return WeightedLogistic(target)
    return KINDS[target.kind](target)


class Outputs:
    """Where the outputs of each task are side by side.

    Args:
        targets: the target of each task.

    Attributes:
        kinds: the kind of each task.
        width: number Z of all outputs.
        all_binary: whether the outputs are one logit a task.
        main_metric: the metric that all tasks share, "auc" or "r2"; None if they differ.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.kinds = [kind_of(target) for target in targets]
        self.width = sum(kind.width for kind in self.kinds)
        self.all_binary = all(target.kind == "binary" for target in targets)
        names = {kind.main_metric for kind in self.kinds}
        self.main_metric = names.pop() if len(names) == 1 else None

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return each task's outputs (..., width) of all (..., Z)."""
        return z.split([kind.width for kind in self.kinds], dim=-1)

    def shifted(self, z: Tensor, offset_Bt: Tensor) -> Tensor:
        """Return outputs (..., B, Z) with a number added to all outputs of each example and task."""
        widths = torch.tensor([kind.width for kind in self.kinds], device=offset_Bt.device)
        return z + offset_Bt.repeat_interleave(widths, dim=-1, output_size=self.width)

    def losses(self, z: Tensor, label_Bt: Tensor) -> Tensor:
        """Return the loss of each example and task, (..., B, t); any number where a label is NaN."""
        if self.all_binary:
            target = label_Bt.nan_to_num(0.0).expand_as(z)
            return F.binary_cross_entropy_with_logits(z, target, reduction="none")
        parts = zip(self.kinds, self.split(z), label_Bt.nan_to_num(0.0).unbind(-1), strict=True)
        return torch.stack([kind.loss(own, y_B) for kind, own, y_B in parts], dim=-1)

    def divergences(self, z: Tensor, teacher_BZ: Tensor, temperature: float) -> Tensor:
        """Return how far each task's prediction is from a teacher's, (..., B, t)."""
        parts = zip(self.kinds, self.split(z), self.split(teacher_BZ), strict=True)
        return torch.stack([kind.divergence(own, given, temperature) for kind, own, given in parts], dim=-1)

    def mean(self, z_MBZ: Tensor) -> Tensor:
        """Return the outputs (B, Z) that represent the mean of the members' predictions."""
        return torch.cat([kind.mean(own) for kind, own in zip(self.kinds, self.split(z_MBZ), strict=True)], dim=-1)

    def columns(self, names: Sequence[str], z_BZ: Tensor) -> dict[str, Tensor | list[str]]:
        """Return the predictions of all tasks by column, B values each."""
        parts = zip(names, self.kinds, self.split(z_BZ), strict=True)
        return {column: values for name, kind, own in parts for column, values in kind.columns(name, own).items()}
