"""The Sparse Universal Transformer (Tan et al., arXiv 2310.07096): one layer, used again until a token halts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

import core
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Step, has_numbers
from apps.nets.depths import TokenGate, TokenRouter
from apps.nets.layers import Pass, Stack
from core.fields import Bounds, Checked, NotNegative
from core.kernels import cpu
from core.kernels.eager import outside_autocast

LOSS = "depth"
"""Name in the log of the stick that is left after each step; its sum over the steps is the expected depth minus 1."""


@core.register_config
@dataclass(frozen=True)
class Universal(Checked):
    """One layer for all steps of depth, and a stick that each token breaks until it halts.

    After step l a token halts with probability ``alpha_l = sigmoid(MLP(h_l))`` of the rest of its stick:
    ``p_l = alpha_l prod_{i<l} (1 - alpha_i)``. After the last step L the rest goes to h_L, and the token comes out as
    ``s_L``, the expectation of its states, with ``s_l = sum_{i<l} p_i h_i + (1 - sum_{i<l} p_i) h_l``. The tokens of
    step l + 1 make queries of h_l, and keys and values of s_l.

    Attributes:
        threshold: in evaluation a token stops once it has halted with this probability: the rest of its stick goes to
            the state that it has then. In (0, 1); 0.999 in the paper's code.
        depth_penalty: weight of the expected depth in the loss (the paper's ACT loss), not negative. 0: a token may use
            all steps for nothing.

    Raises:
        ValueError: a value is out of its range.
    """

    prefix = "universal."

    threshold: Annotated[float, Bounds(0, 1, "()")] = 0.999
    depth_penalty: NotNegative = 0.0

    def check(self, config: TransformerConfig, has_depths: bool, num_moes: int, share_experts: bool) -> None:
        """Raise a ``ValueError`` if a language model cannot have one layer for all steps."""
        if config.shape.decoder_layers < 2:
            raise ValueError("decoder_layers=1 is one step: universal uses a layer again, for at least 2")
        if has_depths:
            raise ValueError("universal and depths do not go together: one says by itself how deep a token goes")
        if num_moes > 1:
            raise ValueError(f"universal has one layer for all steps: moe lists {num_moes}")
        if share_experts:
            raise ValueError("share_experts=True has no meaning with universal, whose one layer has the experts")

    def build(self, dim: int) -> HaltingGate:
        """Return the gate that breaks the sticks."""
        return HaltingGate(dim, HaltingRouter(dim, self))

    def num_params(self, dim: int) -> int:
        """Return the parameters of the gate."""
        return dim * (dim + 1) + dim

    def flops_per_token(self, dim: int) -> int:
        """Return the FLOPs of the gate for each token and each step but the last."""
        return 2 * dim * (dim + 1)


@dataclass(frozen=True)
class Sticks:
    """How far the tokens have come, after some step.

    Attributes:
        left_BL: float32 (B, L), the rest of each token's stick; float64 if the model is.
        halted_BLD: (B, L, D), the sum of the states before this one, each times the part of the stick it got.
        runs_BL: bool (B, L), the non-padding tokens that continue.
    """

    left_BL: Tensor
    halted_BLD: Tensor
    runs_BL: Tensor


class HaltingRouter(TokenRouter):
    """Decides which tokens continue to the next step.

    Attributes:
        hidden: the hidden layer of the MLP.
        weight: (1, D), its output. It starts at zero: a token halts with probability 1/2 after each step.
    """

    def __init__(self, dim: int, config: Universal) -> None:
        super().__init__()
        self.config = config
        self.hidden = cpu.Linear(dim, dim)
        self.weight = nn.Parameter(torch.empty(1, dim))
        self.extra_weights = {LOSS: config.depth_penalty} if config.depth_penalty else {}
        self.terms = frozenset(self.extra_weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def alpha(self, h_BLD: Tensor) -> Tensor:
        """Return the probability with which each token halts, float32 (B, L); float64 for float64."""
        with outside_autocast(h_BLD.device):
            h_BLD = h_BLD if h_BLD.dtype == torch.float64 else h_BLD.float()
            weight, bias = self.hidden.weight.to(h_BLD.dtype), self.hidden.bias.to(h_BLD.dtype)
            hidden_BLD = nn.functional.gelu(cpu.linear(h_BLD, weight, bias))
            return cpu.linear(hidden_BLD, self.weight.to(h_BLD.dtype)).squeeze(-1).sigmoid()

    def goes_on(self, left_BL: Tensor) -> Tensor | bool:
        """Return which tokens have enough left of their stick to continue."""
        if self.training or self.by_capacity:
            return True
        return left_BL >= 1.0 - self.config.threshold


class HaltingGate(TokenGate):
    """The gate after each step but the last; see ``Universal``. Its load is the number of tokens that continue."""

    router: HaltingRouter

    def start(self, h_BLD: Tensor, context: core.RoutingContext) -> Sticks:
        """Return whole sticks, before the first step."""
        whole_BL = h_BLD.new_ones(h_BLD.shape[:2], dtype=torch.promote_types(h_BLD.dtype, torch.float32))
        real_BL = torch.ones_like(whole_BL, dtype=torch.bool) if context.valid_BS is None else context.valid_BS
        return Sticks(whole_BL, torch.zeros_like(h_BLD), real_BL)

    def forward(self, h_BLD: Tensor, before: Sticks, context: core.RoutingContext) -> Sticks:
        """Break the sticks of the (B, L, D) tokens after a step, and return the rest."""
        self._check_width(h_BLD)
        halts_BL = before.left_BL * self.router.alpha(h_BLD)
        left_BL = before.left_BL - halts_BL
        runs_BL = before.runs_BL & self.router.goes_on(left_BL)
        halted_BLD = before.halted_BLD + halts_BL[..., None].to(h_BLD.dtype) * h_BLD
        extra = {LOSS: left_BL.flatten()} if self.training and self.router.extra_weights else None
        self.record_pass(self.router.routing(runs_BL, left_BL, context.valid_BS, extra), context)
        return Sticks(left_BL, halted_BLD, runs_BL)


class UniversalStack(Stack):
    """A causal stack whose one layer is used ``steps`` times; see ``Universal``.

    Args:
        config: the transformer.
        ffn: FFN or MoE layer of the layer.
        universal: how tokens halt.
        steps: most steps of a token, L.
        attention: the attention experts of the layer; None: it has ``SelfAttention``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ffn: nn.Module,
        universal: Universal,
        *,
        steps: int,
        attention: core.MoEConfig | None = None,
    ) -> None:
        super().__init__(config, [ffn], causal=True, cross=False, attention=attention)
        self.steps, self.halting = steps, universal.build(config.shape.dim)

    def _through(self, x_BLD: Tensor, given: Pass) -> Tensor:
        layer, sticks = self.layers[0], self.halting.start(x_BLD, given.context)
        h_BLD = s_BLD = layer(x_BLD, given)
        for _ in range(self.steps - 1):
            sticks = self.halting(h_BLD, sticks, given.context)
            # Later positions see the keys of a token that has halted: a past's keys cover all steps.
            if not self.training and given.past is None and _all_halted(sticks):
                break
            own = given
            if not self.training:
                own = replace(given, context=replace(given.context, valid_BS=sticks.runs_BL))
            h_BLD, s_BLD = _next(layer(h_BLD, own, s_BLD), h_BLD, s_BLD, sticks, self.training)
        return s_BLD

    def _step_through(self, x_RD: Tensor, given: Step) -> Tensor:
        layer, sticks = self.layers[0], self.halting.start(x_RD[:, None], given.context)
        h_RD = s_RD = layer.step(x_RD, 0, given)
        # Each step has keys of its own: a halted token's keys are still seen by later tokens.
        for i in range(1, self.steps):
            sticks = self.halting(h_RD[:, None], sticks, given.context)
            own = replace(given, context=replace(given.context, valid_BS=sticks.runs_BL))
            new_R1D = layer.step(h_RD, i, own, s_RD)[:, None]
            h_R1D, s_R1D = _next(new_R1D, h_RD[:, None], s_RD[:, None], sticks, False)
            h_RD, s_RD = h_R1D[:, 0], s_R1D[:, 0]
        return s_RD


def _next(new_BLD: Tensor, h_BLD: Tensor, s_BLD: Tensor, sticks: Sticks, training: bool) -> tuple[Tensor, Tensor]:
    """Return states and expected states after a step, in which halted tokens keep theirs."""
    expected_BLD = sticks.halted_BLD + sticks.left_BL[..., None].to(new_BLD.dtype) * new_BLD
    if training:
        return new_BLD, expected_BLD
    runs_BL1 = sticks.runs_BL[..., None]
    return torch.where(runs_BL1, new_BLD, h_BLD), torch.where(runs_BL1, expected_BLD, s_BLD)


def _all_halted(sticks: Sticks) -> bool:
    """Return whether it is known that no token continues: elsewhere than on a CPU nobody waits for the number."""
    return sticks.runs_BL.device.type == "cpu" and has_numbers(sticks.runs_BL) and not bool(sticks.runs_BL.any())
