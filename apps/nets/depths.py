"""Mixture-of-Depths (Raposo et al., arXiv 2404.02258): a block that only the chosen tokens of a sequence enter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.nets.blocks import resolve_blocks
from core.fields import Checked, PositiveShare
from core.kernels import cpu
from core.kernels.eager import capacity, outside_autocast, whole_ratio
from core.routing.gates import LinearGate

LOSS = "depth_predictor"
"""Name of the predictor's loss in the log. Its weight is 1: its gradient reaches the predictor alone."""


@core.register_config
@dataclass(frozen=True)
class MixtureOfDepths(Checked):
    """Blocks that the best tokens of a sequence enter, by a scalar gate r = x w; the others pass by.

    ``y_i = x_i + r_i (block(X')_i - x_i)`` for the chosen tokens X', which only attend to each other, and ``y_i = x_i``
    for the others. In training the chosen ones are the ``ceil(capacity * S)`` of the largest r, of a sequence's S
    non-padding tokens. A causal decoder cannot know which they are, so in evaluation a predictor decides for each token
    by itself, before later ones are read: a small MLP of the block's input that learns from the choice, without a
    gradient to anything else.

    Attributes:
        capacity: the share of a sequence's tokens that enter, above 0 and up to 1; 0.125 in the paper.
        predictor: whether there is a predictor: language models need it, and vision has no use for it.

    Raises:
        ValueError: ``capacity`` is out of its range.
    """

    capacity: PositiveShare = 0.125
    predictor: bool = False

    def build(self, dim: int) -> DepthGate:
        """Return the gate of one block."""
        return DepthGate(dim, DepthRouter(dim, self))

    def hidden_dim(self, dim: int) -> int:
        """Return the width of the predictor's hidden layer, D / 4."""
        return max(dim // 4, 1)

    def num_params(self, dim: int) -> int:
        """Return the parameters of one gate and its predictor."""
        hidden = self.hidden_dim(dim)
        return dim + (hidden * (dim + 2) + 1 if self.predictor else 0)

    def flops_per_token(self, dim: int) -> int:
        """Return the FLOPs of gate and predictor for each token; the block costs ``capacity`` times its own."""
        return 2 * dim + (2 * self.hidden_dim(dim) * (dim + 1) if self.predictor else 0)


class TokenRouter(core.Router):
    """The base of the routers that decide which tokens enter a block: the block is their one expert.

    Attributes:
        by_capacity: whether as many tokens enter in evaluation as in training.
    """

    num_experts = 1

    def __init__(self) -> None:
        super().__init__()
        self.by_capacity = False

    def routing(
        self, enters_BS: Tensor, gate_BS: Tensor, valid_BS: Tensor | None, extra: dict[str, Tensor] | None
    ) -> core.Routing:
        """Return the routing of the tokens that enter.

        Args:
            enters_BS: bool (B, S), which they are.
            gate_BS: (B, S), the weights of all.
            valid_BS: bool (B, S), True for non-padding tokens; None: all are.
            extra: losses of the router's own, (B * S,) each.
        """
        (B, S), enters_T, count_1 = enters_BS.shape, enters_BS.flatten(), enters_BS.sum()[None]
        return core.Routing(
            token_index_N=torch.arange(B * S, device=enters_BS.device),
            expert_ids_N=torch.where(enters_T, 0, 1),
            gates_N=gate_BS.flatten().masked_fill(~enters_T, 0.0),
            tokens_per_expert_E=count_1,
            chosen_per_expert_E=count_1,
            num_tokens=B * S,
            top_k=1,
            valid_T=None if valid_BS is None else valid_BS.flatten(),
            num_sequences=B,
            evidence=core.Evidence(extra=extra),
        )


class TokenGate(core.MoELayer):
    """The base of the gates before a block. On the tape a gate is a layer of one expert, whose load is the number of
    tokens that enter; the block itself is not a part of it."""

    def __init__(self, dim: int, router: TokenRouter) -> None:
        super().__init__(dim=dim)
        self.experts = nn.ModuleList()  # type: ignore[assignment]
        self.router = router

    def active_expert_params(self) -> int:
        return 0


class DepthRouter(TokenRouter):
    """Decides which tokens enter a block, with the gate r as their weight.

    Attributes:
        gate: the module of r.
        predictor: the module that predicts the choice from only a token; None: there is none.
    """

    def __init__(self, dim: int, config: MixtureOfDepths) -> None:
        super().__init__()
        self.config = config
        self.gate = LinearGate(dim, 1)
        hidden = config.hidden_dim(dim)
        self.predictor = (
            nn.Sequential(cpu.Linear(dim, hidden), nn.GELU(), cpu.Linear(hidden, 1)) if config.predictor else None
        )
        self.extra_weights = {LOSS: 1.0} if config.predictor else {}
        self.terms = frozenset(self.extra_weights)
        self._ratio = whole_ratio(config.capacity)

    @property
    def predicts(self) -> bool:
        """True if the predictor decides: how many tokens enter is then up to it."""
        return self.predictor is not None and not (self.training or self.by_capacity)

    def most(self, length: int) -> int:
        """Return how many of so many tokens enter by capacity."""
        return int(capacity(self._ratio, 1, length, 1))

    def forward(self, x: Tensor, context: core.RoutingContext | None = None) -> core.Routing:
        (B, S, _), valid_BS = x.shape, None if context is None else context.valid_BS
        with outside_autocast(x.device):
            x_BSD = x if x.dtype == torch.float64 else x.float()
            if valid_BS is not None:
                x_BSD = x_BSD.masked_fill(~valid_BS[:, :, None], 0.0)  # padding may hold NaN
            r_BS = self.gate(x_BSD.flatten(0, 1)).view(B, S)
            foretold_BS = None if self.predictor is None else self._foretell(x_BSD)
            if self.predicts:
                assert foretold_BS is not None
                enters_BS = foretold_BS > 0
            else:
                enters_BS = self._largest(r_BS, valid_BS)
            if valid_BS is not None:
                enters_BS = enters_BS & valid_BS
            extra = None
            if self.training and foretold_BS is not None:
                of_choice_BS = F.binary_cross_entropy_with_logits(foretold_BS, enters_BS.to(r_BS), reduction="none")
                extra = {LOSS: of_choice_BS.flatten()}
            return self.routing(enters_BS, r_BS, valid_BS, extra)

    def _largest(self, r_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
        """Return which tokens are among the largest of their sequence, bool (B, S); the earlier of equal ones."""
        B, S = r_BS.shape
        r_BS = r_BS.detach()
        if valid_BS is None:
            most_B1: Tensor | int = self.most(S)
        else:
            r_BS = r_BS.masked_fill(~valid_BS, -torch.inf)
            most_B1 = torch.as_tensor(capacity(self._ratio, 1, valid_BS.sum(1, keepdim=True), 1))
        order_BS = r_BS.argsort(dim=1, descending=True, stable=True)
        place_BS = torch.arange(S, device=r_BS.device).expand(B, S)
        return torch.zeros_like(order_BS).scatter(1, order_BS, place_BS) < most_B1

    def _foretell(self, x_BSD: Tensor) -> Tensor:
        """Return the predictor's logits, (B, S): above 0 where a token is to enter."""
        assert self.predictor is not None
        h = x_BSD.detach()
        for module in self.predictor:
            if isinstance(module, nn.Linear):
                bias = None if module.bias is None else module.bias.to(h.dtype)
                h = cpu.linear(h, module.weight.to(h.dtype), bias)
            else:
                h = module(h)
        return h.squeeze(-1)


@dataclass(frozen=True)
class Entered:
    """The tokens that enter a block.

    Attributes:
        enters_BS: bool (B, S), which they are.
        index_BC: int64 (B, C), their places in ascending order; after them places that fill up the row.
        real_BC: bool (B, C), False where a place fills up; None if every one enters.
        gate_BC: (B, C), r of each.
        context: routing context of the C tokens for the block's MoE layer.
    """

    enters_BS: Tensor
    index_BC: Tensor
    real_BC: Tensor | None
    gate_BC: Tensor
    context: core.RoutingContext


class DepthGate(TokenGate):
    """The gate of a block; it is inside the block, whose parameters keep their names. See ``MixtureOfDepths``."""

    router: DepthRouter

    def forward(self, x: Tensor, context: core.RoutingContext) -> Entered:
        """Choose among (B, S, D) tokens."""
        enters_BS, gate_BS = self.choose(x, context)
        S = x.shape[1]
        C, may_fill = self.router.most(S), context.valid_BS is not None
        if self.router.predicts:
            # Elsewhere, and in a compiled graph, nobody waits for the number: the rest of the rows fills up.
            is_known = x.device.type == "cpu" and not torch.compiler.is_compiling() and enters_BS.numel() > 0
            C, may_fill = int(enters_BS.sum(1).max()) if is_known else S, True
        place_S = torch.arange(S, device=x.device)
        index_BC = torch.where(enters_BS, place_S, place_S + S).argsort(dim=1)[:, :C]
        real_BC = enters_BS.gather(1, index_BC) if may_fill else None
        taken = {f.name: getattr(context, f.name) for f in fields(context)}
        of_tokens = {k: v.gather(1, index_BC) for k, v in taken.items() if v is not None and k.endswith("_BS")}
        own = replace(context, **{**of_tokens, "valid_BS": real_BC})
        return Entered(enters_BS, index_BC, real_BC, gate_BS.gather(1, index_BC), own)

    def choose(self, x: Tensor, context: core.RoutingContext) -> tuple[Tensor, Tensor]:
        """Return which of (B, S, D) tokens enter, bool (B, S), and r of each, (B, S)."""
        self._check_width(x)
        routing = self.router(x, context)
        self.record_pass(routing, context)
        return (routing.expert_ids_N == 0).view(x.shape[:2]), routing.gates_N.view(x.shape[:2])

    def enter(self, x: Tensor, context: core.RoutingContext, block: Callable[[Tensor, Entered], Tensor]) -> Tensor:
        """Return (B, S, D) tokens after the block that some of them enter.

        Args:
            x: (B, S, D).
            context: of these tokens.
            block: maps the (B, C, D) tokens that enter to (B, C, D), the residual included.
        """
        entered = self(x, context)
        index_BCD = entered.index_BC[:, :, None].expand(-1, -1, x.shape[-1])
        if index_BCD.shape[1] == 0:
            return x
        x_BCD = x.gather(1, index_BCD)
        if entered.real_BC is not None:
            x_BCD = x_BCD.masked_fill(~entered.real_BC[:, :, None], 0.0)  # padding may hold NaN
        added_BCD = (block(x_BCD, entered) - x_BCD) * entered.gate_BC[:, :, None]
        if entered.real_BC is not None:
            added_BCD = added_BCD.masked_fill(~entered.real_BC[:, :, None], 0.0)
        return x.scatter_add(1, index_BCD, added_BCD.to(x.dtype))


def depth_gates(
    depths: MixtureOfDepths | None, blocks: str | Sequence[int], depth: int, dim: int
) -> list[DepthGate | None]:
    """Return the gate of each of ``depth`` blocks; None for blocks that all tokens enter.

    Args:
        depths: the gates' config; None: no block has one.
        blocks: which blocks have one; see ``apps.nets.blocks.resolve_blocks``.
        depth: number of blocks.
        dim: D.
    """
    chosen = () if depths is None else resolve_blocks(blocks, depth, option="depth_blocks")
    return [depths.build(dim) if depths is not None and i in chosen else None for i in range(depth)]


@contextlib.contextmanager
def by_capacity(model: nn.Module) -> Iterator[None]:
    """Inside, as many tokens enter a block in evaluation as in training, whatever a router foretells: to count the
    FLOPs."""
    routers = [m for m in model.modules() if isinstance(m, TokenRouter)]
    before = [router.by_capacity for router in routers]
    for router in routers:
        router.by_capacity = True
    try:
        yield
    finally:
        for router, own in zip(routers, before, strict=True):
            router.by_capacity = own
