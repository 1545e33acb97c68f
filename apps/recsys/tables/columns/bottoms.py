"""Bottoms to compare multi-gate layers with, under their interface: one that all tasks share, and one for each task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import core
from core.fields import Count


@dataclass(frozen=True)
class SharedBottom(core.MultiGateConfig):
    """One network that all tasks' towers read (Caruana, 1997): a multi-gate layer of one expert, without gates.

    Attributes:
        num_experts: 1.
        expert: the network.

    Raises:
        ValueError: more than one expert, or an option of gates.
    """

    num_experts: Count = 1
    expert: core.ExpertConfig = core.MLP((128,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts != 1:
            raise ValueError(
                f"num_experts={self.num_experts}: {type(self).__name__} has one network, as wide as its expert; over "
                "another layer's configuration set --model.shared.init_args.num_experts 1"
            )
        self.check_no_gates("num_experts", "expert", "backend")

    def _networks(self, num_tasks: int) -> int:
        return 1

    def build(self, dim: int, num_tasks: int, num_domains: int = 0) -> BottomLayer:  # type: ignore[override]
        """Return the layer for examples (B, ``dim``). It asks for no domain."""
        experts = self.expert.build(self._networks(num_tasks), dim)
        experts.backend = self.backend
        return BottomLayer(experts, self._networks(num_tasks), num_tasks)

    def num_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        return self._networks(num_tasks) * self.expert.num_params(dim)

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        return self.num_params(dim, num_tasks)

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        return self._networks(num_tasks) * self.expert.flops_per_row(dim)


@dataclass(frozen=True)
class SingleTask(SharedBottom):
    """A model of its own for each task: nothing is shared, the embeddings of the columns neither."""

    def _networks(self, num_tasks: int) -> int:
        return num_tasks


class BottomLayer(nn.Module):
    """Layer of ``SharedBottom`` and ``SingleTask``.

    Args:
        experts: the networks.
        num_networks: 1, or the number of tasks.
        num_tasks: t.
    """

    def __init__(self, experts: core.Experts, num_networks: int, num_tasks: int) -> None:
        super().__init__()
        self.experts, self.num_networks, self.num_tasks = experts, num_networks, num_tasks

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Map (B, D), or (t, B, D) where each task has an input of its own, to (t, B, D_out)."""
        counts = (self.num_networks,) if x.ndim == 2 else (1,) * self.num_networks
        return self.experts(x, "each", counts).transpose(0, 1).expand(self.num_tasks, -1, -1)
