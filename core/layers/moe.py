"""``MoELayer``, the layers of one router, and functions for all layers of a model: their counts and their capacity."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import MergeRouting, Routing, RoutingContext, Rows, SlotRouting
from ..dispatch import Dispatcher, SlotDispatcher
from ..experts import Experts, check_merges
from ..kernels import expert_of_rows, outside_autocast
from ..routing.balance.balance import Balance
from ..routing.balance.losses import contrast_losses
from ..routing.router import Router
from ..routing.soft.soft import in_segments
from .base import MoELayer, check_valid, moe_layers
from .shared import SharedGate


class MoE(MoELayer):
    """Sparse mixture of experts: ``y_t = sum over its experts of gate * f_e(x_t)``, plus the shared experts.

    The path of a token: the router decides (float32), the dispatcher indexes, the experts compute, the dispatcher sums.
    A token no expert computes comes out zero (plus the shared experts): the block's residual carries it. With a
    ``shared_gate`` the two are weighted against each other.

    Args:
        router, experts: the parts, for the same E.
        balance, dispatcher, dim: as in ``MoELayer``.
        shared_experts: experts that every token takes.
        shared_gate: gate between them and the routed output; None: their sum.
        expert_output_masking: probability in training that a pair's output is left out; the others are scaled by 1 / (1
            - it).
        bias_dim: width of a bias that is added to every token's output; None: there is none.
        pairs_per_token: experts per token, for ``active_params``; None: as the router's config says.

    Raises:
        ValueError: a part is not a router or not experts; the router chooses among another number of experts than there
            are, other ranks' included; or ``balance.contrast`` with experts that gather statistics, since it computes
            some rows twice.
    """

    own_terms = frozenset({"contrast"})
    splits_experts = True
    is_adopted: ClassVar[bool] = False
    """Whether the layer is a block of another library's model, which keeps its own router and shapes."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        balance: Balance = Balance(),
        dispatcher: Dispatcher | None = None,
        shared_experts: Experts | None = None,
        *,
        shared_gate: SharedGate | None = None,
        expert_output_masking: float = 0.0,
        bias_dim: int | None = None,
        pairs_per_token: float | None = None,
        dim: int | None = None,
    ) -> None:
        if not isinstance(router, Router) or not isinstance(experts, Experts):
            raise ValueError(
                f"MoE({router!r}, {experts!r}) is made of a router and experts: a layer of 8 experts for tokens of "
                "width 64 is core.MoEConfig(num_experts=8, router=core.TokenChoice(top_k=2)).build(64)"
            )
        super().__init__(balance, dim, dispatcher)
        self.router, self.experts = router, experts
        self.shared_experts, self.shared_gate = shared_experts, shared_gate
        self.expert_output_masking = expert_output_masking
        self.num_experts = experts.num_experts
        config: Any = getattr(router, "config", None)  # a router of the user's own may have none
        if pairs_per_token is None:
            if config is None:
                raise ValueError(f"pairs_per_token=None: {type(router).__name__} has no config that says it")
            pairs_per_token = config.pairs_per_token(self.num_experts)
        self.pairs_per_token = pairs_per_token
        chosen_among = getattr(router, "num_experts", self.num_experts)
        if chosen_among != self.num_experts:
            raise ValueError(f"the router chooses among {chosen_among} experts, and there are {self.num_experts}")
        if balance.contrast and any(True for _ in experts.buffers()):
            name = type(experts).__name__
            raise ValueError(f"balance.contrast={balance.contrast} computes rows twice, and {name} gathers statistics")
        self.output_bias = None if bias_dim is None else nn.Parameter(torch.zeros(bias_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (..., S, D), at least two dimensions; (S, D) is one sequence.
            context: information for the gate in addition to ``x``; its (B, S) fields have ``x``'s leading shape
                flattened to B.

        Returns:
            (..., S, D_out).

        Raises:
            ValueError: ``x`` has one dimension or another width than ``dim``, or ``valid_BS`` has another shape or is
                not bool.
        """
        x_BSD = self._sequences(x, context)
        valid_BS = None if context is None else context.valid_BS
        routing = self.router(x_BSD, context)
        if self.shared_experts is not None and valid_BS is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x = x.masked_fill(~valid_BS.reshape(*x.shape[:-1], 1), 0.0)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        gate_T = None if gate is None else gate.flatten()
        if self.training and self.balance.contrast:
            routing = self._contrasted(x_BSD, routing, context)
        self.record_pass(routing, context, shared_gate=self.shared_gate, shared_gate_T=gate_T)
        rows = shared = None
        if self.shared_experts is not None:
            rows = self._dispatched(x_BSD, routing, context) if self.dispatcher.travels else None
            shared = self._shared(x, valid_BS)
        y_BSD = self._compute(x_BSD, routing, context) if rows is None else self._computed(rows, x_BSD)
        y = y_BSD.reshape(*x.shape[:-1], y_BSD.shape[-1])
        if shared is not None:
            y = y + shared if self.shared_gate is None or gate is None else self.shared_gate.combine(gate, y, shared)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    def _shared(self, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """Return the sum of the shared experts for every token, (..., D_out)."""
        experts: Any = self.shared_experts
        if valid_BS is None or not self.training or experts.is_quantized or not any(True for _ in experts.buffers()):
            y: Tensor = experts(x, "dense")
            return y
        # Statistics are those of real tokens.
        y_TnD: Tensor = experts(x.flatten(0, -2), "each", None, valid_BS.flatten())
        return y_TnD.sum(1).unflatten(0, x.shape[:-1])

    def _sequences(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        """Return the tokens as (B, S, D), checked with the padding's shape."""
        if x.ndim < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: an MoE layer needs at least (tokens, dim)")
        self._check_width(x)
        x_BSD = x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
        if context is not None and context.valid_BS is not None:
            check_valid(context.valid_BS, (x_BSD.shape[:2],), "tokens")
        return x_BSD

    def _compute(self, x_BSD: Tensor, routing: Any, context: RoutingContext | None) -> Tensor:
        """Return (B, S, D) tokens after the routed experts, (B, S, D_out)."""
        return self._computed(self._dispatched(x_BSD, routing, context), x_BSD)

    def _computed(self, rows: Rows, x_BSD: Tensor) -> Tensor:
        """Return the sums of the experts' rows by token, (B, S, D_out)."""
        if self.training and self.expert_output_masking:
            # On the rows and not in the routing: losses, loads and capacity follow the choice.
            rows = replace(rows, gates_R=F.dropout(rows.gates_R, self.expert_output_masking))
        return self.dispatcher.combine(self.experts(rows)).unflatten(0, x_BSD.shape[:2])

    def _dispatched(self, x_BSD: Tensor, routing: Routing, context: RoutingContext | None) -> Rows:
        """Return the experts' rows of (B, S, D) tokens."""
        rows = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        if self.experts.reads_context:
            rows = replace(rows, context=RoutingContext() if context is None else context)
        return rows.weighted_input() if self.router.gates_on == "input" else rows

    def _contrasted(self, x_BSD: Tensor, routing: Routing, context: RoutingContext | None) -> Routing:
        """Return the routing with the sums of the term ``contrast`` in its evidence, computed on a sample of rows.

        The sample is computed by itself, since kernels that sum the experts' outputs at once hand no row out.
        """
        sample, kept_S = self._dispatched(x_BSD, routing, context).sampled(self.balance.contrast_rows)
        expert_S = expert_of_rows(sample.gates_R, sample.offsets_E)
        y_SD = self.experts(sample).x
        with outside_autocast(x_BSD.device):
            loss_S, has_loss_S = contrast_losses(y_SD, expert_S, kept_S, self.balance.contrast_temperature)
        sums = {"contrast": loss_S.sum().reshape(1), "num_contrasts": has_loss_S.sum().to(loss_S.dtype).reshape(1)}
        evidence = replace(routing.evidence, sums={**(routing.evidence.sums or {}), **sums})
        return replace(routing, evidence=evidence)

    def shrunk(self, num_experts: int, rows: Callable[[Tensor], Tensor]) -> Callable[[], None] | None:
        """Return what gives the layer other experts, whose stacked tensors ``rows`` makes of those before; None: a
        conversion builds its parts again."""
        return None

    def active_expert_params(self) -> int:
        return round(self.all_expert_params() * min(self.pairs_per_token / self.num_experts, 1.0))


class SoftMoE(MoE):
    """Soft mixture of experts (arXiv 2308.00951): the experts compute slots, weighted means of a sequence's tokens, and
    a token is a weighted mean of what came out. Built by ``MoEConfig`` from ``SoftSlots``; every kind of experts works.
    """

    default_dispatcher = SlotDispatcher
    own_terms = frozenset()
    splits_experts = False

    def _compute(self, x_BSD: Tensor, routing: SlotRouting, context: RoutingContext | None) -> Tensor:
        return self.dispatcher.combine(self.experts(self.dispatcher.dispatch(x_BSD, routing)))


class MergedMoE(MoE):
    """One merged expert for each sequence, or segment of one: ``y = f(x; sum_e p_e W_e)``. Built from ``Merge``.

    Nothing is dispatched, and the experts' backend is not asked.
    """

    own_terms = frozenset()
    splits_experts = False

    def _compute(self, x_BSD: Tensor, routing: MergeRouting, context: RoutingContext | None) -> Tensor:
        B, S, D = x_BSD.shape
        J, L = routing.groups_per_sequence, routing.tokens_per_group
        real_BS1 = None if routing.valid_T is None else routing.valid_T.unflatten(0, (B, S)).unsqueeze(-1)
        if real_BS1 is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x_BSD = x_BSD.masked_fill(~real_BS1, 0.0)
        if routing.in_segments:
            x_GLD = in_segments(x_BSD, J, L).reshape(B * J, L, D)
            y_GLD = self.experts(x_GLD, "merged", routing.weights_GE)
            # Without what fills up the last segment: token s of sequence b is row b * J * L + s.
            row_BS = torch.arange(B, device=x_BSD.device)[:, None] * (J * L) + torch.arange(S, device=x_BSD.device)
            y_TD = y_GLD.reshape(B * J * L, y_GLD.shape[-1]).index_select(0, row_BS.reshape(B * S))
            y_BSD = y_TD.unflatten(0, (B, S))
        else:
            y_BSD = self.experts(x_BSD, "merged", routing.weights_GE)
        return y_BSD if real_BS1 is None else y_BSD.masked_fill(~real_BS1, 0.0)


class AveragedMoE(MoE):
    """Experts by pairs in training, and in evaluation one whose parameters are the mean of theirs (AdaMix, arXiv
    2205.12410). Built from ``Random(evaluation="merged")``.

    The mean is taken once per call; ``core.average_experts`` takes it for good.

    Raises:
        ValueError: the experts cannot be merged.
    """

    splits_experts = False

    def __init__(self, router: Router, experts: Experts, *args: Any, **options: Any) -> None:
        check_merges(experts)
        super().__init__(router, experts, *args, **options)

    def _compute(self, x_BSD: Tensor, routing: Any, context: RoutingContext | None) -> Tensor:
        if isinstance(routing, Routing):
            return super()._compute(x_BSD, routing, context)
        valid_T = routing.valid_T
        x_1TD = x_BSD.flatten(0, 1).unsqueeze(0)
        if valid_T is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x_1TD = x_1TD.masked_fill(~valid_T[:, None], 0.0)
        E = self.num_experts
        y_1TD: Tensor = self.experts(x_1TD, "merged", x_1TD.new_full((1, E), 1.0 / E, dtype=torch.float32))
        if valid_T is not None:
            y_1TD = y_1TD.masked_fill(~valid_T[:, None], 0.0)
        return y_1TD.unflatten(1, x_BSD.shape[:2])[0]


@contextlib.contextmanager
def set_capacity_factor(model: nn.Module, factor: float | None, priority: str | None = None) -> Iterator[None]:
    """Change the evaluation capacity of every layer inside the ``with`` block; None is dropless.

    Routers without such a capacity (expert choice has its own, soft slots and merged experts have none) do not change.

    Args:
        model: any module with MoE layers.
        factor: as ``MoEConfig.eval_capacity_factor``, but None means no limit. Training keeps its own.
        priority: as ``MoEConfig.priority``; None keeps each layer's own.
    """
    before = [(r, r.capacity) for m in moe_layers(model).values() for r in m.routers().values()]
    for router, old in before:
        evaluation = math.inf if factor is None else factor
        router.capacity = replace(old, eval_factor=evaluation, priority=priority or old.priority)
    try:
        yield
    finally:
        for router, old in before:
            router.capacity = old
