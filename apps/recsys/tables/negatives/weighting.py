"""Weightings that add the tasks' losses up to one: fixed weights, uncertainty, GradNorm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core.fields import Checked, NotNegative


@core.register_config
@dataclass(frozen=True)
class WeightingConfig(Checked):
    """Weights of the tasks' losses, in training.

    - "fixed": ``sum of w_t L_t``, with ``weights``.
    - "uncertainty": ``sum of exp(-s_t) L_t + s_t / 2`` with learned ``s_t = log sigma_t^2``, the form for
      classification (UWL, arXiv 1705.07115).
    - "gradnorm": learned weights of sum t that bring the gradients of the weighted losses on the last shared layer to
      one norm times ``r_t^alpha``, where ``r_t`` is a task's relative training rate (arXiv 1711.02257). The initial
      losses are the losses of the constant prediction, so that a resumed run has the same.

    In evaluation the loss is the fixed weights' sum, for models to be comparable.

    Attributes:
        kind: "fixed", "uncertainty" or "gradnorm".
        weights: weights of single tasks, by name; a task that is not named has 1. "uncertainty" and "gradnorm" start
            from them.
        alpha: GradNorm's strength: the larger, the more it helps slow tasks; 0: equal norms.

    Raises:
        ValueError: an unknown kind, a negative weight or alpha, or a weight of 0 that a learned weighting starts from.
    """

    prefix = "weighting."

    kind: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
    weights: Mapping[str, NotNegative] = field(default_factory=dict)
    alpha: NotNegative = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for task, weight in self.weights.items():
            if weight == 0 and self.kind != "fixed":
                raise ValueError(f"weighting.weights[{task!r}]={weight} is not above 0")

    def build(self, tasks: Sequence[str], initial_losses: Sequence[float] = ()) -> Weighting:
        """Return the weighting of ``tasks``; ``initial_losses`` are the losses of the best constant predictions, which
        GradNorm needs. Empty: the losses for labels that are positive in half of the rows.

        Raises:
            ValueError: a weight of a task that is missing, or no task with a weight above 0.
        """
        unknown = [name for name in self.weights if name not in tasks]
        if unknown:
            raise ValueError(f"weighting.weights names {unknown[0]!r}, which is no task; there is {', '.join(tasks)}")
        weights = [float(self.weights.get(name, 1.0)) for name in tasks]
        if not any(weights):
            raise ValueError("weighting.weights leaves no task with a weight above 0")
        if self.kind == "gradnorm":
            return GradNorm(weights, initial_losses, self.alpha)
        return Uncertainty(weights) if self.kind == "uncertainty" else Weighting(weights)


class Weighting(nn.Module):
    """Fixed weights, one for each task."""

    _given_t: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("_given_t", torch.tensor(weights), persistent=False)

    def forward(
        self, loss_t: Tensor, labeled_t: Tensor | None = None, shared: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss () of the tasks' losses (t,), and the weights to log, (t,) each, by name.

        Args:
            loss_t: losses of a batch.
            labeled_t: bool (t,), the tasks that have a label in the batch; the others' losses are 0, and no weight
                learns from them. None: all.
            shared: weight of the last layer, on which the losses depend, and how many of its entries, the first ones,
                all tasks share. GradNorm reads it in training.
        """
        return loss_t @ self._given_t, {}


class Uncertainty(Weighting):
    """Learned ``log_variance`` (t,); it starts where ``exp(-s)`` is the given weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(weights)
        self.log_variance = nn.Parameter(-torch.tensor(weights).log())

    def forward(
        self, loss_t: Tensor, labeled_t: Tensor | None = None, shared: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not self.training:
            return super().forward(loss_t)
        weight_t = (-self.log_variance).exp()
        half_t = self.log_variance / 2
        if labeled_t is not None:
            half_t = half_t * labeled_t
        return (weight_t * loss_t + half_t).sum(), {"weight": weight_t.detach()}


class GradNorm(Weighting):
    """Learned ``logits`` (t,): the weights are ``t * softmax(logits)``, so they stay positive and of sum t.

    With ``g_t`` the norm of the unweighted loss's gradient on the shared weight W, the weighted loss's is ``w_t g_t``,
    so the paper's ``sum of |w_t g_t - mean(w g) r_t^alpha|``, with the target held constant, needs no second
    derivative. It updates only the weights, and the weighted sum of the losses updates everything else.

    Args:
        weights: weight of each task to start from.
        initial_losses: losses of the best constant predictions; empty if unknown.
        alpha: see ``WeightingConfig``.
    """

    _initial_t: Tensor

    def __init__(self, weights: Sequence[float], initial_losses: Sequence[float], alpha: float) -> None:
        super().__init__(weights)
        self.alpha = alpha
        self.logits = nn.Parameter(torch.tensor(weights).log())
        initial_t = torch.tensor(initial_losses or [math.log(2)] * len(weights))
        self.register_buffer("_initial_t", initial_t, persistent=False)

    def forward(
        self, loss_t: Tensor, labeled_t: Tensor | None = None, shared: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(loss_t)
        assert shared is not None
        weight, num_shared = shared
        if labeled_t is None:
            labeled_t = torch.ones_like(loss_t, dtype=torch.bool)
        gradients = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in loss_t)
        norm_t = torch.stack([gradient[:num_shared].norm() for gradient in gradients])
        weight_t = len(loss_t) * F.softmax(self.logits, dim=0)
        with torch.no_grad():
            ratio_t = loss_t / self._initial_t
            # The means are over the tasks that have labels; if no task has any, all is 0.
            labels = labeled_t.sum().clamp_min(1)
            rate_t = ratio_t / (ratio_t.sum() / labels).clamp_min(torch.finfo(ratio_t.dtype).tiny)
            target_t = (weight_t * norm_t).sum() / labels * rate_t**self.alpha
        balance = ((weight_t * norm_t - target_t).abs() * labeled_t).sum()
        # The balance adds a gradient and no value, so that the weighted loss is logged.
        loss = (weight_t.detach() * loss_t).sum() + balance - balance.detach()
        return loss, {"weight": weight_t.detach(), "gradient_norm": norm_t}
